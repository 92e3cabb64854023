"""One time step of a neuron on the dyadic grid, which a later backward can undo.

The one idea: neurons differ in their equations, not in what a step has to write down. A neuron's
:class:`Constants` charge and fire; :func:`step` does the rest for all of them: it goes on with the state's
timeline or starts one, stores the current's handle, the spikes and what was lost, and leaves on each tensor
that it returns a way back to them. No tensor is held but the newest state.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import snap, snap_number
from snn_reversible_plugin.grid.decays import NONE, Step
from snn_reversible_plugin.grid.range import check_step, larger, reach
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.places import NewSpikes, NewState, continued, rests_on_a_state
from snn_reversible_plugin.neurons.on_grid.promised import Left, Promised
from snn_reversible_plugin.neurons.on_grid.timeline import REMEDY, Timeline
from snn_reversible_plugin.ops.layouts import is_dense
from snn_reversible_plugin.tape.constants import constant, number_in
from snn_reversible_plugin.tape.final_membrane import OfFirstStep
from snn_reversible_plugin.tape.operators import aten
from snn_reversible_plugin.tape.origins import enter, look_up

Parameters = tuple[Tensor, ...]


class Before(NamedTuple):
    """Where a step starts: the state, its spikes as bits, and the place on a timeline if there is one.

    ``t`` numbers the step that is about to be taken. It is one object, for all handles that keep it.
    """

    state: Tensor
    fired: Any
    timeline: Timeline | None
    t: int
    first: OfFirstStep | None = None  # the promise of the state after it, in place of a tensor


class Charged(NamedTuple):
    """What a charge, with its spikes and a reset at once, has made.

    Attributes:
        state: after the step, in the graph.
        spikes: their values; None if the state doesn't fire.
        lost: what the charge lost of the state before, in pieces; written down where there is a timeline.
        fired: the spikes as bits, and what a reset at once lost, in pieces; likewise.
        reaches: the largest magnitudes on the way.
    """

    state: Tensor
    spikes: Tensor | None
    lost: Sequence[Any]
    fired: Sequence[Any]
    reaches: Sequence[Any]


class Stepped(NamedTuple):
    """What a step has made.

    Attributes:
        state: after the step.
        spikes: None if the state doesn't fire.
        fired: the spikes of the state before the step; None if it doesn't fire.
        timeline: the state's, for whoever wants it to live until something refers to the state; None where
            no tape records.
    """

    state: Tensor
    spikes: Tensor | None
    fired: Any
    timeline: Timeline | None = None


@dataclass(frozen=True, eq=False)
class Constants:
    """A neuron's constants, as long as its parameters are what they are, and its equations with them.

    Attributes:
        name: whose state it is, for errors.
        bits: the grid's.
        step: the charge.
        fire: the surrogate as the user gave it, from the distance to the threshold to spikes; None for a
            state that doesn't fire.
        parameters: the tensors that the rest follows from, held so that nothing else gets their ids.
    """

    name: str
    bits: int
    step: Step
    fire: Callable[[Tensor], Tensor] | None
    parameters: Parameters

    @property
    def resets_at_once(self) -> bool:
        """Whether a step ends with a reset by its own spikes."""
        return False

    @property
    def resets_in_charge(self) -> bool:
        """Whether a step's charge resets by the spikes before it."""
        return self.step.reset != NONE

    def start(self, state: Tensor) -> Any:
        """The spikes, as bits, of a state that a timeline starts from; None where nobody asks."""
        return None

    def charge(self, current: Tensor, before: Before, parameters: Parameters) -> Charged:
        """Charge, compute the spikes, and reset where that is done at once."""
        raise NotImplementedError

    def let_fire(self, charged: Charged, parameters: Parameters) -> Tensor | None:
        """The spikes in the graph; the state that was charged is on the tape already."""
        return charged.spikes

    def fired(self, before: Before) -> Any:
        """What :class:`Stepped` says of the spikes before the step."""
        return None

    def unreset(self, state: Tensor, fired: Any, lost: Any) -> Tensor:
        """The charged state of a step that resets at once: :meth:`.dynamics.Dynamics.unreset`."""
        raise NotImplementedError

    def undoes_at_once(self, device: torch.device) -> bool:
        """Whether a reset at once is undone with its charge: :meth:`.dynamics.Dynamics.undoes_at_once`."""
        return False

    def back_to_both(self, state: Tensor, current: Tensor, record: Any, lost: Any) -> tuple[Tensor, Tensor]:
        """The charged state and the one before: :meth:`.dynamics.Dynamics.back_to_both`."""
        raise NotImplementedError

    def back(self, charged: Tensor, current: Tensor, fired: Any, lost: Any) -> Tensor:
        """The state before a step: :meth:`.dynamics.Dynamics.back`."""
        raise NotImplementedError

    def reference(self, current: Tensor, state: Tensor, parameters: Parameters) -> Stepped:
        """:func:`step` written with operations that autograd differentiates: the specification."""
        raise NotImplementedError


