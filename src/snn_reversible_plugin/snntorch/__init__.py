"""snnTorch neurons that hold their membrane and nothing else.

The one idea: snnTorch's neurons are called one time step at a time, in the user's own loop, so each step
is one autograd function whose gradient needs only the membrane that the next step starts from.
Usable as neuron types (:class:`RevLeaky` and its siblings), by ``convert_to_reversible``, and after
:func:`register` by name. Source: snnTorch 1.0 (Eshraghian et al., Proceedings of the IEEE 111, 2023).
"""

from __future__ import annotations

import functools

try:
    import snntorch
except ModuleNotFoundError as error:
    if error.name != "snntorch":
        raise
    raise ImportError(
        "snn_reversible_plugin.snntorch needs snnTorch: pip install 'snn-reversible-plugin[snntorch]'"
    ) from error

import torch
from torch import nn

from snn_reversible_plugin.modules.registry import (
    StaysStock,
    register_on_grid,
    register_reversible,
    stays_stock,
)
from snn_reversible_plugin.modules.swap import swapped_class
from snn_reversible_plugin.neurons.witness import alone
from snn_reversible_plugin.snntorch import on_grid
from snn_reversible_plugin.snntorch.coupled import CoupledLIF
from snn_reversible_plugin.snntorch.neurons import (
    RevAlpha,
    RevLapicque,
    RevLeaky,
    RevRLeaky,
    RevRSynaptic,
    RevSynaptic,
)
from snn_reversible_plugin.snntorch.steps import mechanism_of
from snn_reversible_plugin.snntorch.types import ROWS, Anchored

__all__ = [
    "CoupledLIF",
    "RevAlpha",
    "RevLapicque",
    "RevLeaky",
    "RevRLeaky",
    "RevRSynaptic",
    "RevSynaptic",
    "register",
]


_NEURON_TYPES = (RevLeaky, RevLapicque, RevSynaptic, RevAlpha, RevRLeaky, RevRSynaptic)
_reversible: dict[type, type[nn.Module]] = {cls.__bases__[-1]: cls for cls in _NEURON_TYPES}


@functools.cache
def _swaps_states() -> bool:
    """Whether Synaptic takes a membrane that it is given for its synaptic current, as in release 0.9.1."""
    with alone():
        neuron = snntorch.Synaptic(alpha=0.5, beta=0.5)
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        return not torch.equal(neuron(0 * one, one, 0 * one)[1], 0.5 * one)


def _choose(module: nn.Module) -> type[nn.Module]:
    if isinstance(module, snntorch.Synaptic) and _swaps_states():
        return swapped_class(Anchored, type(module))
    if mechanism_of(module, ROWS[type(module)].equations) is None:
        return swapped_class(Anchored, type(module))
    return _reversible[type(module)]


def _on_grid(module: nn.Module) -> type[nn.Module]:
    if isinstance(module, snntorch.Synaptic) and _swaps_states():
        raise StaysStock("this release takes the membrane that it is given for its synaptic current")
    spec = on_grid.spec_of(module)
    reason = "its equations are not written for the grid" if spec is None else on_grid.why_not(module, spec)
    if reason is not None:
        raise StaysStock(reason)
    return swapped_class(on_grid.NeuronOnGrid, type(module))


for _cls, _row in ROWS.items():
    if _row.stays:
        register_reversible(_cls, subclasses=True)(stays_stock(_row.stays))
    else:
        register_reversible(_cls)(_choose)
        register_on_grid(_cls)(_on_grid)
for _rev in _NEURON_TYPES:
    register_reversible(_rev)(_rev)


def register() -> None:
    """Put the reversible neuron types into the ``snntorch`` namespace.

    Example:
        >>> import snntorch
        >>> from snn_reversible_plugin.snntorch import register
        >>> register()
        >>> snntorch.RevLeaky(beta=0.9).beta
        tensor(0.9000)
    """
    for reversible in (*_NEURON_TYPES, CoupledLIF):
        setattr(snntorch, reversible.__name__, reversible)
