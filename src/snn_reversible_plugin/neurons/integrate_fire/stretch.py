"""Steps of a neuron that a user's loop takes one by one, held as a membrane now and then.

The one idea: what the backward of a step asks for, the charged membrane, follows from the one before it and
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
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Neuron,
    charge,
    fire_reset,
    single_step,
)
from snn_reversible_plugin.tape.handles import Handle, Kept, Passing, peek
from snn_reversible_plugin.tape.origins import OUTSIDE, enter, look_up
from snn_reversible_plugin.tape.replayed import held_in

WithLeak = Callable[[Tensor | None], Neuron]  # a neuron, given the tensor that its leak follows from

# NOTE [Anchors]
#
# 1. A stretch starts from a number, the membrane after a reset, and then its first step saves its
#    current; or with a step that holds its charged membrane. Nothing is run for the first step's own
#    gradient. How many steps a stretch may have grows with those before it, as nobody knows T: they are
#    3, 5, 7, 8, 9, ..., so that 100 steps have 9 anchors, and 16 membranes stand at once.
# 2. The backward asks for the last step of a stretch first. All its charged membranes are computed then,
#    and wait, each for its own step; the first is not among them. A current is computed once for that,
#    and its convolution once more for batch norm's backward: at most twice.
# 3. A step goes on with a stretch where its membrane is the very tensor that the last step left, and gets
#    a gradient. Otherwise (it was detached, changed, used twice) it is an anchor. What nobody told the
#    tape of (`.data`, numpy) is found between two calls by a checksum (`tape.returns`).
# 4. A current that is stored nowhere is no smaller than the membrane: that step is an anchor, too. So is
#    one whose current is the user's own tensor, which a script may fill again, and one that rests on a
#    membrane, because a stretch in a stretch would run again and again.
#
# For example, with T = 8 the anchors are step 4's charged membrane and the membrane after step 8, which the
# neuron holds. The backward of step 8 runs steps 5 to 8 again; 7, 6 and 5 find theirs. That of step 3 runs
# steps 1 to 3, that of step 1 has its current.


class Stretch:
    """Some steps of one neuron, from an anchor.

    Args:
        before: how many steps came before it.
        start: the membrane that it starts from, where that is a number.
    """

    __slots__ = ("__weakref__", "_anchor", "_before", "_members", "_start", "_steps")

    def __init__(self, before: int, start: float | None) -> None:
        self._before, self._start = before, start
        self._anchor: Kept | None = None
        self._steps: list[tuple[WithLeak, Handle | None, Handle | None]] = []
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

    def step(self, with_leak: WithLeak, current: Handle | None, w: Handle | None) -> Place:
        """Take a step; ``current``: None where a charged membrane is held."""
        self._steps.append((with_leak, current, w))
        return Place(self, self.length - 1)

    @property
    def is_anchored(self) -> bool:
        """Whether it starts with a charged membrane that is held."""
        return self._start is None

    def hold(self, h: Tensor) -> None:
        """The first step's charged membrane is the anchor."""
        self._anchor = tape.keep(h)
        enter(h, self._anchor)

    def member(self, index: int, of: type[_Charged]) -> _Charged:
        """A handle for what a step leaves to its backward."""
        one = of(self, index)
        self._members.append(weakref.ref(one))
        return one

    def handles(self, index: int) -> list[Handle]:
        """What the steps up to one rely on."""
        found = [one for _, x, w in self._steps[: index + 1] for one in (x, w) if one is not None]
        return found if self._anchor is None else [self._anchor, *found]

    def run(self, index: int, walk: int) -> tuple[Tensor, Tensor | None]:
        """The charged membrane of a step, and what its leak multiplies.

        Those of the steps before wait for theirs, in this backward, ``walk``.
        """
        waiting: dict[int, list[_Charged]] = {}
        for ref in self._members:
            one = ref()
            if walk != -1 and one is not None and one.index < index and one.walk != walk:
                waiting.setdefault(one.index, []).append(one)
        with_leak, current, w = self._steps[0]
        neuron = with_leak(None if w is None else peek(w))
        if self._anchor is not None:
            _, v = fire_reset(self._anchor.get(False)[0], neuron)
        else:
            assert current is not None
            assert self._start is not None
            x = peek(current)
            _, v, _, _ = single_step(x, torch.full_like(x, self._start), neuron)
            del x
        for at in range(1, index):
            h, pull, neuron = self._charge(at, v)
            for one in waiting.get(at, ()):
                one.wait(h if one.of_membrane else pull, walk)
            _, v = fire_reset(h, neuron)
        return self._charge(index, v)[:2]

    def _charge(self, at: int, v: Tensor) -> Any:
        with_leak, current, w = self._steps[at]
        assert current is not None
        neuron = with_leak(None if w is None else peek(w))
        return *charge(peek(current), v, neuron), neuron