def step(
    constants: Constants,
    current: Tensor,
    state: Tensor,
    parameters: Parameters,
    *,
    trusted: bool = False,
    first: OfFirstStep | None = None,
) -> Stepped:
    """One step on the grid, on a timeline where a tape records. For who has found that it runs eagerly.

    Args:
        constants: the neuron's.
        current: its input [N, ...].
        state: before the step, of the same shape; snapped to the grid where it isn't a timeline's newest.
        parameters: the learnable ones, in the order in which the constants take them.
        trusted: the current rests on states of other timelines only, and may be replayed.
        first: promises the state after a step that starts a timeline, where one is recorded.

    Raises:
        OverflowError: the state left the range in which the grid is exact; on a device, from the backward.
    """
    if switches.by_autograd():
        stepped = constants.reference(current, state, parameters)
        _checked(constants, (reach(stepped.state),))
        return stepped
    needs = current.requires_grad or state.requires_grad
    for parameter in parameters:
        needs = needs or parameter.requires_grad
    recorder = tape.current()
    recorded = needs and tape.is_recording(eagerly=True)
    timeline = handle = None
    if recorder is not None and recorded:
        timeline = continued(state, constants)
        keeps = not trusted and rests_on_a_state(look_up(current))
        handle = recorder.keep(current) if keeps else recorder.pack(current, whole=True)
    with tape.paused() if recorder is None else recorder.paused():
        before = _before(constants, state, timeline, recorded)
        if first is not None and timeline is None and recorded:
            before = before._replace(first=first)
        charged = constants.charge(current, before, parameters)
        unknown = _checked(constants, charged.reaches)
        (_, _, timeline, t, first), state = before, charged.state
        if timeline is None or handle is None:
            tape.mark_opaque(state)
        elif first is not None:
            timeline.step(handle, Promised(first), charged.lost, charged.fired, unknown)
            first.place = Left(timeline)
        else:
            assert recorder is not None
            timeline.step(handle, recorder.keep(state), charged.lost, charged.fired, unknown)
            enter(state, NewState(timeline, t))
            tape.returns(timeline, state)
        spikes = constants.let_fire(charged, parameters)
        if spikes is not None and timeline is not None:
            enter(spikes, NewSpikes(timeline, t))
        elif spikes is not None:
            tape.mark_spikes(spikes)
    return Stepped(state, spikes, constants.fired(before), timeline)


def _before(constants: Constants, state: Tensor, timeline: Timeline | None, recorded: bool) -> Before:
    if timeline is not None:
        return Before(state, timeline.newest_fired, timeline, timeline.length + 1)
    number = number_in(look_up(state))
    if number is None or state.requires_grad or state.dtype is not torch.float32 or not isfinite(number):
        state = snap(state, constants.bits)
        if not is_dense(state):
            state = state.contiguous()
        tape.mark_opaque(state)
    else:
        number = snap_number(number, constants.bits)
        state = torch.full_like(state, number, dtype=torch.float32)
        if recorded:
            enter(state, constant(aten.full_like.default, (state, number), state))
        else:
            tape.mark_opaque(state)
    fired = constants.start(state)
    if recorded:
        timeline = Timeline(constants, state, fired)
    return Before(state, fired, timeline, 1)


def _checked(constants: Constants, reaches: Sequence[Any]) -> Tensor | None:
    """The reach that is to be looked at later.

    A charged state counts too: it may be back in range after the reset, but what came before it is lost.
    """
    unknown = None
    for one in reaches:
        later = check_step(one, constants.name, constants.bits, REMEDY)
        if later is not None:
            unknown = later if unknown is None else larger(unknown, later)
    return unknown
