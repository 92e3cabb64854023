"""Layouts: which order a tensor's elements have in memory, and tensors made in a given one.

The one idea: a kernel may round by layout, and a result's strides decide which kernel comes next. So what
is rebuilt gets the strides that the forward's had, and what is computed element by element works on flat
views in the order of memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

STRIDED = torch.strided
NO_DISPATCH = Tensor.__torch_dispatch__
"""Of a tensor that is computed with as it is; a class that has another wraps tensors of its own."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values stand in a storage of its own: it is not sparse, not opaque, no wrapper
    around others (a nested one, what tensor parallelism and quantized training make). Who asks of each
    operation of each step writes it out, without a call."""
    return (
        tensor.layout is STRIDED
        and type(tensor).__torch_dispatch__ is NO_DISPATCH
        and not tensor.is_nested  # it has a storage, and neither a shape nor strides
    )


def storage_key(tensor: Tensor) -> int:
    """Identifies a live storage."""
    return tensor.untyped_storage()._cdata


def parts_in_memory(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors with a storage that one is made of: itself; values and places of a sparse one; what a
    wrapper says that it wraps; of others none."""
    if tensor.layout is STRIDED and type(tensor).__torch_dispatch__ is NO_DISPATCH:
        return (tensor,)
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return tuple(part for name in names for part in parts_in_memory(getattr(tensor, name)))
    return ()


def size_in_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, and of their places where it is sparse."""
    return sum(part.nbytes for part in parts_in_memory(tensor))


def numbers_in(tensor: Tensor) -> Tensor:
    """All numbers of a tensor in one that is plain: of a nested one, those of its parts in a row."""
    if tensor.is_nested:
        return torch.cat([part.reshape(-1) for part in tensor.unbind()])
    return tensor if tensor.layout is STRIDED else tensor.to_dense()


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape; of a nested tensor, whose parts differ, the number of its elements."""
    return (tensor.numel(),) if tensor.is_nested else tuple(tensor.shape)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if tensor.is_nested:
        return False
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.size(), strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def is_contiguous_in(x: Tensor, dims: Iterable[int], *, zeros: bool = False) -> bool:
    """Whether these dimensions, outermost first, have the strides of a contiguous tensor.

    Dimensions of size one count, because kernels look at their strides. ``zeros``: also accept
    dimensions that are expanded.
    """
    shape, stride, expected = x.shape, x.stride(), 1
    for d in reversed(tuple(dims)):
        if stride[d] != expected and not (zeros and stride[d] == 0):
            return False
        expected *= max(shape[d], 1)
    return True


def restacked(x: Tensor) -> Tensor:
    """x laid out as ``torch.stack((x,))[0]`` is."""
    return x if is_contiguous_in(x, range(x.dim())) else torch.stack((x,))[0]


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values in another layout, if they have another."""
    if tensor.stride() == strides:
        return tensor
    out = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return out.copy_(tensor)


def flat(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A tensor as float32 [n], in the order of memory of a layout."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.stride() != stride or tensor.dtype is not torch.float32:
        laid_out = torch.empty_strided(tensor.size(), stride, dtype=torch.float32, device=tensor.device)
        tensor = laid_out.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def like(tensor: Tensor) -> Tensor:
    """An empty tensor of this layout: float32, and no view, so that users may detach it in place."""
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return torch.empty_like(tensor, requires_grad=False)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float32, device=tensor.device)


def alike(tensor: Tensor, count: int) -> list[Tensor]:
    """So many of :func:`like`."""
    first = like(tensor)
    return [first, *map(torch.empty_like, repeat(first, count - 1))]


def order_of_steps(x_seq: Tensor, v: Tensor | float) -> tuple[int, ...] | None:
    """The order of dimensions in which each step's elements are contiguous, plain or channels-last."""
    shape, dims = x_seq.shape, tuple(range(x_seq.dim()))
    orders = [dims]
    if len(dims) in (5, 6) and shape[2] > 1 and math.prod(shape[3:]) > 1:
        orders.append((0, 1, *dims[3:], 2))
    for order in orders:
        if is_contiguous_in(x_seq, order[1:]) and (
            not isinstance(v, Tensor) or is_contiguous_in(v[None], order[1:])
        ):
            return order
    return None


def as_rows(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """[T, n], a view unless x is expanded in a way that has none."""
    return x.permute(order).reshape(x.shape[0], math.prod(x.shape[1:]))


def in_place_of(tensor: Tensor) -> Tensor:
    """A tensor to be filled, in the memory of another, and laid out as that; no view of it to autograd."""
    out = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return out.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())  # type: ignore[call-overload,no-any-return]


def empty_in(
    x_seq: Tensor, order: tuple[int, ...], steps: bool = True, dtype: torch.dtype | None = None
) -> Tensor:
    """An empty tensor shaped like x_seq (or like one step of it), dense in this order; of its dtype, or
    of another."""
    stride, expected = [0] * x_seq.dim(), 1
    for d in reversed(order):
        stride[d] = expected
        expected *= max(x_seq.shape[d], 1)
    first = 0 if steps else 1
    dtype = x_seq.dtype if dtype is None else dtype
    return torch.empty_strided(x_seq.shape[first:], stride[first:], dtype=dtype, device=x_seq.device)
