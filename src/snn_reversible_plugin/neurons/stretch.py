"""Steps of a neuron that a user's loop takes one by one, held as a membrane now and then.

The one idea: what the backward of a step asks for, its charged states, follows from those before it and
from the input current, which is replayed. So of a loop over T steps about sqrt(2 T) membranes are held, its
*anchors*; the backward runs the *stretch* between two of them again, in values only. The graph is
the user's, a node a step, and so is the order of its sums.

Source: this package's own; anchors after Griewank, "Achieving logarithmic growth of temporal and spatial
complexity in reverse automatic differentiation", Optimization Methods and Software 1, 1992.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.tape.handles import Handle, Kept, Passing, peek
from snn_reversible_plugin.tape.origins import OUTSIDE, enter, look_up
from snn_reversible_plugin.tape.replayed import held_in

Values = tuple[Any, ...]  # what the backward of a step may ask for, its charged states first


class Equations(Protocol):
    """A step in values. ``others``: what it takes beside its currents: a learned leak."""

    def charge(self, left: Values | None, currents: list[Tensor], others: list[Tensor]) -> Values:
        """Its values from the states that the step before left; None: from where a fresh neuron starts."""
        raise NotImplementedError

    def leave(self, values: Values, others: list[Tensor]) -> Values:
        """The states that it leaves."""
        raise NotImplementedError


# NOTE [Anchors]
#
# 1. A stretch starts from a number, the membrane after a reset, and then its first step saves its
#    current; or with a step that holds its charged states. Nothing is run for that step's own gradient.
#    How many steps a stretch may have grows with those before it, as nobody knows T: they are 3, 5, 7, 8,
#    9, ..., so that 100 steps have 9 anchors, and 16 membranes stand at once.
# 2. The backward asks for the last step of a stretch first. All its charged membranes are computed then,
#    and wait, each for its own step; the first is not among them. A current is computed once for that,
#    and its convolution once more for batch norm's backward: at most twice.
# 3. A step goes on with a stretch where its membrane is the very tensor that the last step left, and gets
#    a gradient. Otherwise (it was detached, changed, used twice) it is an anchor. What nobody told the
#    tape of (`.data`, numpy) is found between two calls by a checksum (`tape.returns`).
# 4. A current that is stored nowhere is no smaller than the membrane: that step is an anchor, too. So is
#    one whose current is the user's own tensor, which a script may fill again, and one that rests on a
#    membrane, because a stretch in a stretch would run again and again.
# 5. Where a step leaves its charged states as they are, they are in the user's hands, who keeps what he
#    saves of them. What the step saves is another tensor with the same values, `way_to` them. All of the
#    states of a first step are held when a second one goes on from them; before, what the first saved.
#
# For example, with T = 8 the anchors are step 4's charged membrane and the membrane after step 8, which the
# neuron holds. The backward of step 8 runs steps 5 to 8 again; 7, 6 and 5 find theirs. That of step 3 runs
# steps 1 to 3, that of step 1 has its current.


class Stretch:
    """Some steps of one neuron, from an anchor.

    Args:
        before: how many steps came before it.
        fresh: whether it starts from a number, or from the charged states of its first step.
    """

    __slots__ = ("__weakref__", "_anchors", "_before", "_first", "_fresh", "_keys", "_members", "_steps")

    def __init__(self, before: int, fresh: bool) -> None:
        self._before, self._fresh = before, fresh
        self._anchors: list[Kept] = []
        self._first: dict[int, weakref.ref[Kept]] = {}  # what the first step saved of its charged states
        self._keys: list[object] = []
        self._steps: list[tuple[Equations, list[Handle], list[Handle]]] = []
        self._members: list[Callable[[], _Charged | None]] = []

    @property
    def length(self) -> int:
        """How many steps it has."""
        return len(self._steps)

    @property
    def end(self) -> int:
        """How many steps there are to its end, those before it included."""
        return self._before + len(self._steps)

    @property
    def is_full(self) -> bool:
        """Whether the next step is an anchor."""
        return self.length >= 3 + math.isqrt(2 * self._before)

    def step(self, equations: Equations, currents: list[Handle], others: list[Handle]) -> Place:
        """Take a step; without ``currents`` where charged states are held."""
        self._steps.append((equations, currents, others))
        return Place(self, self.length - 1)

    @property
    def is_anchored(self) -> bool:
        """Whether it starts with charged states that are held."""
        return not self._fresh

    def hold(self, *states: Tensor) -> list[Kept]:
        """The first step's charged states are the anchors."""
        if not self._anchors:
            saved = {at: kept for at, ref in self._first.items() if (kept := ref()) is not None}
            self._anchors = [saved.get(at) or tape.keep(one) for at, one in enumerate(states)]
        return self._anchors

    def key(self, which: int) -> object:
        """What tells one of the states that it leaves from the others."""
        while len(self._keys) <= which:
            self._keys.append(object())
        return self._keys[which]

    def way_to(self, index: int, which: int, state: Tensor) -> Handle:
        """A handle for a charged state that a step has left."""
        if index or self._fresh:
            return self.member(index, which)
        if self._anchors:
            return self._anchors[which]
        kept = self._first[which]() if which in self._first else None
        if kept is None:
            kept = tape.keep(state)
            self._first[which] = weakref.ref(kept)
        return kept

    def member(self, index: int, which: int) -> _Charged:
        """A handle for one of the values that a step leaves to its backward."""
        one = _Charged(self, index, which)
        self._members.append(weakref.ref(one))
        return one

    def handles(self, index: int) -> list[Handle]:
        """What the steps up to one rely on."""
        found = [one for _, xs, others in self._steps[: index + 1] for one in (*xs, *others)]
        return [*self._anchors, *found]

    def run(self, index: int, walk: int) -> Values:
        """The values of a step. Those of the steps before wait for theirs, in this backward, ``walk``."""
        waiting: dict[int, list[_Charged]] = {}
        for ref in self._members:
            one = ref()
            if walk != -1 and one is not None and one.index < index and one.walk != walk:
                waiting.setdefault(one.index, []).append(one)
        left: Values | None = None
        for at in range(index + 1):
            equations, currents, others = self._steps[at]
            beside = [peek(one) for one in others]
            if at == 0 and self._anchors:
                values: Values = tuple(one.get(False)[0] for one in self._anchors)
            else:
                values = equations.charge(left, [peek(one) for one in currents], beside)
            if at < index:
                for one in waiting.get(at, ()):
                    one.wait(values[one.which], walk)
                left = equations.leave(values, beside)
        return values


