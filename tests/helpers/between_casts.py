"""SpikingJelly's older releases in half precision: what ``arithmetic="fused"`` is held to there."""

import itertools

KINDS = {"IFNode": {}, "LIFNode": {"tau": 1.7}, "ParametricLIFNode": {"init_tau": 1.7}}


def as_specified(node, x):
    """The specification: stock, in float32 between two casts."""
    return node(x.float()).to(x.dtype)


def settings(kind):
    """Those of a neuron that decide the order of its operations."""
    decays = [{}] if kind == "IFNode" else [{"decay_input": yes} for yes in (True, False)]
    for reset, detach, decay in itertools.product((0.0, None, -0.2), (True, False), decays):
        yield {"v_threshold": 0.7, "v_reset": reset, "detach_reset": detach, **decay, **KINDS[kind]}
