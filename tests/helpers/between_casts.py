"""SpikingJelly's older releases in half precision: what ``arithmetic="fused"`` is held to there."""

import itertools

import torch

KINDS = {"IFNode": {}, "LIFNode": {"tau": 1.7}, "ParametricLIFNode": {"init_tau": 1.7}}


def as_specified(node, x):
    """The specification: stock, in float32 between two casts."""
    return node(x.float()).to(x.dtype)


def outcome(run, node, x, v=None, calls=2):
    """Outputs, states and gradients of calls of a neuron."""
    node.reset()
    node.zero_grad()
    x = x.detach().clone().requires_grad_()
    if v is not None:
        v = v.detach().clone().requires_grad_()
        node.v = v
    seen = []
    for _ in range(calls):
        seen += [run(node, x), node.v]
        if isinstance(stored := getattr(node, "v_seq", None), torch.Tensor):
            seen.append(stored)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in seen]
    sum((t * w).sum().float() for t, w in zip(seen, weights, strict=True)).backward()
    return [*seen, x.grad, None if v is None else v.grad, *(p.grad for p in node.parameters())]


def called(node, x):
    return node(x)


def settings(kind):
    """Those of a neuron that decide the order of its operations."""
    decays = [{}] if kind == "IFNode" else [{"decay_input": yes} for yes in (True, False)]
    for reset, detach, decay in itertools.product((0.0, None, -0.2), (True, False), decays):
        yield {"v_threshold": 0.7, "v_reset": reset, "detach_reset": detach, **decay, **KINDS[kind]}
