"""A neuron's states over time, of which only the newest is stored.

The one idea: a state on the grid is rebuilt from the one after it, the input current (replayed) and the
remainders of the step. A :class:`Timeline` is one layer's sequence; what autograd saves of its states is
a place on it: a :class:`State`, or the :class:`Charged` state before a reset.

Source: this package's own; remainders after MacKay et al., "Reversible Recurrent Neural Networks",
NeurIPS 2018.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.grid import watch
from snn_reversible_plugin.grid.range import larger
from snn_reversible_plugin.grid.step import Record
from snn_reversible_plugin.neurons.on_grid.dynamics import Dynamics
from snn_reversible_plugin.neurons.on_grid.remainders import Remainders
from snn_reversible_plugin.ops.layouts import flat
from snn_reversible_plugin.tape.handles import Handle

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
# 5. On a device each of these is a launch. There a reset at once is undone together with its charge, and
#    both with the gradient, whose backward says beforehand that it will: it is handed the state after, and
#    the way back, instead of the charged state. A step's spikes, which the next layer's current and its
#    weight's gradient ask for one after the other, stand from the first time to the second.
CURSORS = 4
REMEDY = (
    "Lower the weights or the gain of the input, set grid_bits of the neuron to fewer (each one less "
    'doubles the range), or convert with arithmetic="stock".'
)


_FIRST = Record()


class _Cursor(NamedTuple):
    t: int
    state: Tensor


class WayBack(NamedTuple):
    """A step that is the next to be undone, by whoever asked for its charged state.

    Attributes:
        timeline, t: whose step, and which.
        state: after it, flat.
        current: its input, flat; None for a timeline's first step, of which only the reset is undone: the
            state before is seldom asked for, and the current takes work to get.
        record, lost: what its spikes and reset wrote down, and what its charge did.
    """

    timeline: Timeline
    t: int
    state: Tensor
    current: Tensor | None
    record: Any
    lost: Any

    def charged(self) -> Tensor:
        """The state before the reset, flat."""
        timeline, dynamics = self.timeline, self.timeline.dynamics
        if self.current is None:
            charged = timeline.unreset(self.t, self.state)
            timeline.charged = _Cursor(self.t, charged)
            return charged
        charged, before = dynamics.back_to_both(self.state, self.current, self.record, self.lost)
        self.arrived(before)
        return charged

    def arrived(self, before: Tensor) -> None:
        """The walk goes on from the state before the step."""
        self.timeline.cursors[-1] = _Cursor(self.t - 1, before)


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
        if self.dynamics.undoes_at_once(self.records.device):
            return self.way_back(t).charged()
        charged = self.unreset(t, self.state(t))
        self.charged = _Cursor(t, charged)
        return charged

    def way_back(self, t: int) -> WayBack:
        """Of step t, whose reset and charge are undone together."""
        state, records = self.state(t), self.records
        current = flat(self.currents[t - 1].unpack(), records.stride) if t > 1 else None
        return WayBack(self, t, state, current, records.record(2 * t), records.record(2 * t - 1))

    def fired(self, t: int) -> Any:
        """The spikes of step t as they were written down."""
        return self.records.record(2 * t)[: self._bytes()]

    def _back(self, t: int, state: Tensor) -> Tensor:
        """The state before step t, from the one after it."""
        dynamics = self.dynamics
        current = flat(self.currents[t - 1].unpack(), self.records.stride)
        if dynamics.resets_at_once:
            known, self.charged = self.charged, None
            state = known.state if known is not None and known.t == t else self.unreset(t, state)
        fired = self.fired(t - 1) if dynamics.resets_in_charge else None
        return dynamics.back(state, current, fired, self.records.record(2 * t - 1))

    def unreset(self, t: int, state: Tensor) -> Tensor:
        """The state before the reset at the end of step t, from the one after it, flat."""
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
