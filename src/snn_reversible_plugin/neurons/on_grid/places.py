"""What leads to a state or to spikes of a timeline: handles that autograd saves, and that tensors carry.

The one idea: a place on a :class:`~.neurons.on_grid.timeline.Timeline` is a number beside it. What autograd
saves keeps the timeline alive, what a tensor carries doesn't. Source: this package's own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.on_grid.dynamics import Dynamics
from snn_reversible_plugin.neurons.on_grid.remainders import Remainders
from snn_reversible_plugin.neurons.on_grid.timeline import Timeline, WayBack
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.tape.handles import Handle, Passing
from snn_reversible_plugin.tape.origins import look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import PLAIN, Replayed


def continued(u: Tensor, dynamics: Dynamics) -> Timeline | None:
    """The timeline whose newest state ``u`` is, if the next step goes on with it."""
    known = look_up(u)
    if not isinstance(known, NewState) or not u.requires_grad:
        return None
    timeline = known.ref()
    if timeline is None or timeline.dynamics is not dynamics or known.t != timeline.length:
        return None
    return timeline if timeline.is_whole else None


def spikes_of(records: Remainders, t: int) -> Tensor:
    """The spikes of step t of a timeline with these records, flat."""
    record = records.record(2 * t)
    spikes = torch.empty(records.size.numel(), device=records.device)
    steps_on(spikes.device).fired(record[: (len(spikes) + 7) // 8], spikes)
    return spikes


_local = threading.local()


def saved_and_way_back(ctx: Any) -> tuple[tuple[Any, ...], WayBack | None]:
    """What a function has saved; of a :class:`Charged` state, the state after the step and the way back.

    Where the way back is None the charged state is itself there.
    """
    _local.asks, _local.found = True, None
    try:
        return ctx.saved_tensors, _local.found
    finally:
        _local.asks, _local.found = False, None


class OfTimelines:
    """Marks what leads to a value that rests on states of timelines."""

    __slots__ = ()


class State(OfTimelines, Handle):
    """The state after step ``t`` of a timeline."""

    treatment = "reversed"
    __slots__ = ("t", "timeline")

    def __init__(self, timeline: Timeline, t: int) -> None:
        self.timeline, self.t = timeline, t

    def get(self, last: bool) -> tuple[Tensor, bool]:
        flat, records = self.timeline.state(self.t), self.timeline.records
        return self.verified(flat.as_strided(records.size, records.stride), "rebuilding its state"), False

    def stored(self, seen: set[int]) -> int:
        return self.timeline.records.stored(seen)

    def relies_on(self) -> Iterable[Handle]:
        newest = self.timeline.newest
        return self.timeline.currents if newest is None else (*self.timeline.currents, newest)


class Charged(State):
    """The state of step ``t`` of a timeline before the reset at its end."""

    __slots__ = ()

    def get(self, last: bool) -> tuple[Tensor, bool]:
        asks, _local.asks = getattr(_local, "asks", False), False
        timeline, records = self.timeline, self.timeline.records
        if asks and self.checksum is None and timeline.dynamics.undoes_at_once(records.device):
            _local.found = found = timeline.way_back(self.t)
            return found.state.as_strided(records.size, records.stride), False
        charged = timeline.charged_state(self.t).as_strided(records.size, records.stride)
        return self.verified(charged, "rebuilding its membrane"), False


class Spikes(Handle):
    """The spikes of a step, out of the records."""

    treatment = "packed"
    __slots__ = ("records", "t")

    def __init__(self, records: Remainders, t: int) -> None:
        self.records, self.t = records, t

    def get(self, last: bool) -> tuple[Tensor, bool]:
        records, owned = self.records, True
        known, records.unpacked = records.unpacked, None
        if known is not None and known[0] == self.t:
            spikes, owned = known[1], False
        else:
            spikes = spikes_of(records, self.t).as_strided(records.size, records.stride)
            if not may_look(records.device):
                records.unpacked, owned = (self.t, spikes), False
        return self.verified(spikes, "unpacking its spikes"), owned

    def stored(self, seen: set[int]) -> int:
        return self.records.stored(seen)


class Bits(Spikes):
    """The same as they were written down, uint8."""

    __slots__ = ()

    def get(self, last: bool) -> tuple[Tensor, bool]:
        end = (self.records.size.numel() + 7) // 8
        bits = torch.as_tensor(self.records.record(2 * self.t)[:end])
        return self.verified(bits, "reading its spikes"), False


class _Newly(Passing):
    """What a tensor that a neuron just made is: a state or spikes of a timeline."""

    __slots__ = ("ref", "t")

    def __init__(self, timeline: Timeline, t: int) -> None:
        self.ref: Callable[[], Timeline | None] = timeline.ref
        self.t = t


class NewState(OfTimelines, _Newly):
    """Leads to a :class:`State`."""

    __slots__ = ()

    is_state = True

    def leads_to(self) -> Handle | None:
        timeline = self.ref()
        return None if timeline is None else State(timeline, self.t)


class NewSpikes(_Newly):
    """Leads to :class:`Spikes`, the same for all who ask."""

    __slots__ = ("made",)

    def __init__(self, timeline: Timeline, t: int) -> None:
        self.ref, self.t = timeline.ref, t
        self.made: Callable[[], Spikes | None] | None = None

    def leads_to(self) -> Handle | None:
        timeline = self.ref()
        if timeline is None:
            return Packed()
        spikes = None if self.made is None else self.made()
        if spikes is None:
            spikes = Spikes(timeline.records, self.t)
            self.made = weakref.ref(spikes)
        return spikes


class NewBits(_Newly):
    """Leads to :class:`Bits`."""

    __slots__ = ()

    def leads_to(self) -> Handle | None:
        timeline = self.ref()
        return None if timeline is None else Bits(timeline.records, self.t)


class NewCharged(Passing):
    """Leads to a :class:`Charged` of a timeline that is about to take step ``t``."""

    __slots__ = ("t", "timeline")

    def __init__(self, timeline: Timeline, t: int) -> None:
        self.timeline, self.t = timeline, t

    def leads_to(self) -> Charged:
        return Charged(self.timeline, self.t)


def rests_on_a_state(handle: Any) -> bool:
    """Whether rebuilding a handle's value may ask for a state of some timeline."""
    if not isinstance(handle, Replayed):
        return isinstance(handle, OfTimelines)
    if handle.rests is not None:
        return handle.rests
    for_good = handle.__class__ in PLAIN  # a stream of residual blocks gets other operands later
    for operand in handle.operands():
        if isinstance(operand, Replayed):
            rests = operand.rests
            rests = rests_on_a_state(operand) if rests is None else rests
            if operand.rests is None:
                for_good = False
        else:
            rests = isinstance(operand, OfTimelines)
        if rests:
            handle.rests = True
            return True
    if for_good:
        handle.rests = False
    return False
