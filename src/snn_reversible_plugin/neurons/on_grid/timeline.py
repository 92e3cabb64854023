"""A neuron's states over time, of which only the newest is stored.

The one idea: a state on the grid is rebuilt from the one after it, the input current (replayed) and the
remainders of the step. A :class:`Timeline` is one layer's sequence; what autograd saves of its states is
a place on it: a :class:`State`, or the :class:`Charged` state before a reset.

Source: this package's own; remainders after MacKay et al., "Reversible Recurrent Neural Networks",
NeurIPS 2018.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.grid import watch
from snn_reversible_plugin.grid.range import larger
from snn_reversible_plugin.grid.step import Record, steps_on
from snn_reversible_plugin.neurons.on_grid.dynamics import Dynamics
from snn_reversible_plugin.neurons.on_grid.remainders import Remainders
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import flat
from snn_reversible_plugin.tape.handles import Handle, Passing
from snn_reversible_plugin.tape.origins import look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import PLAIN, Replayed

# NOTE [Who keeps a timeline alive]
#
# 1. The graph does: each State that autograd saved. When a backward has freed them, or nobody wanted the
#    gradient, the timeline and all its records go. Tensors lead to it by a Passing handle, which
#    doesn't count, because a neuron's newest state lives on until the next sequence.
# 2. A state that is no timeline's newest (it was used twice, changed, detached, its timeline is gone)
#    starts a timeline of its own. It is not stored: what comes before it is not ours to rebuild.
# 3. Spikes need their bits only, not the timeline: they refer to the records.
#
# NOTE [Walking back]
#
# 1. A cursor is a state at some step. A request is served by the nearest cursor at or after it, which moves
#    there; where there is none, a cursor starts from the newest state. So backward passes may be partial
#    or repeated, and a loss that asks for all states first costs a second walk, not T walks.
# 2. A few cursors stay, so that requests at two or three places by turns (a synaptic delay) walk in step.
# 3. A step back needs the current of that step. A current computed from a membrane is kept, not replayed:
#    rebuilding it could ask for the very state that is being rebuilt.
# 4. No state is changed in place: somebody may hold what a cursor handed out.
# 5. On a device each of these is a launch. There a reset at once is undone together with its charge, and a
#    step's spikes, which the next layer's current and its weight's gradient ask for one after the other,
#    stand from the first time to the second.
CURSORS = 4
REMEDY = (
    "Lower the weights or the gain of the input, set grid_bits of the neuron to fewer (each one less "
    'doubles the range), or convert with arithmetic="stock".'
)


_FIRST = Record()


class _Cursor(NamedTuple):
    t: int
    state: Tensor


class Timeline:
    """The sequence of one layer's states, numbered from 0, where it starts.

    ``records`` holds record 0 of the start, then 2 t - 1 of the charge and 2 t of the spikes of step t.

    Args:
        dynamics: how its steps are undone.
        like: a tensor laid out as its states are.
        fired: the spikes of the state that it starts from, as bits; None where nobody will ask.
    """

    __slots__ = (
        "__weakref__", "_newest", "_whole", "charged", "currents", "cursors", "dynamics", "newest_fired",
        "reach", "records", "ref", "watched_in",
    )  # fmt: skip

    def __init__(self, dynamics: Dynamics, like: Tensor, fired: Any) -> None:
        self.dynamics = dynamics
        self.records = Remainders(like)
        self.records.append([] if fired is None else [fired])
        self.newest_fired: Any = fired  # the spikes of the newest state
        self.currents: list[Handle] = []
        self._newest: tuple[int, Handle | None] = 0, None
        self._whole = True
        self.reach: Tensor | None = None  # of all states, where looking at it would wait for a device
        self.watched_in = -1  # the backward in which it was handed in last
        self.cursors: list[_Cursor] = []
        self.charged: _Cursor | None = None  # the charged state of a step, if it was just asked for
        self.ref = weakref.ref(self)

    @property
    def length(self) -> int:
        """How many steps have been taken."""
        return self._newest[0]

    @property
    def newest(self) -> Handle | None:
        """The newest state, after :attr:`length` steps."""
        return self._newest[1]

    @property
    def record(self) -> Record:
        """For the next step: its reach is accumulated in that of those before it."""
        return _FIRST if self.reach is None else Record(self.reach)

    @property
    def is_whole(self) -> bool:
        """Whether a step can follow: it can't where an interrupt came in the middle of the last one."""
        return self._whole

    def step(
        self,
        current: Handle,
        newest: Handle,
        lost: Sequence[Any],
        fired: Sequence[Any],
        reach: Tensor | None,
    ) -> None:
        """Take a step.

        Args:
            current: its input.
            newest: the state after it.
            lost: what its charge lost of the state before, in pieces.
            fired: its spikes as bits, and what its reset lost, in pieces; empty if it doesn't fire.
            reach: how far its states reach, where that is not known yet.
        """
        self._whole = False
        self.records.append(lost)
        self.records.append(fired)
        self.newest_fired = fired[0] if fired else None
        self.currents.append(current)
        if reach is not None and reach is not self.reach:
            self.reach = reach if self.reach is None else larger(self.reach, reach)
        self._newest = self._newest[0] + 1, newest
        self._whole = True

    def hold(self, newest: Handle) -> None:
        """Somebody has read the newest state, which was a promise."""
        self._newest = self.length, newest

    def state(self, t: int) -> Tensor:
        """The state after step t, flat."""
        if self.reach is not None:
            self._watch(self.reach)
        behind = [cursor for cursor in self.cursors if cursor.t >= t]
        if behind:
            cursor = min(behind, key=lambda one: one.t)
            self.cursors.remove(cursor)
        else:
            length, kept = self._newest
            assert kept is not None
            newest, _ = kept.get(False)
            cursor = _Cursor(length, newest.as_strided((newest.numel(),), (1,)))
        at, state = cursor
        while at > t:
            state = self._back(at, state)
            at -= 1
        self.cursors.append(_Cursor(at, state))
        del self.cursors[:-CURSORS]
        return state

    def charged_state(self, t: int) -> Tensor:
        """The state before the reset at the end of step t, flat."""
        state = self.state(t)
        # The state that a timeline starts from is seldom asked for, and takes a current to get.
        if t > 1 and self.dynamics.undoes_at_once(self.records.device):
            current = flat(self.currents[t - 1].unpack(), self.records.stride)
            record, lost = self.records.record(2 * t), self.records.record(2 * t - 1)
            charged, before = self.dynamics.back_to_both(state, current, record, lost)
            self.cursors[-1] = _Cursor(t - 1, before)
            return charged
        charged = self._unreset(t, state)
        self.charged = _Cursor(t, charged)
        return charged

    def fired(self, t: int) -> Any:
        """The spikes of step t as they were written down."""
        return self.records.record(2 * t)[: self._bytes()]

    def _back(self, t: int, state: Tensor) -> Tensor:
        """The state before step t, from the one after it."""
        dynamics = self.dynamics
        current = flat(self.currents[t - 1].unpack(), self.records.stride)
        if dynamics.resets_at_once:
            known, self.charged = self.charged, None
            state = known.state if known is not None and known.t == t else self._unreset(t, state)
        fired = self.fired(t - 1) if dynamics.resets_in_charge else None
        return dynamics.back(state, current, fired, self.records.record(2 * t - 1))

    def _unreset(self, t: int, state: Tensor) -> Tensor:
        record, end = self.records.record(2 * t), self._bytes()
        return self.dynamics.unreset(state, record[:end], record[end:])

    def _bytes(self) -> int:
        """How many a step's spikes take."""
        return (self.records.size.numel() + 7) // 8

    def _watch(self, reach: Tensor) -> None:
        """Hand in the reach, once a backward."""
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self.watched_in:
            self.watched_in = task
            watch(self.dynamics.name, reach, self.dynamics.bits, REMEDY)


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
        flat, records = self.timeline.charged_state(self.t), self.timeline.records
        charged = flat.as_strided(records.size, records.stride)
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
        if rests_on_a_state(operand):
            handle.rests = True
            return True
        if isinstance(operand, Replayed) and operand.rests is None:
            for_good = False
    if for_good:
        handle.rests = False
    return False
