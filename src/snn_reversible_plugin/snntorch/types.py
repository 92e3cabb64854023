"""What is known of snnTorch's neurons: a row a type.

The one idea: every neuron type of the ``snntorch`` namespace is answered for here by name. A neuron of
the leaky family whose settings its analytic step doesn't cover still runs stock's step with its states
anchored; types that aren't a leaky membrane stepped in time stay stock, with the reason that the
report prints. Source: ``snntorch/_neurons`` 1.0.
"""

from __future__ import annotations

from typing import Any

import snntorch

from snn_reversible_plugin.modules.registry import Row, rows_of
from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.snntorch import neurons
from snn_reversible_plugin.snntorch.steps import Spec, anchored

_LSTM = "the gates of an LSTM need its cell and gate values, which spikes don't tell"
_WHOLE_SEQUENCE = "it has no time steps: one call runs the whole sequence, without a reset"
_BY_RNN = "its membrane is computed by torch.nn.RNN, which keeps what it needs itself"

# Equations are the neuron's Spec.
ROWS = rows_of(
    snntorch,
    (
        Row("Leaky", equations=neurons.LEAKY, on_grid=True),
        Row("Lapicque", equations=neurons.LAPICQUE, on_grid=True),
        Row("Synaptic", equations=neurons.SYNAPTIC, on_grid=True),
        Row("Alpha", equations=neurons.ALPHA, on_grid=True),
        Row("RLeaky", equations=neurons.RLEAKY, on_grid=True),
        Row("RSynaptic", equations=neurons.RSYNAPTIC, on_grid=True),
        Row("SLSTM", stays=_LSTM),
        Row("SConv2dLSTM", stays=_LSTM),
        Row("LeakyParallel", stays=_BY_RNN),
        Row("StateLeaky", stays=_WHOLE_SEQUENCE),
        Row("LinearLeaky", stays=_WHOLE_SEQUENCE),
        Row("AssociativeLeaky", stays=_WHOLE_SEQUENCE),
        Row("DeltaLeaky", stays="it fires on the change of its membrane and is never reset"),
    ),
)


_UNKNOWN = Row("")


def row_of(cls: type) -> Row:
    """What is known of a neuron type: the row of the nearest class that it is or derives from."""
    return next((ROWS[base] for base in cls.__mro__ if base in ROWS), _UNKNOWN)


class Anchored(SwappedClass):
    """Stock's own step under the tape, for neurons whose settings no analytic step covers."""

    treatment = "stock step, replayed from its states"
    arithmetic = "stock"

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """One time step."""
        result = super().forward(*args, **kwargs)  # type: ignore[misc]
        spec: Spec = row_of(type(self)).equations
        return anchored(self, spec, result)
