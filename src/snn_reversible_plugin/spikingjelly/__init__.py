"""SpikingJelly: reversible neuron types, and what the converter puts in place of stock ones.

The one idea: ``IFNode``, ``LIFNode`` and ``ParametricLIFNode`` have a backward of their own
(:mod:`.nodes`), every other neuron whose forward can be run twice is replayed (:mod:`.generic`), and
what can't be stays stock, with the reason below. Source: ``spikingjelly.activation_based.neuron`` 2.0.
"""

from __future__ import annotations

from typing import Any

from torch import nn

try:
    from spikingjelly.activation_based import neuron
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "spikingjelly":
        raise
    raise ImportError(
        "snn_reversible_plugin.spikingjelly needs SpikingJelly, which is not installed: "
        "pip install snn-reversible-plugin[spikingjelly]"
    ) from error

from snn_reversible_plugin.modules.registry import (
    StaysStock,
    register_on_grid,
    register_reversible,
    swapped_class,
)
from snn_reversible_plugin.spikingjelly import on_grid
from snn_reversible_plugin.spikingjelly.coupled import CoupledLIF
from snn_reversible_plugin.spikingjelly.neurons import (
    Analytic,
    Reversible,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)
from snn_reversible_plugin.spikingjelly.replayed import Replayed, dynamics_of, origin_of

__all__ = ["CoupledLIF", "RevIFNode", "RevLIFNode", "RevParametricLIFNode", "register"]

_ANALYTIC: dict[type, type[nn.Module]] = {
    neuron.IFNode: RevIFNode,
    neuron.LIFNode: RevLIFNode,
    neuron.ParametricLIFNode: RevParametricLIFNode,
}

# Neurons that are not run a second time, and why.
_STOCK: dict[type[nn.Module], str] = {
    neuron.MPBNBaseNode: "its forward updates batch-norm statistics",
    neuron.NoisyBaseNode: "its forward moves on in a sequence of noise",
    neuron.NoisyNonSpikingBaseNode: "its forward moves on in a sequence of noise",
    neuron.ILCBaseNode: "its forward writes into its input",
    neuron.STBIFNode: "it is for inference and has no gradient",
    neuron.DSRIFNode: "its own backward needs its input only, which the tape stores anyway",
    neuron.DSRLIFNode: "its own backward needs its input only, which the tape stores anyway",
    neuron.NonSpikingBaseNode: "its equation is linear, so autograd keeps nothing of it",
}
_REPLAYED: tuple[type[nn.Module], ...] = (
    neuron.BaseNode, neuron.SimpleBaseNode, neuron.ActivationAwareIFNode, neuron.GatedLIFNode,
    neuron.PSN, neuron.MaskedPSN, neuron.SlidingPSN, neuron.FewSpikeNode, neuron.FlexSN,
)  # fmt: skip


# Through these a neuron is called; a functional forward has no side effects by SpikingJelly's contract.
_ENTRIES = {"__call__", "forward", "functional_forward", "single_step_forward", "multi_step_forward"}


def _choose(module: nn.Module) -> type[nn.Module]:
    cls: Any = type(module)
    if isinstance(module, Analytic):
        return cls
    own = _ENTRIES & origin_of(cls)[1]
    if own:
        raise StaysStock(
            f"it has a {min(own)} of its own, which may do more than its equations; write them as "
            "single_step_functional_forward to have it replayed"
        )
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise StaysStock("its forward updates batch-norm statistics")
    return swapped_class(Reversible if dynamics_of(cls) in _ANALYTIC else Replayed, cls)


def _refuse(module: nn.Module) -> type[nn.Module]:
    for cls in type(module).__mro__:
        if cls in _STOCK:
            raise StaysStock(_STOCK[cls])
    raise AssertionError(f"{type(module).__name__} is not among the neurons that stay stock")


for _cls in _REPLAYED:
    register_reversible(_cls, subclasses=True)(_choose)
for _cls in _STOCK:
    register_reversible(_cls, subclasses=True)(_refuse)
for _cls, _rev in _ANALYTIC.items():
    register_reversible(_cls)(_rev)


def _on_grid(module: nn.Module) -> type[nn.Module]:
    reason = on_grid.why_not(module, dynamics_of(type(module)))
    if reason is not None:
        raise StaysStock(reason)
    return swapped_class(on_grid.NodeOnGrid, type(module))


for _cls in _ANALYTIC:
    register_on_grid(_cls)(_on_grid)


def register() -> None:
    """Put ``RevIFNode``, ``RevLIFNode``, ``RevParametricLIFNode`` and ``CoupledLIF`` into SpikingJelly's
    neuron module.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> from snn_reversible_plugin import spikingjelly as adapter
        >>> adapter.register()
        >>> neuron.RevLIFNode is adapter.RevLIFNode
        True
    """
    for cls in (*_ANALYTIC.values(), CoupledLIF):
        setattr(neuron, cls.__name__, cls)
