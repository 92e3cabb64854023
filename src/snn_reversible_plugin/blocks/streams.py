"""An ordinary residual stream, reversed: each block's input is the next one's minus the branch.

The one idea: x_n = x_{n+1} - branch_n, where the branch is replayed from its spikes anyway, because its own
backward needs it. On the dyadic grid that is exact, so of all the copies of a stream that a stage of
blocks makes the last is held and no other. No second stream, no change of architecture.

Source: this package's own. The grid is :mod:`snn_reversible_plugin.grid`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from snn_reversible_plugin.grid import reach, watch
from snn_reversible_plugin.ops.layouts import with_strides
from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.operators import Kind, Operator, aten, operator_of
from snn_reversible_plugin.tape.origins import enter, look_up, written
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced.cut import Cut
from snn_reversible_plugin.tape.sliced.rows import by_element
from snn_reversible_plugin.tape.tape import Tape

# NOTE [Undoing a sum]
#
# 1. A sum y = x + b of a stream and a branch is computed as x + snap(b). Autograd sits above, and sees a
#    sum: the gradient passes straight through the rounding.
# 2. Once y is known, x's handle lets go of x and becomes "y minus the branch". Who holds the handle
#    already, because autograd saved x, need not be told.
# 3. Not where the branch's recipe itself leads back to a stream: there would be no way out of the circle.
#    A branch that starts with a neuron ends at its spikes.
# 4. The branch's last convolution is wanted twice in a block's backward: by its own batch norm, early, and
#    for x, late. So it tells x when its value stands (`Replayed.awaited`), and x is computed then, in
#    the place of y, which nobody needs any more.
# 5. Once x stands, y need not. So x forgets y, and finds it again, for a second backward, only as long as
#    autograd holds on to it too.
# 6. A stream must stay below the grid's limit. What is rebuilt is looked at when the backward ends
#    (grid, note 3), in one wait for the device.

BITS = 16
SNAP = Operator(Kind.PURE, "snap", inplace=True)
SUMS = {aten.add.Tensor: False, aten.add_.Tensor: True}  # whether it writes into its first argument


class Stream(Replayed):
    """The handle of a stream: the tensor itself, until the sum after it is known."""

    __slots__ = ("_before", "_cut", "_stride", "_total", "_undoing", "anchor", "where")

    def __init__(self, anchor: Handle, stride: tuple[int, ...], where: str) -> None:
        super().__init__(aten.sub.Tensor, (None, None), {})
        self.anchor: Handle | None = anchor
        self.where = where
        self._stride = stride
        self._undoing = False
        self._cut: Cut | None = None
        self._total: Callable[[], Stream | None] = _nothing
        self._before: Callable[[], Stream | None] = _nothing

    @property
    def treatment(self) -> str:  # type: ignore[override]
        return "reversed" if self.anchor is None else self.anchor.treatment

    def relies_on(self) -> Iterable[Handle]:
        return self.operands() if self.anchor is None else (self.anchor,)

    def need(self) -> None:
        super().need()
        if self.anchor is not None:
            self.anchor.need()

    def undo(self, total: Stream, branch: Replayed, cut: Cut | None = None) -> None:
        """From now on be ``total - branch``; ``cut``: of the branch, if it may be rebuilt in slices."""
        self.anchor, self.args, self._cut = None, (total, branch), cut
        self._total, total._before = weakref.ref(total), weakref.ref(self)
        if self.needs:
            self.claiming = True
            total.need()
            branch.need()
        for handle in _down_to_work(branch):
            handle.awaited = partial(_arrive, weakref.ref(self))

    def arrive(self) -> None:
        """Part of the branch stands, and somebody else waits for it too: a good time to be computed."""
        if not self.needs or self.cache is not None or self._undoing:
            return
        total = self._total()
        if total is not None and (total.anchor is not None or total.cache is not None):
            self.get(False)

    def get(self, last: bool) -> tuple[torch.Tensor, bool]:
        waited_for = self._stay()
        if self.anchor is not None:
            return self.anchor.get(last)
        if self.cache is not None:
            return self.cache, last and not waited_for
        value, below = self._nearest()
        owned = False
        for stream in reversed(below):
            value = stream._undone(value, owned)
            owned = not stream._stay() and not (stream.needs - (stream is self and last))
            if not owned:
                stream.cache = value
        return value, owned

    def at_hand(self) -> torch.Tensor | None:
        return self.cache if self.anchor is None else self.anchor.peek()

    def release(self) -> None:
        if self.needs:
            self.needs -= 1
        if not self.needs and not self._stay():
            self.cache = None
            self.drop_claims()
        if self.anchor is not None:
            self.anchor.release()

    def _stay(self) -> bool:
        """Let the one before hold on to this one, if it waits for it; in a second backward it may."""
        before = self._before()
        if before is None or before.anchor is not None or before.cache is not None:
            return False
        if before._undoing:
            return False
        before.args = (self, before.args[1])
        return True

    def _leave(self) -> None:
        """The one before stands."""
        if not self.needs:
            self.cache = None

    def peek(self) -> torch.Tensor:
        if self.anchor is not None:
            return self.anchor.peek()
        if self.cache is not None:
            return self.cache
        value, below = self._nearest()
        for stream in reversed(below):
            value = with_strides(value - stream.args[1].peek(), stream._stride)
        return value

    def _nearest(self) -> tuple[torch.Tensor, list[Stream]]:
        """The nearest sum above that stands, and the streams from it down to this one.

        Without recursion: a stage may be long.
        """
        below: list[Stream] = []
        stream = self
        while stream.anchor is None and stream.cache is None:
            below.append(stream)
            total = stream._total()
            if total is None:
                raise RuntimeError(
                    f"{stream.where}: trying to backward through a residual block a second time, and what "
                    "its input is undone from has been freed. Use retain_graph=True in the first backward."
                )
            stream = total
        value, _ = stream.get(False)
        if below and stream.anchor is not None:
            _watch(stream.where, value)
        return value, below

    def _undone(self, total: torch.Tensor, owned: bool) -> torch.Tensor:
        above, recipe = self.args
        self._undoing = True
        try:
            if self._cut is not None and not recipe.stands():
                value = self._undone_in_slices(self._cut, total, owned)
            else:
                value = self._undone_at_once(recipe, total, owned)
            self.drop_claims()
        finally:
            self._undoing = False
        self.args = (None, recipe)
        above._leave()
        _watch(self.where, value)
        return self.verified(value, "undoing a residual sum")

    def _undone_at_once(self, recipe: Replayed, total: torch.Tensor, owned: bool) -> torch.Tensor:
        branch, replaceable = recipe.get(recipe.needs <= 1)
        if replaceable and branch.stride() == self._stride:
            return torch.sub(total, branch, out=branch)
        if owned and total.stride() == self._stride:
            return torch.sub(total, branch, out=total)
        return with_strides(total - branch, self._stride)

    def _undone_in_slices(self, cut: Cut, total: torch.Tensor, owned: bool) -> torch.Tensor:
        value = total if owned and total.stride() == self._stride else cut.empty(self._stride)
        for part in cut.exact_parts():
            part.put(part.of(total) - cut.rows(part), value)
        return value


def _arrive(ref: Callable[[], Stream | None]) -> None:
    stream = ref()
    if stream is not None:
        stream.arrive()


class ResidualSums:
    """Runs a block's sums of a stream and a branch on the grid, under a tape, and lets them be undone.

    Args:
        name: the block's, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, tape: Tape, x: torch.Tensor) -> Stream:
        """Treat a tensor as a residual stream from now on. It has to be on the grid."""
        anchor = look_up(x)
        if tape.work_limit or not isinstance(anchor, Replayed):
            anchor = tape.keep(x)
        stream = Stream(anchor, x.stride(), self.name)
        enter(x, stream)
        return stream

    def __call__(
        self, tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """An addition, or None: it is one like any other."""
        at = stream_sum(func, args, kwargs, is_stream)
        if at is None:
            return None
        x, before = args[at], look_up(args[at])
        branch = snapped(args[1 - at])
        tape.record(snap_again, SNAP, (args[1 - at],), {}, branch)
        recipe = look_up(branch)
        total = x + branch
        tape.record(aten.add.Tensor, operator_of(aten.add.Tensor), (x, branch), {}, total)
        after = self.start(tape, total)
        if tape.work_limit and recipe is not None and not leads_to_a_stream(recipe):
            cut = None if tape.slices is None else tape.slices.exactly(recipe, branch)
            before.undo(after, recipe, cut)
        if not SUMS[func]:
            return total  # type: ignore[no-any-return]
        tape.before_write(args[0])
        args[0].copy_(total)
        enter(args[0], after)
        written(args[0])
        return args[0]  # type: ignore[no-any-return]


def is_stream(value: Any) -> bool:
    """Whether a tensor is a residual stream."""
    return isinstance(value, torch.Tensor) and isinstance(look_up(value), Stream)


def stream_sum(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_stream: Callable[[Any], bool]
) -> int | None:
    """Which argument of an addition is a stream that the other, a branch, is added to; None: it is no such
    sum, or one that is written into a tensor of too few digits."""
    if kwargs or len(args) != 2:
        return None
    at = 0 if is_stream(args[0]) else 1
    x, branch = args[at], args[1 - at]
    fits = (
        is_stream(x)
        and isinstance(branch, torch.Tensor)
        and branch.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and branch.shape == x.shape
        and not is_stream(branch)
        and not (SUMS[func] and args[0].dtype is not torch.float32)
    )
    return at if fits else None


def snapped(branch: torch.Tensor) -> torch.Tensor:
    """The branch on the grid, as a new tensor."""
    return _snap_(branch.float() if branch.dtype is not torch.float32 else branch.clone())


@by_element
def snap_again(branch: torch.Tensor) -> torch.Tensor:
    """The same in a backward, where the branch is the caller's to overwrite."""
    return _snap_(branch.float())


def _snap_(branch: torch.Tensor) -> torch.Tensor:
    return branch.mul_(2.0**BITS).round_().mul_(2.0**-BITS)


def _nothing() -> None:
    return None


def leads_to_a_stream(handle: Handle) -> bool:
    """Whether a recipe, down to what is stored, uses a stream."""
    if isinstance(handle, Stream):
        return True
    return isinstance(handle, Replayed) and any(map(leads_to_a_stream, handle.operands()))


def _down_to_work(handle: Handle) -> Iterator[Replayed]:
    """A branch's recipe from its end down to its last convolution or matrix product."""
    while isinstance(handle, Replayed) and handle.work:
        yield handle
        below = [operand for operand in handle.operands() if isinstance(operand, Replayed) and operand.work]
        if sum(operand.work for operand in below) < handle.work:
            return
        handle = below[0]


def _watch(where: str | None, stream: torch.Tensor) -> None:
    watch(where or "a residual stream", reach(stream), BITS)