class _Charged(Handle):
    """One of the values of a step of a stretch."""

    treatment = "replayed"
    __slots__ = ("cache", "index", "stretch", "walk", "which")

    def __init__(self, stretch: Stretch, index: int, which: int) -> None:
        self.stretch, self.index, self.which = stretch, index, which
        self.cache: Tensor | None = None
        self.walk: int | None = None

    def wait(self, value: Any, walk: int) -> None:
        """Hold a value until its step's backward asks, to the end of this one at most."""
        self.cache, self.walk = value, walk
        held_in(walk, self)

    def get(self, last: bool) -> tuple[Tensor, bool]:
        walk = torch._C._current_graph_task_id()
        value, self.cache = self.cache if self.walk == walk else None, None
        if value is None:
            self.walk = None
            value = self.stretch.run(self.index, walk)[self.which]
            assert value is not None
        return self.verified(value, "running its steps again"), True

    def relies_on(self) -> Iterable[Handle]:
        return self.stretch.handles(self.index)


class _Alive(Handle):
    """Keeps a stretch for the steps that may follow, as long as the graph holds what its first saved."""

    treatment = "replayed"
    __slots__ = ("stretch",)

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch

    def get(self, last: bool) -> tuple[Tensor, bool]:
        return torch.empty(0), True


class NewMembrane(Passing):
    """A state that a step of a stretch has left. Who relies on it keeps it.

    ``which`` of ``count`` states it is; ``is_charged``: it is that value of the step.
    """

    __slots__ = ("count", "index", "is_charged", "ref", "which")

    def __init__(self, stretch: Stretch, index: int, which: int, count: int, is_charged: bool) -> None:
        self.ref = weakref.ref(stretch)
        self.index, self.which, self.count, self.is_charged = index, which, count, is_charged

    def leads_to(self) -> Handle | None:
        return None


