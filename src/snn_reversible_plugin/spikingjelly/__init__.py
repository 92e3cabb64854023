"""SpikingJelly: reversible neuron types, and what the converter puts in place of stock ones.

The one idea: ``IFNode``, ``LIFNode`` and ``ParametricLIFNode`` have a backward of their own
(:mod:`.neurons`), every other neuron whose forward can be run twice is replayed (:mod:`.replayed`), and
what can't be stays stock, for the reason in its row (:mod:`.types`).

Source: ``spikingjelly.activation_based.neuron`` 2.0.
"""

from __future__ import annotations

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
    stays_stock,
)
from snn_reversible_plugin.modules.swap import swapped_class
from snn_reversible_plugin.spikingjelly import on_grid
from snn_reversible_plugin.spikingjelly.coupled import CoupledLIF
from snn_reversible_plugin.spikingjelly.neurons import (
    Analytic,
    Reversible,
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
)
from snn_reversible_plugin.spikingjelly.replayed import Replayed
from snn_reversible_plugin.spikingjelly.types import ROWS, dynamics_of, own_entries, row_of

__all__ = ["CoupledLIF", "RevIFNode", "RevLIFNode", "RevParametricLIFNode", "register"]

_NEURON_TYPES = (RevIFNode, RevLIFNode, RevParametricLIFNode)


def _choose(module: nn.Module) -> type[nn.Module]:
    if isinstance(module, Analytic):
        return type(module)  # type: ignore[return-value]
    if own := own_entries(type(module)):
        raise StaysStock(
            f"it has a {min(own)} of its own, which may do more than its equations; write them as "
            "single_step_functional_forward to have it replayed"
        )
    if any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules()):
        raise StaysStock("its forward updates batch-norm statistics")
    known = row_of(module).equations is not None
    return swapped_class(Reversible if known else Replayed, type(module))


def _on_grid(module: nn.Module) -> type[nn.Module]:
    reason = on_grid.why_not(module, dynamics_of(type(module)))
    if reason is not None:
        raise StaysStock(reason)
    return swapped_class(on_grid.NodeOnGrid, type(module))


for _cls, _row in ROWS.items():
    if _row.stays:
        register_reversible(_cls, subclasses=True)(stays_stock(_row.stays))
    elif _row.family:
        register_reversible(_cls, subclasses=True)(_choose)
    if _row.on_grid:
        register_on_grid(_cls)(_on_grid)
for _rev in _NEURON_TYPES:
    register_reversible(dynamics_of(_rev))(_rev)


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
    for cls in (*_NEURON_TYPES, CoupledLIF):
        setattr(neuron, cls.__name__, cls)
