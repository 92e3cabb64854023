"""What of a forward's saved tensors is cut, where, and the proof that slices are the forward's bits.

The one idea: whether a kernel gives rows of a batch the same bits alone as among others is not promised
anywhere, but depends on sizes and never on values. So the first time that something of a size is saved,
while it still stands, its first and its last slice are computed from the recipe and compared.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.ops.layouts import is_dense, is_plain, storage_key
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.off_stack import OffStack
from snn_reversible_plugin.tape.operators import Kind, Operator, aten
from snn_reversible_plugin.tape.origins import look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import PLAIN, Replayed
from snn_reversible_plugin.tape.sliced import forward, norm
from snn_reversible_plugin.tape.sliced.alone import try_out_operators
from snn_reversible_plugin.tape.sliced.between import POOLINGS, Between
from snn_reversible_plugin.tape.sliced.groups import groups_of
from snn_reversible_plugin.tape.sliced.noted import Noted, note, note_taken, size_of
from snn_reversible_plugin.tape.sliced.room import Room
from snn_reversible_plugin.tape.sliced.rows import MOST_OPERATIONS, Part, Whole, rows_of
from snn_reversible_plugin.tape.sliced.sources import last_product

# NOTE [What is cut]
#
# 1. Slices take time, and what they save is a few tensors of the layer's size and of those that it is
#    rebuilt from. So a layer is cut if it is large in itself, and beside the largest one: of one that is
#    SMALL times smaller, all that can stand at once is less than what the largest has to have whole.
# 2. A neuron fires or not by the last bit of its current. So it takes slices that were shown to be the
#    forward's bits and no others. A gradient may take slices that are equal to rounding.
# 3. A forward's sizes, kernels and threads decide, so that is what a proof holds for.
# 4. A single row is often a kernel's special case. No slice is one row where there are others.
# 5. What is neither is no slice at all: the tensor is rebuilt as one, as in mode "memory".
# 6. A slice is a share of what it is cut from: what a kernel makes of one is little beside the layer, in a
#    small network as in a large one. Not more than its caches hold, and not so little that calls take over.

STEP = {"cpu": 1 << 20}  # the most bytes of a slice
LARGE_STEP = 1 << 25
SHARE = 16  # slices of what is smaller than as many of these
LEAST = 16  # of those bytes, a slice has a sixteenth at least
SMALL = 32
CLOSE = 1e-3  # of the largest value: nothing that merely rounds is further off
_proved: dict[Any, bool | None] = {}


def step_of(nbytes: int, device: torch.device) -> int:
    """How many bytes a slice of so many has: a share, so that slices are small beside any layer."""
    most = STEP.get(device.type, LARGE_STEP)
    return min(most, max(nbytes // SHARE, most // LEAST))


def is_few_slices(tensor: Tensor) -> bool:
    """Whether its slices are the smallest: what one of them spares is little, and calls cost as much."""
    return _is_small(tensor, SHARE)


def _is_small(tensor: Tensor, slices: int = 1) -> bool:
    """Whether it is not as many of the smallest slices."""
    # As step_of(0) says, which is asked for each tensor that anything is done with: without another call.
    return tensor.nbytes < slices * (STEP.get(tensor.device.type, LARGE_STEP) // LEAST)


class Cut(Handle):
    """A handle whose value may be had a part at a time.

    ``groups``: how many groups of how many rows it is. ``exact``: in which of its ways its parts are the
    forward's, bit for bit.
    """

    __slots__ = ("_slices", "device", "dtype", "exact", "groups", "handle", "released", "size", "stride")

    def __init__(self, handle: Handle, tensor: Tensor, groups: tuple[int, int], slices: Slices) -> None:
        self.handle, self.groups, self._slices = handle, groups, slices
        self.size, self.stride = tensor.size(), tensor.stride()
        self.dtype, self.device = tensor.dtype, tensor.device
        self.exact: set[tuple[int, int]] = set()

    @property
    def treatment(self) -> str:  # type: ignore[override]
        """That of what is cut, for reports."""
        return f"{self.handle.treatment} in slices" if self.is_large() else self.handle.treatment

    @property
    def room(self) -> Room:
        """What its forward had standing."""
        return self._slices.room

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.size.numel() * self.dtype.itemsize

    def is_large(self, beside: int = 0) -> bool:
        """Whether slices lower the peak of its step; ``beside``: bytes that are cut with it."""
        return SMALL * max(self.nbytes, beside) > self._slices.largest

    @property
    def ways(self) -> tuple[tuple[int, int], ...]:
        """How it may be cut, in numbers of groups and of rows of each: row by row, in some rows of all
        groups, in some groups."""
        outer, inner = self.groups
        return (1, outer * inner), *(((outer, inner), (1, outer)) if outer > 1 else ())

    def parts(self, way: tuple[int, int] | None = None, nbytes: int = 0) -> list[Part]:
        """Its parts in one of its ways, row by row by default; ``nbytes``: of something larger that is cut
        with it."""
        outer, inner = way or self.ways[0]
        nbytes = max(nbytes, self.nbytes)
        each = max(1, nbytes // max(1, inner))
        alone = outer * inner < self.groups[0] * self.groups[1] or outer > 1  # one of these is several rows
        step = max(1 if alone else 2, step_of(nbytes, self.device) // each)
        ends = [inner * at // -(-inner // step) for at in range(-(-inner // step) + 1)]
        if not alone:
            ends = [end for end in ends if not (end == 1 or end == inner - 1)]
        return [Part(outer, inner, *both) for both in pairwise(ends)]

    def exact_parts(self) -> list[Part]:
        """Parts that are the forward's bits, as small as they may be; there are some."""
        return self.parts(max(self.exact, key=lambda way: way[1]))

    def is_at_hand(self) -> bool:
        """Whether its parts can be computed now: nothing of it waits for a stream to be undone."""
        waiting, met = [self.handle], {self.handle}
        while waiting:
            one = waiting.pop()
            if isinstance(one, Replayed) and one.at_hand() is None:
                if one.__class__ not in PLAIN:
                    return False
                more = [operand for operand in one.operands() if operand not in met]
                met.update(more)
                waiting += more
        return True

    def rows(self, part: Part, found: dict[Handle, Tensor] | None = None) -> Tensor:
        """A part's rows."""
        return rows_of(self.handle, part, {} if found is None else found)

    def is_like(self, tensor: Tensor) -> bool:
        """Whether a tensor is as large as it, and laid out as it is."""
        kind = tensor.dtype, tensor.shape, tensor.stride()
        return kind == (self.dtype, self.size, self.stride)

    def empty(self, stride: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of its size, to be filled; laid out as it is by default."""
        stride = self.stride if stride is None else stride
        return torch.empty_strided(self.size, stride, dtype=self.dtype, device=self.device)

    def assembled(self) -> Tensor:
        """The whole, put together from exact parts."""
        whole = self.empty()
        for part in self.exact_parts():
            part.put(self.rows(part), whole)
        return whole

    def stands(self) -> bool:
        """Whether the whole is at hand, for others, too: nobody may write to it."""
        return isinstance(self.handle, Replayed) and self.handle.at_hand() is not None

    def whole(self) -> Tensor:
        """The whole, from parts where these are the forward's bits; the caller's, unless it stands."""
        if not isinstance(self.handle, Replayed) or self.stands():
            return self.peek()
        return self.assembled() if self.exact else self._around_a_product()

    def _around_a_product(self) -> Tensor:
        """The whole, where a product has other bits in slices: all but that product in slices."""
        handle = self.handle
        assert isinstance(handle, Replayed)
        product = last_product(handle)
        operand = None if product is None or not product.args else product.args[0]
        size = size_of(operand)
        if product is None or operand is None or size is None or size_of(product) is None:
            return handle.fresh()
        value = self._run(product, operand, size)
        same = value.dtype is self.dtype and value.is_contiguous() and value.numel() == self.size.numel()
        whole = value.view(self.size) if same and self.empty_meta().is_contiguous() else self.empty()
        for part in self.parts():
            rows = self.rows(part, {product: part.of(value)})
            if storage_key(rows) == storage_key(whole):  # views of the product are all that came after it
                rows = rows.clone()
            part.put(rows, whole)
        return whole

    def _run(self, product: Replayed, operand: Handle, size: torch.Size) -> Tensor:
        """A product as a whole, its first operand put together from slices."""
        try:
            first = None
            for part in self.parts():
                rows = rows_of(operand, part, {})
                if first is None:
                    first = torch.empty(size, dtype=rows.dtype, device=rows.device)
                part.put(rows, first)
        except Whole:
            first = operand.peek()
        others = [arg.peek() if isinstance(arg, Handle) else arg for arg in product.args[1:]]
        named = {key: arg.peek() if isinstance(arg, Handle) else arg for key, arg in product.kwargs.items()}
        return product.func(first, *others, **named)  # type: ignore[no-any-return]

    def empty_meta(self) -> Tensor:
        """Its layout."""
        return torch.empty_strided(self.size, self.stride, device="meta")

    def peek(self) -> Tensor:
        return self.handle.peek()

    def get(self, last: bool) -> tuple[Tensor, bool]:
        return self.handle.get(last)

    counts = True

    def need(self) -> None:
        self.handle.need()

    def release(self) -> None:
        self.handle.release()

    def unpack(self) -> Tensor:
        return self.handle.unpack()

    def relies_on(self) -> Iterable[Handle]:
        return (self.handle,)


class Slices:
    """What a recording in mode "minimal" cuts. ``largest`` are the bytes of the largest of that."""

    def __init__(self, tape: Any, check: bool) -> None:
        self._tape = weakref.ref(tape)  # autograd keeps what is cut, and must not keep the tape
        self.largest = 0
        self.room = Room()
        self.between = Between(tape, step_of, check)
        try_out_operators()

    def run(self, func: Any, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator gives."""
        between = self.between
        if func is aten.convolution.default and not kwargs:
            return forward.convolution(args, step_of, between)
        if func in POOLINGS and not kwargs:
            return forward.pooling(func, args, step_of, between)
        if operator.kind is Kind.NORM and not kwargs:
            over = between.is_given_up(args[0], False) and norm.is_proved(func, args)
            return norm.batch_norm(func, args, step_of, over)
        out = func(*args, **kwargs)
        if operator.kind is Kind.VIEW and between.holds_bits:
            between.viewed(args[0], out)
        return out

    def computed(self, recipe: Handle | None, out: Tensor) -> None:
        """A tensor has a recipe."""
        if isinstance(recipe, Replayed) and not _is_small(out):
            note(recipe, Noted(out.size()))
            note_taken(recipe)

    def normalized(self, recipe: Replayed, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """A batch norm ran."""
        if not _is_small(outputs[0]):
            norm.note_normalized(self._tape(), recipe, x, outputs)

    def cut(self, handle: Handle, tensor: Tensor, whole: bool = False) -> Handle:
        """What autograd gets for a tensor that it saves: the handle, or one that can be cut; ``whole``: for
        one who will ask for all of it."""
        if isinstance(handle, Replayed):
            handle.packs += 1
        if not is_plain(tensor) or _is_small(tensor, 2):
            return handle
        if whole:
            self.largest = max(self.largest, tensor.nbytes)
            return handle
        with OffStack(self._tape()):
            cut = self._cut(handle, tensor)
        if cut is None:
            return handle
        self.largest = max(self.largest, cut.nbytes)
        return cut

    def may_be_replaced(self, x: Tensor) -> bool:
        """Whether what a neuron makes of a current may take its place."""
        with OffStack(self._tape()):
            cut = self._cut(look_up(x), x) if self.between.is_given_up(x, True) else None
        return cut is not None and bool(cut.exact)

    def exactly(self, handle: Handle, tensor: Tensor) -> Cut | None:
        """A tensor's handle, cut, if its parts are the forward's bits."""
        cut = self.cut(handle, tensor)
        return cut if isinstance(cut, Cut) and cut.exact else None

    def _cut(self, handle: Handle, tensor: Tensor) -> Cut | None:
        # What has one dimension are statistics of channels, which each slice needs.
        if tensor.dim() < 2 or not is_dense(tensor):
            return None
        if handle.__class__ not in PLAIN and not isinstance(handle, (Kept, Packed)):
            return None
        is_deep = isinstance(handle, Replayed) and handle.depth > MOST_OPERATIONS
        if is_deep or (isinstance(handle, Kept) and handle.parameter):
            return None
        for groups in groups_of(tensor.size(), handle):
            cut = Cut(handle, tensor, groups, self)
            if len(cut.parts()) < 2:
                continue
            if not isinstance(handle, Replayed):
                cut.exact = {*cut.ways}
                return cut
            proofs = {way: self._proof(cut, tensor, way) for way in cut.ways}
            if None not in [*proofs.values()][:2]:  # a backward may ask for either
                cut.exact = {way for way, exact in proofs.items() if exact}
                return cut
        return None

    def _proof(self, cut: Cut, tensor: Tensor, way: tuple[int, int]) -> bool | None:
        parts = cut.parts(way)
        key = _signature(cut.handle), parts[0], parts[-1], cut.stride, torch.get_num_threads()
        if key not in _proved:
            if len(_proved) > 4096:
                _proved.clear()
            self.between.unpack(tensor)
            _proved[key] = _compared(cut, tensor, {parts[0], parts[-1]})
        return _proved[key]


def _compared(cut: Cut, tensor: Tensor, parts: Iterable[Part]) -> bool | None:
    """Whether parts are a tensor's bits; None: they are not even close, or there are none."""
    exact = True
    with torch.no_grad():
        for part in parts:
            try:
                rows, expected = cut.rows(part), part.of(tensor.detach())
            except Whole:
                return None
            if rows.dtype is not tensor.dtype or rows.shape != expected.shape:
                return None
            if torch.equal(rows, expected):
                continue
            exact = False
            off, scale = (rows - expected).abs().max(), expected.abs().max()
            if not bool(off <= CLOSE * scale):
                return None
    return exact


def _signature(handle: Any) -> Any:
    """What decides the kernels of a recipe: each operation once, as many ways may lead to it."""
    operations: list[Any] = []
    return _noted(handle, {}, operations), tuple(operations)


def _noted(value: Any, numbers: dict[Handle, int], operations: list[Any]) -> Any:
    """What stands for a value: the number of its operation, which is written down, or what it is."""
    if value.__class__ in PLAIN:
        if value not in numbers:
            of_args = [_noted(arg, numbers, operations) for arg in (*value.args, *value.kwargs.values())]
            numbers[value] = len(operations)
            operations.append((value.func, value.index, *value.kwargs, *of_args))
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return tuple(_noted(one, numbers, operations) for one in value)
    if isinstance(value, Kept):
        return value.tensor.shape, value.tensor.stride(), value.tensor.dtype, value.tensor.device
    if isinstance(value, Packed):
        return value.size, value.stride, value.dtype
    if isinstance(value, Handle):
        return value.__class__
    return repr(value)


def parts_of(*cuts: Cut, nbytes: int = 0) -> Iterator[tuple[Part, dict[Handle, Tensor]]]:
    """Parts of tensors with one number of rows, with a place for what is found of each; ``nbytes``: of
    something larger that is cut with them."""
    coarsest = min(cuts, key=lambda cut: cut.groups[0] * cut.groups[1])
    for part in coarsest.parts(nbytes=max(nbytes, *(cut.nbytes for cut in cuts))):
        yield part, {}
