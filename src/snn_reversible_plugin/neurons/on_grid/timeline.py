"""A neuron's states over time, of which only the newest is stored.

The one idea: a state on the grid is rebuilt from the one after it, the input current (replayed) and the
remainders of the step. A :class:`Timeline` is one layer's sequence; what autograd saves of its states is
a :class:`State`, a place on it. Source: design section 6.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from snn_reversible_plugin.grid import check_range, limit
from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.on_grid.remainders import Remainders
from snn_reversible_plugin.ops.layouts import flat
from snn_reversible_plugin.tape.handles import Handle, Kept, Packed, Passing, Replayed
from snn_reversible_plugin.tape.origins import look_up

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
CURSORS = 4
REMEDY = (
    "Lower the weights or the gain of the input, set grid_bits of the neuron to fewer (each one less "
    'doubles the range), or convert with arithmetic="stock".'
)


class Dynamics(Protocol):
    """How a timeline steps back. Equal for all steps of one."""

    @property
    def bits(self) -> int:
        """The grid's."""

    def back(self, timeline: Timeline, t: int, state: Tensor, current: Tensor) -> Tensor:
        """The flat state before step t, from the one after it."""


class _Cursor(NamedTuple):
    t: int
    state: Tensor


class Timeline:
    """The sequence of one layer's states, numbered from 0, where it starts.

    ``records`` holds record 0 of the start, then 2 t - 1 of the charge and 2 t of the spikes of step t.
    """

    __slots__ = (
        "__weakref__", "charged", "currents", "cursors", "dynamics", "name", "newest", "newest_bits",
        "reach", "records", "ref",
    )  # fmt: skip

    def __init__(self, dynamics: Dynamics, like: Tensor, name: str) -> None:
        self.dynamics, self.name = dynamics, name
        self.records = Remainders(like)
        self.currents: list[Handle] = []
        self.newest: Kept | None = None
        self.reach: Tensor | None = None
        self.cursors: list[_Cursor] = []
        self.charged: tuple[int, Tensor] | None = (
            None  # the charged state of a step, if it was just asked for
        )
        self.ref = weakref.ref(self)
        self.newest_bits: Any = None  # the spikes of the newest state, once it fired

    @property
    def length(self) -> int:
        """How many steps have been taken."""
        return len(self.currents)

    def step(self, current: Handle, newest: Kept, reach: Tensor | None, lost: Sequence[Any]) -> None:
        """Take a step: its current, the state after it, and what to write down of the one before.

        ``reach``: what :func:`watched` returned.
        """
        self.records.append(lost)
        self.currents.append(current)
        self.newest = newest
        if reach is not None:
            self.reach = reach if self.reach is None else torch.maximum(self.reach, reach)

    def state(self, t: int) -> Tensor:
        """The state after step t, flat."""
        if self.reach is not None:
            check_range([self.name], [self.reach], self.dynamics.bits, REMEDY)
            self.reach = None
        behind = [cursor for cursor in self.cursors if cursor.t >= t]
        if behind:
            cursor = min(behind, key=lambda one: one.t)
            self.cursors.remove(cursor)
        else:
            assert self.newest is not None
            newest, _ = self.newest.get(False)
            cursor = _Cursor(self.length, newest.as_strided((newest.numel(),), (1,)))
        at, state = cursor
        while at > t:
            state = self.dynamics.back(self, at, state, self.current(at))
            at -= 1
        self.cursors.append(_Cursor(at, state))
        del self.cursors[:-CURSORS]
        return state

    def current(self, t: int) -> Tensor:
        """The input current of step t, flat."""
        return flat(self.currents[t - 1].unpack(), self.records.stride)

    def fired(self, record: Sequence[Any]) -> None:
        """Write down the spikes of the newest state, as bits, and what else is lost when it has fired."""
        self.records.append(record)
        self.newest_bits = record[0] if record else None

    def bits(self, t: int) -> tuple[Any, Any]:
        """The spikes of step t as they were written down, and the rest of that record."""
        record = self.records.record(2 * t)
        end = (self.records.size.numel() + 7) // 8
        return record[:end], record[end:]


def continued(u: Tensor, dynamics: Dynamics) -> Timeline | None:
    """The timeline whose newest state ``u`` is, if the next step goes on with it."""
    known = look_up(u)
    if not isinstance(known, NewState) or not u.requires_grad:
        return None
    timeline = known.ref()
    if timeline is None or timeline.dynamics is not dynamics or known.t != timeline.length:
        return None
    return timeline


def watched(reach: Any, name: str, bits: int) -> Tensor | None:
    """Raise if a state left the grid's range, or return its reach where looking would wait for a device.

    Raises:
        OverflowError: naming the neuron, the value and the remedy.
    """
    if isinstance(reach, Tensor) and reach.device.type != "cpu":
        return reach
    if not reach < limit(bits):
        check_range([name], [torch.as_tensor(reach)], bits, REMEDY)
    return None


def fired(records: Remainders, t: int) -> Tensor:
    """The spikes of step t of a timeline with these records, flat."""
    record = records.record(2 * t)
    spikes = torch.empty(records.size.numel(), device=records.device)
    steps_on(spikes.device).fired(record[: (len(spikes) + 7) // 8], spikes)
    return spikes


class State(Handle):
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


class Spikes(Handle):
    """The spikes of a step, out of the records."""

    treatment = "packed"
    __slots__ = ("records", "t")

    def __init__(self, records: Remainders, t: int) -> None:
        self.records, self.t = records, t

    def get(self, last: bool) -> tuple[Tensor, bool]:
        spikes = fired(self.records, self.t).as_strided(self.records.size, self.records.stride)
        return self.verified(spikes, "unpacking its spikes"), True

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


class NewState(_Newly):
    """Leads to a :class:`State`."""

    __slots__ = ()

    def leads_to(self) -> Handle | None:
        timeline = self.ref()
        return None if timeline is None else State(timeline, self.t)


class NewSpikes(_Newly):
    """Leads to :class:`Spikes`, the same for all who ask."""

    __slots__ = ("made",)

    def __init__(self, timeline: Timeline, t: int) -> None:
        super().__init__(timeline, t)
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


def rests_on_a_state(handle: Any) -> bool:
    """Whether rebuilding a handle's value may ask for a state of some timeline."""
    if isinstance(handle, Replayed):
        return any(rests_on_a_state(operand) for operand in handle.operands())
    return isinstance(handle, (State, NewState))
