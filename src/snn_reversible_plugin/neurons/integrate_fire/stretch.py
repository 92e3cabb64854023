"""A step of IFNode, LIFNode or ParametricLIFNode on a stretch of steps.

The one idea: its values are the charged membrane and what its leak multiplies; the reset comes after that,
so what it leaves is computed from them. Source: :mod:`.neurons.stretch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons import stretch
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, charge, fire_reset
from snn_reversible_plugin.neurons.stretch import Place, Values

WithLeak = Callable[[Tensor | None], Neuron]  # a neuron, given the tensor that its leak follows from


class _Step(NamedTuple):
    with_leak: WithLeak
    start: float | None

    def charge(self, left: Values | None, currents: list[Tensor], others: list[Tensor]) -> Values:
        (x,), neuron = currents, self.with_leak(*others or (None,))
        if left is None:
            assert self.start is not None
            left = (torch.full_like(x, self.start),)
        return charge(x, left[0], neuron)

    def leave(self, values: Values, others: list[Tensor]) -> Values:
        return (fire_reset(values[0], self.with_leak(*others or (None,)))[1],)


def place_of_step(v: Tensor | float, x: Tensor, with_leak: WithLeak, w: Tensor | None) -> Place | None:
    """The place of a step from v on a stretch; None where it has none, and holds what it needs."""
    if not tape.is_recording():
        return None
    fresh = not isinstance(v, Tensor)
    step = _Step(with_leak, v if fresh else None)  # type: ignore[arg-type]
    others = [] if w is None else [w]
    return stretch.place_of_step(step, None if fresh else [v], [x], others)  # type: ignore[list-item]