class Place:
    """A step of a stretch that is about to be taken."""

    __slots__ = ("_index", "_stretch")

    def __init__(self, stretch: Stretch, index: int) -> None:
        self._stretch, self._index = stretch, index

    @property
    def is_anchor(self) -> bool:
        """Whether its charged states are those that its stretch starts from."""
        return self._index == 0 and self._stretch.is_anchored

    def charged(self, h: Tensor, pull: Tensor | None) -> Tensor | None:
        """Leave on what a step saves a way to it; what it has to save as well. The first step of a fresh
        stretch saves its current."""
        if self._index:
            enter(h, self._stretch.member(self._index, 0))
            if pull is not None:
                enter(pull, self._stretch.member(self._index, 1))
            return None
        if self._stretch.is_anchored:
            (anchor,) = self._stretch.hold(h)
            enter(h, anchor)
        return self.alive(h)

    def alive(self, like: Tensor) -> Tensor:
        """What a first step saves for the stretch to stay."""
        alive = like.new_empty(0)
        enter(alive, _Alive(self._stretch))
        return alive

    def left(self, *states: Tensor, charged: bool = False) -> None:
        """Leave on the states after the step a way back to it; ``charged``: they are its charged states.

        Where no tape records, nobody would know of a write to them: the next step is an anchor.
        """
        if tape.current() is None:
            return
        for which, state in enumerate(states):
            enter(state, NewMembrane(self._stretch, self._index, which, len(states), charged))
            if not (charged and self.is_anchor):  # where the tape holds them, it knows
                tape.returns(self._stretch.key(which), state, held=False)


def way_to(state: Tensor) -> Tensor:
    """What to save in place of a state that the user has in hand: of one that a stretch has left, another
    tensor with its values, on which there is a way to them."""
    known = look_up(state)
    stretch = known.ref() if isinstance(known, NewMembrane) else None
    if stretch is None or not known.is_charged:
        return state
    alias = state.detach()
    enter(alias, stretch.way_to(known.index, known.which, state))
    return alias


def place_of_step(
    equations: Equations, states: list[Tensor] | None, currents: list[Tensor], others: list[Tensor]
) -> Place | None:
    """The place of a step on a stretch; None where it has none, and holds what it needs.

    Args:
        equations: of the step.
        states: those that it starts from; None where these are the numbers of a fresh neuron.
        currents: what it adds to them.
        others: what it takes besides.
    """
    if not tape.is_recording():
        return None
    free = all(is_free(look_up(x)) for x in currents)
    before = 0
    stretch = None if states is None else _goes_on(states)
    if stretch is not None:
        before = stretch.end
    if states is None and not free:
        return None
    if stretch is None or not free or stretch.is_full:
        stretch = Stretch(before, states is None)
    elif stretch.is_anchored:
        stretch.hold(*states)  # type: ignore[misc]
    holds = stretch.is_anchored and not stretch.length
    handles = [[] if holds else list(map(tape.handle_of, currents)), list(map(tape.handle_of, others))]
    return stretch.step(equations, *handles)


def _goes_on(states: list[Tensor]) -> Stretch | None:
    """The stretch that has left exactly these, with its last step."""
    stretch = None
    for at, state in enumerate(states):
        known = look_up(state)
        if not isinstance(known, NewMembrane) or not state.requires_grad:
            return None
        if (known.which, known.count) != (at, len(states)):
            return None
        one = known.ref()
        if one is None or known.index != one.length - 1 or (stretch is not None and one is not stretch):
            return None
        stretch = one
    return stretch


def is_free(handle: Any) -> bool:
    """Whether a current can be computed again, from what is stored anyway and no membrane."""
    if handle is None or handle is OUTSIDE or (isinstance(handle, Kept) and not handle.anchored):
        return False
    waiting, seen = [handle], {handle}
    while waiting:
        one = waiting.pop()
        rests = isinstance(one, (_Charged, Passing)) or one.treatment == "reversed"
        if rests or (one is handle and isinstance(one, Kept) and one.outside):
            return False
        for other in one.relies_on():
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return True
