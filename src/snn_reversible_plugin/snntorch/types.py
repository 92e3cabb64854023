"""What the converter does with each snnTorch neuron: which class stands in for it, or why none does.

The one idea: every neuron type of the ``snntorch`` namespace is answered for here by name. A neuron of
the leaky family whose settings its analytic step doesn't cover still runs stock's step with its states
anchored; types that aren't a leaky membrane stepped in time stay stock, with the reason that the
report prints.
"""

from __future__ import annotations

from typing import Any

import snntorch
from torch import nn

from snn_reversible_plugin.modules.registry import (
    StaysStock,
    SwappedClass,
    register_on_grid,
    register_reversible,
    swapped_class,
)
from snn_reversible_plugin.snntorch import neurons, on_grid
from snn_reversible_plugin.snntorch.steps import Spec, anchored, mechanism_of


class Anchored(SwappedClass):
    """Stock's own step under the tape, for neurons whose settings no analytic step covers."""

    treatment = "stock step, replayed from its states"
    arithmetic = "stock"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """One time step."""
        result = super().forward(*args, **kwargs)  # type: ignore[misc]
        return anchored(self, _spec(self), result)


_REVERSIBLE: dict[type[nn.Module], tuple[Spec, type[nn.Module]]] = {
    snntorch.Leaky: (neurons.LEAKY, neurons.RevLeaky),
    snntorch.Lapicque: (neurons.LAPICQUE, neurons.RevLapicque),
    snntorch.Synaptic: (neurons.SYNAPTIC, neurons.RevSynaptic),
    snntorch.Alpha: (neurons.ALPHA, neurons.RevAlpha),
    snntorch.RLeaky: (neurons.RLEAKY, neurons.RevRLeaky),
    snntorch.RSynaptic: (neurons.RSYNAPTIC, neurons.RevRSynaptic),
}

_LSTM = "the gates of an LSTM need its cell and gate values, which spikes don't tell"
_WHOLE_SEQUENCE = "it has no time steps: one call runs the whole sequence, without a reset"
STAYS_STOCK = {
    "SLSTM": _LSTM,
    "SConv2dLSTM": _LSTM,
    "LeakyParallel": "its membrane is computed by torch.nn.RNN, which keeps what it needs itself",
    "StateLeaky": _WHOLE_SEQUENCE,
    "LinearLeaky": _WHOLE_SEQUENCE,
    "AssociativeLeaky": _WHOLE_SEQUENCE,
    "DeltaLeaky": "it fires on the change of its membrane and is never reset",
}


def _spec(neuron: nn.Module) -> Spec:
    return next(spec for cls, (spec, _) in _REVERSIBLE.items() if isinstance(neuron, cls))


def _choose(module: nn.Module) -> type[nn.Module]:
    spec, reversible = _REVERSIBLE[type(module)]
    if mechanism_of(module, spec) is not None:
        return reversible
    return swapped_class(Anchored, type(module))


def _on_grid(module: nn.Module) -> type[nn.Module]:
    spec = on_grid.spec_of(module)
    reason = "its equations are not written for the grid"
    if spec is not None:
        reason = on_grid.why_not(module, spec) or ""
    if reason:
        raise StaysStock(reason)
    return swapped_class(on_grid.NeuronOnGrid, type(module))


def _refuse(module: nn.Module) -> type[nn.Module]:
    raise StaysStock(STAYS_STOCK[type(module).__name__])


for _stock, (_, _reversible) in _REVERSIBLE.items():
    register_reversible(_stock)(_choose)
    register_reversible(_reversible)(_reversible)
    register_on_grid(_stock)(_on_grid)
for _name in STAYS_STOCK:
    if hasattr(snntorch, _name):
        register_reversible(getattr(snntorch, _name))(_refuse)
