"""The tape: what autograd saves is stored as a handle that can rebuild it. These verbs are all of it.

A neuron is an autograd function that saves its input with ``ctx.save_for_backward``, as any other; under
:class:`recording` that stores a handle. It does its arithmetic under :func:`paused`, vouches for its
spikes with :func:`mark_spikes`, and may overwrite what it :func:`owns`. Files: ``tape`` records,
``recipes`` decides what is worth a recipe, ``operators`` knows which operators can run again, ``handles``
rebuild, ``origins`` leads from a live tensor to its handle, ``surroundings`` says where stock has to run.

Example:
    The history of one tensor. A comparison gives a truth value, of which bits are stored; the cast to float
    and the product are written down, and hold nothing but what leads to those bits and to the weight.

    >>> import torch
    >>> from snn_reversible_plugin import tape
    >>> from snn_reversible_plugin.tape.origins import look_up
    >>> x, weight = torch.arange(8.0).reshape(2, 4), torch.ones(4, 3, requires_grad=True)
    >>> with tape.recording():
    ...     spikes = x.gt(2.5).float()
    ...     current = spikes @ weight
    ...     loss = (current * current).sum()  # the product saves `current`, and gets its handle
    >>> handle = look_up(current)
    >>> handle, handle.func, [operand.treatment for operand in handle.operands()]
    (<...Replayed ...>, <OpOverload(op='aten.mm', overload='default')>, ['replayed', 'kept'])
    >>> (cast,) = [one for one in handle.operands() if one.treatment == "replayed"]
    >>> [bits.treatment for bits in cast.operands()]
    ['packed']

    The tensors may go. The backward unpacks the bits, casts, multiplies, and lets the values go again.

    >>> expected = 2 * spikes.t() @ current.detach()
    >>> del spikes, current
    >>> loss.backward()
    >>> torch.equal(weight.grad, expected), handle.cache
    (True, None)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from snn_reversible_plugin.ops.interrupts import Left, Restoring, put_back_interrupted
from snn_reversible_plugin.tape.exposed import look_again, sum_later
from snn_reversible_plugin.tape.findings import Observer
from snn_reversible_plugin.tape.handles import ComputedState, Handle, Kept, owns, peek, unpack
from snn_reversible_plugin.tape.mode import Rule
from snn_reversible_plugin.tape.off_stack import OffStack, set_compiler
from snn_reversible_plugin.tape.on_stack import OnThread, has_others
from snn_reversible_plugin.tape.operators import aten, operator_of
from snn_reversible_plugin.tape.origins import OUTSIDE, enter, look_up
from snn_reversible_plugin.tape.outlived import forget_spent_graphs
from snn_reversible_plugin.tape.packed import Packed, PackedLevels
from snn_reversible_plugin.tape.plans import Plans
from snn_reversible_plugin.tape.recipes import WORK_LIMIT
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.returned import let_go_of_returned, note_returned
from snn_reversible_plugin.tape.sliced.alone import is_alone, references, try_out
from snn_reversible_plugin.tape.sliced.between import Between
from snn_reversible_plugin.tape.sliced.cut import Cut
from snn_reversible_plugin.tape.sliced.norm_sums import SumsForNorm, sums_for_norm
from snn_reversible_plugin.tape.sliced.stand_in import cut_of
from snn_reversible_plugin.tape.sliced.stand_in import unpack as unpack_in_slices
from snn_reversible_plugin.tape.surroundings import runs_eagerly, to_be_repeated
from snn_reversible_plugin.tape.tape import Tape

__all__ = [
    "MODES",
    "MOST_COUNTS",
    "Cut",
    "SumsForNorm",
    "between",
    "current",
    "cut_of",
    "hand_over",
    "handle_of",
    "is_alone",
    "is_left_to_others",
    "is_recording",
    "keep",
    "let_go",
    "mark_levels",
    "mark_opaque",
    "mark_put_together",
    "mark_spikes",
    "mark_state",
    "may_be_replaced",
    "may_promise",
    "may_record",
    "mode_inside",
    "overriding",
    "owns",
    "pack",
    "paused",
    "peek",
    "recording",
    "references",
    "returns",
    "runs_eagerly",
    "saves",
    "set_compiler",
    "sums_for_norm",
    "suspended",
    "takes",
    "to_be_repeated",
    "try_out",
]

MODES = tuple(WORK_LIMIT)
MOST_COUNTS = 12

_local = threading.local()


def current() -> Tape | None:
    """The tape of this thread, if any."""
    return getattr(_local, "tape", None)


class recording(Restoring):
    """Context manager: a tape records on this thread.

    Inside another recording, under ``no_grad``, and where the stock network has to be seen
    (:func:`runs_eagerly`: compilers, tracers, ``torch.func``, counters of operations), it does nothing.

    Args:
        mode: ``"memory"`` replays everything replayable, ``"speed"`` what needs no convolution and no
            matrix product; ``"minimal"`` does as ``"memory"``, the large layers a slice at a time.
        check: compare each rebuilt tensor with a checksum from the forward.
        observer: is told of each saved tensor.
        plans: of the model that runs: which products are kept, by what its earlier forwards took.
        forgets_states: whether nobody reads the states that a block leaves when a backward rebuilds it.

    Raises:
        ValueError: an unknown mode.
    """

    __slots__ = ("_following", "_look", "_tape", "check", "forgets_states", "mode", "observer", "plans")

    def __init__(
        self,
        mode: str = "memory",
        *,
        check: bool = False,
        observer: Observer | None = None,
        plans: Plans | None = None,
        forgets_states: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
        self.mode, self.check, self.observer, self.plans = mode, check, observer, plans
        self.forgets_states = forgets_states

    def __enter__(self) -> Tape | None:
        self._tape: Tape | None = None
        self._look: Any = None
        put_back_interrupted()
        if current() is not None or not may_record():
            return current()
        look_again()
        forget_spent_graphs()
        # A block that a backward rebuilds is no forward of the model's.
        planned = self.plans is not None and torch._C._current_graph_task_id() == -1
        self._following = self.plans.begin() if planned and self.plans is not None else None
        tape = Tape(self.mode, self.check, self.observer, self._following)
        tape.may_promise |= self.forgets_states
        following = self._following
        measured = None if following is None else following.measure()
        look: Any = unpack_in_slices if self.mode == "minimal" else unpack
        if measured is not None:
            look = measured.unpacking(look)
        look = self._look = partial(look)  # this recording's own, which what autograd saves keeps alive
        on_thread = OnThread(tape, (tape.pack, look))

        def put_back(how: Left) -> None:
            _local.tape = None
            if following is not None and how is not Left.PLAINLY:  # what leaves copies states, which counts
                following.computed_all()
            on_thread.take_off(how is Left.BY_EXCEPTION)

        self.taking(put_back)
        try:
            on_thread.put_on()
            _local.tape = tape
        except BaseException:
            self.put_back(True)
            raise
        self._tape = tape
        return tape

    def __exit__(self, *exc: object) -> None:
        if self._tape is None:
            return
        try:
            self.put_back(exc[0] is not None)
            if self._tape.slices is not None:
                self._tape.slices.between.end()
            self._tape.finish(let_go_of_returned(self._tape), self._look)
            self._tape = self._look = None
        finally:
            if self._following is not None:
                self._following.computed_all()
        if self._following is not None:
            self._following.finish(failed=exc[0] is not None)


def may_record() -> bool:
    """Whether a graph that a tape could serve is being built here."""
    return torch.is_grad_enabled() and runs_eagerly()


def is_recording(eagerly: bool = False) -> bool:
    """Whether a tape records what is computed here, and a graph is being built that will want it.

    ``eagerly``: the caller has found that it :func:`runs_eagerly`.
    """
    tape = current()
    if tape is None or tape.keeps_everything or not torch.is_grad_enabled():
        return False
    return (eagerly or runs_eagerly()) and not has_others(tape.pack)


def is_left_to_others() -> bool:
    """Whether autograd saves by hooks of somebody else's here: a checkpoint's, say, which runs a part again
    off the tape, and wants as many tensors then, of the same sizes."""
    tape = current()
    return has_others(None if tape is None else tape.pack)


def saves() -> bool:
    """Whether a tape is given what autograd saves here."""
    tape = current()
    return tape is not None and not has_others(tape.pack)


def may_promise() -> bool:
    """Whether a tape records, and not a block that a backward rebuilds, whose states are read at once."""
    tape = current()
    if tape is None or tape.keeps_everything or not tape.may_promise:
        return False
    return not has_others(tape.pack)


def mode_inside(mode: str) -> str:
    """The mode of a tape for a block that is rebuilt: "minimal" where all around it is."""
    tape = current()
    return mode if tape is None or tape.slices is None else "minimal"


def between() -> Between | None:
    """What is handed on between the layers of a Sequential, where that matters."""
    tape = current()
    return None if tape is None or tape.slices is None else tape.slices.between


def may_be_replaced(x: torch.Tensor) -> bool:
    """Whether what is computed from a tensor may take its place: see :mod:`.tape.sliced.between`."""
    tape = current()
    return tape is not None and tape.slices is not None and tape.slices.may_be_replaced(x)


def let_go(x: torch.Tensor) -> None:
    """Say that a layer has copies of its input, whose bytes may go where nobody else uses them."""
    if (handed_on := between()) is not None:
        handed_on.let_go(x)


def suspended() -> AbstractContextManager[None]:
    """Inside, the tape keeps everything: for a part of a network that must not be replayed."""
    tape = current()
    return nullcontext() if tape is None else tape.suspended()


def paused() -> OffStack:
    """Context manager: operations inside are not recorded. For a neuron's own arithmetic.

    What they make counts as coming from outside, until :func:`mark_spikes` or :func:`mark_opaque`.
    """
    tape = current()
    return OffStack(None) if tape is None else tape.paused()


@contextmanager
def overriding(rules: dict[Any, Rule]) -> Iterator[None]:
    """Inside, rules run these operators in place of the tape, where there is one."""
    tape = current()
    if tape is None:
        yield
        return
    with tape.overriding(rules):
        yield


def pack(tensor: torch.Tensor) -> Handle:
    """What autograd would be given to store a tensor: for one who will ``unpack`` it, once.

    Under a tape, as :func:`handle_of` and :func:`keep`.
    """
    return _tape().pack(tensor)


def handle_of(tensor: torch.Tensor) -> Handle:
    """A handle for one who may have to compute something again, and then looks at it by :func:`peek`."""
    tape = _tape()
    with OffStack(tape):
        return tape.handle_of(tensor)


def keep(tensor: torch.Tensor) -> Kept:
    """A handle that keeps a tensor as it is now, for one who must not rebuild it."""
    return _tape().keep(tensor)


def hand_over(tensors: Iterable[torch.Tensor]) -> None:
    """Say that somebody may write to tensors from here on, and that nobody will see it.

    What relies on them is copied, and what is known of them forgotten.
    """
    tape = current()
    if tape is None:
        return
    with OffStack(tape):
        for tensor in tensors:
            tape.before_write(tensor)
            if look_up(tensor) is not OUTSIDE:
                enter(tensor, None)


def returns(key: object, state: torch.Tensor, taken: int = 1, held: bool = True) -> None:
    """Say that steps have left a state with the user, who may write to it once this recording is over.

    ``key``: whose state it is; ``taken``: how many steps; ``held``: the tape holds it as well.
    """
    if current() is None:
        if not held:  # it was promised, and somebody reads it between two recordings
            sum_later(state, [])
        return
    note_returned(key, state, taken, held)


def takes(size: float, lives: Iterable[torch.Tensor] = ()) -> None:
    """Say that the backward of what runs now will have so many bytes alive; infinity where nobody knows.

    ``lives``: parameters and buffers of it that no recorded operation meets.
    """
    tape = current()
    if tape is not None and tape.sizes is not None:
        tape.sizes.takes(size, lives)


def mark_spikes(spikes: torch.Tensor) -> None:
    """Vouch that a tensor holds zeros and ones by construction: one bit when something saves it."""
    if current() is not None:
        enter(spikes, Packed())


def mark_levels(counts: torch.Tensor, high: int) -> None:
    """Vouch that a tensor holds whole numbers from 0 to ``high``, at most ``MOST_COUNTS``, by construction:
    two to four bits an element when something saves it."""
    if current() is not None:
        enter(counts, PackedLevels(0, high))


def mark_opaque(*tensors: torch.Tensor) -> None:
    """Say that tensors were computed under :func:`paused`: they have no recipe, and cost memory."""
    if current() is not None:
        for tensor in tensors:
            enter(tensor, None)


def mark_put_together(out: torch.Tensor, parts: Sequence[torch.Tensor], dim: int) -> None:
    """Say that what was computed under :func:`paused` is parts put together, which somebody holds anyway,
    and will write over in a backward when nobody else does."""
    if (tape := current()) is not None:
        tape.record(aten.cat.default, operator_of(aten.cat.default), ([*parts], dim), {}, out)
        recipe = look_up(out)
        for part in recipe.operands() if isinstance(recipe, Replayed) else ():
            if isinstance(part, Kept):
                part.goes = True


def mark_state(key: object, state: torch.Tensor) -> None:
    """Say that a tensor that was recorded is a state, and in the user's hands: :func:`returns` it."""
    recipe = None if current() is None else look_up(state)
    if isinstance(recipe, Replayed):
        enter(state, ComputedState(recipe))
        returns(key, state, held=False)


def _tape() -> Tape:
    tape = current()
    if tape is None:
        raise RuntimeError("no tape records on this thread: ask tape.is_recording() first")
    return tape
