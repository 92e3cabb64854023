"""What one layer hands on to the next, and nobody reads again: it need not stand as it is.

The one idea: a layer that is the last to use its input has it to itself. So spikes may be bits while it
runs, and a batch norm's result, or a neuron's spikes, may take the place of what they were computed from.

Source: this package's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.ops.layouts import is_plain, storage_key
from snn_reversible_plugin.tape.off_stack import OffStack
from snn_reversible_plugin.tape.on_stack import are_on_top
from snn_reversible_plugin.tape.operators import Kind, aten, operator_of
from snn_reversible_plugin.tape.origins import enter, look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.recipes import tensors_among
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced.alone import is_alone, learn, references
from snn_reversible_plugin.tape.sliced.rows import Part, Whole, rows_of

if TYPE_CHECKING:
    from snn_reversible_plugin.tape.tape import Tape

# NOTE [What is handed on]
#
# 1. It is nobody else's where a layer's caller reads it no more (`modules/last_use.py`), and its counts are
#    those of a value that this caller holds alone: one that a hook, a list or a node of the graph holds as
#    well, or a part of it, counts more. What a tape keeps it holds too.
# 2. The layer that takes it is one whose code is known: a convolution, batch norm or pooling of torch's or
#    made of it, which read a tensor by operators and in no other way, or a neuron or chain that asks. No
#    mode of somebody else's looks on, and autograd saves by the tape's hooks.
# 3. Spikes that are in bits have a storage without bytes. Views of them are made as ever; a convolution
#    whose slices are known to have the bits of the whole unpacks a slice at a time; for any other operator,
#    and for a layer that is not known, they are unpacked first, in place.
# 4. A result takes its input's place only where the input is a recipe that was shown to be exact in slices:
#    whoever asks later computes it, and it was compared while it stood. So the first time of a shape runs
#    as if nobody handed anything on.
#
# For example, convolution, batch norm, neuron, convolution with tensors of n bytes: the norm writes over
# the convolution's result, the neuron its spikes over that, which become n / 32 of bits before the next
# convolution has its result. So n and bits stand, and never 2 n.


POOLINGS = frozenset(
    [aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.max_pool2d_with_indices.default]
)
TAKE_BITS = POOLINGS | {aten.convolution.default}
LEAST = 4  # slices: what is smaller than as many of the smallest is handed on as it is


class _GivenUp(NamedTuple):
    """What a layer is the last to use: its storage, whether the layer reads it itself, and whether nobody
    can look at it any more."""

    storage: int
    by_itself: bool
    at_once: bool


class _InBits:
    """A storage without bytes, of spikes and of views of them; ``nbytes``: those that it had.

    It is held, so that no other gets its address.
    """

    __slots__ = ("handle", "nbytes", "storage", "tensors")

    def __init__(self, spikes: Tensor, handle: Packed) -> None:
        self.handle, self.storage = handle, spikes.untyped_storage()
        self.nbytes = self.storage.nbytes()
        self.tensors = [weakref.ref(spikes)]

    def live(self) -> list[Tensor]:
        """Those of the tensors that are alive."""
        return [one for ref in self.tensors if (one := ref()) is not None]


class Between:
    """What is handed on in one recording.

    Args:
        tape: the recording.
        step_of: bytes of a slice.
        check: somebody compares what operators took with what it was, later.
    """

    def __init__(self, tape: Tape, step_of: Callable[[int, torch.device], int], check: bool) -> None:
        self._tape: Callable[[], Tape | None] = weakref.ref(tape)
        self._step_of, self._check = step_of, check
        self._given_up: _GivenUp | None = None
        self._gone: tuple[torch.UntypedStorage, int] | None = None  # what a layer has copied, and its bytes
        self._in_bits: dict[int, _InBits] = {}  # by storage
        self._trying: Any = None  # the way whose counts are being learned

    # -- for the layers --------------------------------------------------------------------------

    def is_worth(self, value: Any) -> bool:
        """Whether it matters what becomes of a value."""
        self._given_up = None
        if self._trying is not None:
            return True
        return (
            isinstance(value, Tensor)
            and is_plain(value)
            and value.nbytes >= LEAST * self._step_of(0, value.device)
            and not self._is_watched()
        )

    def take(self, value: Tensor, layer: Any, way: Any, calls: Callable[..., None]) -> None:
        """A layer is about to take what its caller has no more use for.

        Args:
            value: which tensor.
            layer: reads it by operators of torch alone, or itself, and then ``may_write_over_input``.
            way: how the call came. Who calls in one has as many references.
            calls: makes some in a way, with this object and an input.
        """
        if self._trying is not None:
            if way == self._trying:
                is_alone(way, references(value))
            return
        if not is_alone(way, references(value)):
            self._learn(way, calls)
            return
        handle, by_itself = look_up(value), getattr(layer, "may_write_over_input", False)
        if isinstance(handle, Replayed):
            self._given_up = _GivenUp(storage_key(value), by_itself, way.at_once)
        elif type(handle) is Packed and way.at_once and value._base is None and not by_itself:
            self._leave_bits(value, handle)

    def _learn(self, way: Any, calls: Callable[..., None]) -> None:
        """What counts are of one reference, for the next call that comes in a way."""
        self._trying = way
        try:
            learn(way, partial(calls, way, self))
        finally:
            self._trying = None

    def taken(self, value: Any, failed: bool) -> None:
        """The layer has returned, and who called it reads the value no more; or it failed."""
        self._given_up = None
        if self._trying is not None or not (self._in_bits or self._gone) or not isinstance(value, Tensor):
            return
        key = storage_key(value)
        if self._gone is not None and self._gone[0]._cdata == key:
            self._bring_back(failed)
        found = self._in_bits.get(key)
        if found is not None and (failed or any(one is not value for one in found.live())):
            self.unpack(value)
        self._in_bits.pop(key, None)

    def end(self) -> None:
        """The recording is over, perhaps by an interrupt, of which no layer hears."""
        self._bring_back(True)
        for found in list(self._in_bits.values()):
            for one in found.live():
                self.unpack(one)

    def _bring_back(self, failed: bool) -> None:
        if failed and self._gone is not None:  # for who looks at it then: of any value
            self._gone[0].resize_(self._gone[1])
        self._gone = None

    def _is_watched(self) -> bool:
        """Whether the values are somebody else's to see, or nothing is recorded of them."""
        tape = self._tape()
        if tape is None or self._check or tape.keeps_everything or not torch.is_grad_enabled():
            return True
        if not are_on_top(tape.pack):
            return True
        return torch._C._len_torch_dispatch_stack() != 1 or torch._C._len_torch_function_stack() > 0  # type: ignore[attr-defined]

    def is_given_up(self, value: Tensor, by_itself: bool) -> bool:
        """Whether what a layer computes from a value, itself or by operators, may take its place, as far as
        others are concerned."""
        if self._given_up is None or (storage_key(value), by_itself) != self._given_up[:2]:
            return False
        return isinstance(look_up(value), Replayed)

    def let_go(self, value: Tensor) -> None:
        """The layer has a copy of a value, whose bytes may go if it is the last to use them."""
        storage = value.untyped_storage()
        given = self._given_up == (storage_key(value), True, True)
        if given and storage.resizable() and self._gone is None:
            self._gone = storage, storage.nbytes()
            storage.resize_(0)

    # -- spikes in bits ------------------------------------------------------------------------------

    def _leave_bits(self, spikes: Tensor, handle: Packed) -> None:
        with OffStack(self._tape()):
            handle.materialize(spikes)
            if not spikes.untyped_storage().resizable():
                return
            found = self._in_bits[storage_key(spikes)] = _InBits(spikes, handle)
            found.storage.resize_(0)
            enter(spikes, handle)

    def unpack(self, tensor: Tensor) -> None:
        """Let a tensor have its bytes again, if it is without."""
        found = self._in_bits.pop(storage_key(tensor), None) if self._in_bits else None
        if found is None:
            return
        live, handle = found.live(), found.handle
        known = [look_up(one) for one in live]
        with OffStack(self._tape()):
            found.storage.resize_(found.nbytes)
            flat = torch.empty(0, dtype=handle.dtype, device=tensor.device)
            handle.unpack_range(0, flat.set_(found.storage, 0, (handle.size.numel(),), (1,)))
        for one, handle_of_one in zip(live, known, strict=True):
            enter(one, handle_of_one, one._base)

    def are_in_bits(self, tensor: Any) -> bool:
        """Whether a tensor is without its bytes."""
        return isinstance(tensor, Tensor) and is_plain(tensor) and storage_key(tensor) in self._in_bits

    @property
    def holds_bits(self) -> bool:
        """Whether anything is without its bytes."""
        return bool(self._in_bits)

    def rows(self, tensor: Tensor, part: Part) -> Tensor:
        """Rows of a tensor, whether it has its bytes or not."""
        if self.are_in_bits(tensor):
            try:
                return rows_of(look_up(tensor), part, {})
            except Whole:
                self.unpack(tensor)
        return part.of(tensor)

    def before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], by_others: bool) -> None:
        """An operator is about to run, perhaps by others: what it can't take in bits is unpacked."""
        takes_bits = func in TAKE_BITS and not (kwargs or by_others)
        if takes_bits or operator_of(func).kind is Kind.VIEW:
            return
        for one in tensors_among(args, kwargs):
            if is_plain(one):
                self.unpack(one)

    def viewed(self, base: Tensor, out: Any) -> None:
        """A view was made."""
        found = self._in_bits.get(storage_key(base)) if is_plain(base) else None
        if found is not None and isinstance(out, Tensor):
            found.tensors.append(weakref.ref(out))