class _Charged(Handle):
    """The charged membrane of a step of a stretch, after the first."""

    treatment = "replayed"
    of_membrane = True
    __slots__ = ("cache", "index", "stretch", "walk")

    def __init__(self, stretch: Stretch, index: int) -> None:
        self.stretch, self.index = stretch, index
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
            value = self._of(self.stretch.run(self.index, walk))
        return self.verified(value, "running its steps again"), True

    def _of(self, found: tuple[Tensor, Tensor | None]) -> Tensor:
        return found[0]

    def relies_on(self) -> Iterable[Handle]:
        return self.stretch.handles(self.index)


class _Pull(_Charged):
    """What the leak multiplies at a step of a stretch, after the first."""

    of_membrane = False
    __slots__ = ()

    def _of(self, found: tuple[Tensor, Tensor | None]) -> Tensor:
        assert found[1] is not None
        return found[1]


class _Alive(Handle):
    """Keeps a stretch for the steps that may follow, as long as the graph holds what its first saved."""

    treatment = "replayed"
    __slots__ = ("stretch",)

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch

    def get(self, last: bool) -> tuple[Tensor, bool]:
        return torch.empty(0), True


class NewMembrane(Passing):
    """The membrane that a step of a stretch has left. Who relies on it keeps it."""

    __slots__ = ("index", "ref")

    def __init__(self, stretch: Stretch, index: int) -> None:
        self.ref = weakref.ref(stretch)
        self.index = index

    def leads_to(self) -> Handle | None:
        return None


class Place:
    """A step of a stretch that is about to be taken."""

    __slots__ = ("_index", "_stretch")

    def __init__(self, stretch: Stretch, index: int) -> None:
        self._stretch, self._index = stretch, index

    def charged(self, h: Tensor, pull: Tensor | None) -> Tensor | None:
        """Leave on what the step saves a way to it; what it has to save as well."""
        if self._index:
            enter(h, self._stretch.member(self._index, _Charged))
            if pull is not None:
                enter(pull, self._stretch.member(self._index, _Pull))
            return None
        if self._stretch.is_anchored:
            self._stretch.hold(h)
        alive = h.new_empty(0)
        enter(alive, _Alive(self._stretch))
        return alive

    def left(self, v: Tensor) -> None:
        """Leave on the membrane after the step a way back to it.

        Where no tape records, nobody would know of a write to it: the next step is an anchor.
        """
        if tape.current() is None:
            return
        enter(v, NewMembrane(self._stretch, self._index))
        tape.returns(self._stretch, v, held=False)


def place_of_step(v: Tensor | float, x: Tensor, with_leak: WithLeak, w: Tensor | None) -> Place | None:
    """The place of a step on a stretch; None where it has none, and holds what it needs."""
    if not tape.is_recording():
        return None
    free = is_free(look_up(x))
    before, known = 0, look_up(v) if isinstance(v, Tensor) else None
    if isinstance(known, NewMembrane):
        stretch = known.ref()
        if stretch is not None and known.index == stretch.length - 1 and v.requires_grad:  # type: ignore[union-attr]
            before = stretch.end
            if free and not stretch.is_full:
                return stretch.step(with_leak, tape.handle_of(x), None if w is None else tape.handle_of(w))
    if not isinstance(v, Tensor) and not free:
        return None
    stretch = Stretch(before, None if isinstance(v, Tensor) else v)
    current = None if isinstance(v, Tensor) else tape.handle_of(x)
    return stretch.step(with_leak, current, None if w is None else tape.handle_of(w))


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
