"""Tensors that are written part by part: ``out = zeros(...)``, then ``out[t] = step``.

The one idea: a write is a recipe as any other, "the value before, with this written there", so that T
writes are a chain of T recipes that a rebuild runs in one buffer. And what is read where one part was
written, and nothing since, is that part: it doesn't wait for the whole. Source: this package's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import is_dense, is_plain
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.recipes import Price, is_cheap
from snn_reversible_plugin.tape.replayed import Replayed

# NOTE [A tensor of parts]
#
# 1. `out[t] = step` is a view of `out`, its *root*, and an operation that writes into the view. The root's
#    new value is the recipe (value before, place, operation, step).
# 2. The value before is needed by the value after alone, so a rebuild owns it and writes in place; each
#    part is computed when its turn comes, and let go. A whole version that somebody else needs, because it
#    was read between two writes, is copied once.
# 3. `out[t - 1]` right after it was written must not lead to the whole `out`: T steps would rebuild T
#    copies. A `Parts` knows the places, as boxes along the root's dimensions, and whose value stands there.
#    A box that another overlaps is known no more; a box that nothing was written to is what it was before.
# 4. Where each part has a product of its own, they count as one, as that of a layer that computes all steps
#    at once would: a membrane that adds up T parts is one product away from what is stored, not T.
# 5. Where the parts have to be kept anyway, `out` itself is kept.
# 6. `torch.cat((a, b))[:len(a)]` is a again, where it is laid out as a is: b is not computed for it.
#
# For example, out = zeros(3, 2); out[0] = a; out[1] = b: reading out[1] gives b's handle, out[2] a row of
# the zeros, out[:2] a view of "zeros, then a, then b".

Box = tuple[tuple[int, int], ...]  # the start and the length along each dimension
Place = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset from the root's first element


class Parts:
    """What was written where, since a root had the value ``base``."""

    __slots__ = ("_lengths", "_product", "_values", "base", "newly_kept")

    def __init__(self, base: Handle) -> None:
        self.base = base
        self.newly_kept = 0
        self._product: int | None = None
        self._values: dict[Box, tuple[Place, Handle | None]] = {}
        self._lengths: tuple[int, ...] | None = None  # of all boxes, where they are tiles; () if not

    def wrote(self, view: torch.Tensor, root: torch.Tensor, value: Handle | None) -> None:
        """Note that a view has a new value; None: one that is not known by itself."""
        box = _box(view, root) or tuple((0, size) for size in root.size())
        lengths = tuple(length for _, length in box)
        tile = all(start % length == 0 for start, length in box)
        if self._lengths is None:
            self._lengths = lengths if tile else ()
        elif not tile or lengths != self._lengths:
            self._lengths = ()
        for other in self._overlapping(box):
            if other != box:
                self._values[other] = self._values[other][0], None
        self._values[box] = _place(view, root), value

    def count_as_one(self, value: Any) -> None:
        """Count the product of what is about to be copied into a part as that of the first part."""
        if isinstance(value, Replayed) and len(value.products) == 1:
            if self._product is None:
                (self._product,) = value.products
            elif self._product not in value.products:
                value.products = {self._product: value.work}

    def read(self, view: torch.Tensor, root: torch.Tensor) -> Handle | None:
        """The value of a view: ``base`` where nothing was written to it, None where it is mixed."""
        box = _box(view, root)
        if box is None:
            return None
        found = self._overlapping(box)
        if not found:
            return self.base
        place, value = self._values[found[0]]
        return value if found == [box] and place == _place(view, root) else None

    def _overlapping(self, box: Box) -> list[Box]:
        lengths = tuple(length for _, length in box)
        if lengths == self._lengths and all(start % length == 0 for start, length in box):
            return [box] if box in self._values else []
        return [other for other in self._values if _overlap(box, other)]


def _place(view: torch.Tensor, root: torch.Tensor) -> Place:
    return tuple(view.size()), view.stride(), _offset(view, root)


def _offset(view: torch.Tensor, root: torch.Tensor) -> int:
    return int(view.storage_offset()) - int(root.storage_offset())


def _box(view: torch.Tensor, root: torch.Tensor) -> Box | None:
    """Where a view lies in a dense root, None if that is no box."""
    if not is_plain(view) or not view.numel():
        return None
    lengths = {stride: size for stride, size in zip(view.stride(), view.size(), strict=True) if size > 1}
    offset, box = _offset(view, root), []
    dims = [(stride, size) for stride, size in zip(root.stride(), root.size(), strict=True) if size > 1]
    for stride, size in sorted(dims, reverse=True):
        start, offset = divmod(offset, stride)
        length = lengths.pop(stride, 1)
        if start + length > size:
            return None
        box.append((start, length))
    return tuple(box) if not lengths and not offset else None


def _overlap(one: Box, other: Box) -> bool:
    return len(one) != len(other) or all(
        start < at + size and at < start + length
        for (start, length), (at, size) in zip(one, other, strict=True)
    )


_put_together: weakref.WeakKeyDictionary[Handle, tuple[int, list[Place]]] = weakref.WeakKeyDictionary()


def note_what_was_put_together(recipe: Handle, tensors: Sequence[torch.Tensor], dim: int = 0) -> None:
    """Remember of which tensors ``torch.cat`` made a value, and where each lies along ``dim``."""
    if any(tensor.dim() == 0 or not tensor.numel() for tensor in tensors):
        return
    start, places = 0, []
    for tensor in tensors:
        places.append((tuple(tensor.size()), tensor.stride(), start))
        start += tensor.size(dim)
    _put_together[recipe] = dim % tensors[0].dim(), places


def one_of_those_put_together(view: torch.Tensor, root: Any, dim: int, start: int) -> Handle | None:
    """The handle of that tensor, among those put together, that a slice of the whole is again."""
    dim_of, places = _put_together.get(root, (None, []))
    if not places or dim % view.dim() != dim_of:
        return None
    wanted = tuple(view.size()), view.stride(), start
    (operands,) = root.args[:1]
    return next((operand for operand, place in zip(operands, places, strict=True) if place == wanted), None)


def can_be_in_parts(root: torch.Tensor, handle: Any) -> bool:
    """Whether writes into views of a tensor can be written down, given what :func:`look_up` said of it."""
    known = isinstance(handle, (Replayed, Packed)) or (isinstance(handle, Kept) and handle.anchored)
    return known and is_plain(root) and root.numel() > 0 and is_dense(root)


def written_part(
    before: Handle,
    written: tuple[torch.Tensor, torch.Tensor],
    func: Any,
    operands: tuple[Sequence[Any], dict[str, Any]],
    price: Price,
) -> Replayed:
    """The recipe of a root's value after ``func`` wrote into a view of it; ``written`` are both."""
    args, kwargs = operands
    recipe = before, _place(*written), func, *args
    after = Replayed(write, recipe, kwargs, price.products, price.depth, True, price.cheap)
    after.series = price.series
    return after


def write(value: torch.Tensor, place: Place, func: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Write into a part of a value."""
    size, stride, offset = place
    func(value.as_strided(size, stride, value.storage_offset() + offset), *args, **kwargs)
    return value


def copied_into(view: torch.Tensor, source: torch.Tensor, value: Handle, price: Price) -> Handle:
    """The value of a view after ``view.copy_(source)``, given the source's."""
    if source.size() == view.size() and source.stride() == view.stride() and source.dtype is view.dtype:
        return value
    options = tuple(view.size()), view.stride(), view.dtype, view.device
    copy = Replayed(laid_out, (value, *options), {}, price.products, price.depth, cheap=is_cheap(value))
    copy.series = price.series
    return copy


def laid_out(
    source: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], dtype: Any, device: Any
) -> torch.Tensor:
    """A source as ``copy_`` leaves it in a tensor like this."""
    return torch.empty_strided(size, stride, dtype=dtype, device=device).copy_(source)
