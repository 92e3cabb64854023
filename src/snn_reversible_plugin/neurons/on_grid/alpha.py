"""The membrane of an alpha neuron on the grid: a scaled sum of two currents, and no state of its own.

The one idea: ``mem = tau (exc + inh)`` is computed from two states that are reversed in time. So it is
never stored, but computed again from them.

Source: ``snntorch.Alpha``, version 1.0; Rall, "Distinguishing theoretical synaptic potentials computed for
different soma-dendritic distributions of synaptic input", 1967.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.neuron import check_spikes
from snn_reversible_plugin.neurons.on_grid.places import NewState, OfTimelines, State
from snn_reversible_plugin.neurons.on_grid.step import Stepped
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops.batched import one_by_one
from snn_reversible_plugin.tape.handles import Handle, Passing
from snn_reversible_plugin.tape.origins import enter


class Membrane(OfTimelines, Handle):
    """``tau (exc + inh)`` of two states."""

    treatment = "reversed"
    __slots__ = ("states", "tau")

    def __init__(self, tau: Tensor, states: tuple[State, State]) -> None:
        self.tau, self.states = tau, states

    def get(self, last: bool) -> tuple[Tensor, bool]:
        exc, inh = (state.get(False)[0] for state in self.states)
        return self.verified(membrane_of(self.tau, exc, inh), "rebuilding its membrane"), True

    def stored(self, seen: set[int]) -> int:
        return sum(state.stored(seen) for state in self.states)

    def relies_on(self) -> Iterable[Handle]:
        return self.states


class NewMembrane(OfTimelines, Passing):
    """Leads to a :class:`Membrane`."""

    __slots__ = ("states", "tau")

    is_state = True

    def __init__(self, tau: Tensor, exc: NewState, inh: NewState) -> None:
        self.tau, self.states = tau, (exc, inh)

    def leads_to(self) -> Handle | None:
        exc, inh = (state.leads_to() for state in self.states)
        return Membrane(self.tau, (exc, inh)) if isinstance(exc, State) and isinstance(inh, State) else None


def membrane_of(tau: Tensor, exc: Tensor, inh: Tensor) -> Tensor:
    """The membrane, laid out as the currents are."""
    return tau * (exc + inh)


class _Charging(torch.autograd.Function):
    """``_Charging.apply(tau, exc, inh)`` -> the membrane."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, exc: Tensor, inh: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(tau)
        return membrane_of(tau, exc, inh)

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (tau,) = ctx.saved_tensors
        g = g * tau
        return None, g, g


class _Firing(torch.autograd.Function):
    """``_Firing.apply(surrogate, spikes, mem, threshold)`` -> the spikes."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, surrogate: Surrogate, spikes: list[Tensor], mem: Tensor, threshold: Tensor
    ) -> Tensor:
        ctx.save_for_backward(mem, threshold)
        ctx.surrogate = surrogate
        return spikes[0]

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mem, threshold = ctx.saved_tensors
        by_mem = ctx.surrogate.vjp(g, mem - threshold)
        _, _, of_mem, of_threshold = ctx.needs_input_grad
        by_threshold = (-by_mem).sum_to_size(threshold.shape).to(threshold.dtype) if of_threshold else None
        return None, None, by_mem if of_mem else None, by_threshold


def membrane(
    tau: Tensor, exc: Stepped, inh: Stepped, surrogate: Surrogate, fire: Any, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """The membrane after a step of its two currents, and its spikes.

    Args:
        tau: the factor, a constant.
        exc, inh: the currents' steps.
        surrogate, fire: how it fires, see :class:`~.neurons.on_grid.leaky.FireAndReset`.
        threshold: of a shape that broadcasts.
    """
    if switches.by_autograd():
        mem = membrane_of(tau, exc.state, inh.state)
        return mem, fire(mem - threshold)
    with tape.paused():
        mem = _Charging.apply(tau, exc.state, inh.state)
        if exc.timeline is None or inh.timeline is None:
            tape.mark_opaque(mem)
        else:
            lines = (exc.timeline, inh.timeline)
            enter(mem, NewMembrane(tau, *(NewState(line, line.length) for line in lines)))
            tape.returns(tau, mem, held=False)
        with torch.no_grad():
            values = surrogate.fired(mem - threshold)
            if surrogate.users:
                check_spikes(fire, mem - threshold, values)
        spikes = _Firing.apply(surrogate, [values], mem, threshold)
        tape.mark_spikes(spikes)
    return mem, spikes
