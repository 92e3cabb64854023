"""Backward operators on one slice of the batch after the other.

The one idea: gradients of what each sample has for itself are computed where they belong, and those of
parameters, which all samples share, are sums over slices. Batch norm's statistics are of the whole batch,
so its slices are gone through twice: once for the two sums that its backward needs, and once for the
gradients. Source: ``derivatives.yaml`` of PyTorch says which operator each node calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.tape.operators import aten
from snn_reversible_plugin.tape.sliced.cut import Cut, parts_of
from snn_reversible_plugin.tape.sliced.filled import Filled
from snn_reversible_plugin.tape.sliced.later import waits_for
from snn_reversible_plugin.tape.sliced.norm_sums import Sums, left_for
from snn_reversible_plugin.tape.sliced.rows import Part, Whole

# NOTE [Sums over slices]
#
# Parameters' gradients are added up in float32 at least, in the order of the batch: slices of the batch
# give another order of additions than the whole, and so another rounding. The rest of a gradient is what
# the same kernel gives for the same samples. A sum stands beside each of its terms: where it is larger than
# what slices could spare, there are none.
#
# A kernel lays out weights and their gradient anew, so of a convolution whose weights are more than half of
# its input the sum, a term and two such copies would stand. Their gradient goes by channels then, of all
# samples, and so does the input's where weights are larger than all that goes through them. For example 256
# to 256 channels, 3 x 3, of [32, 256, 8, 8]: weights of 2.4 MB, of which four would stand. By channels one
# does, and an eighth of two, beside the input's 2.1 MB.
#
# NOTE [In place of what came in]
#
# A slice of a gradient is needed for that slice of the next one and no longer. Where the gradient is nobody
# else's (`alone`), is as large and laid out alike, it is overwritten: `spare`.


WEIGHTS_IN = 8  # slices of channels, where the weights are not small beside what goes through them


class Turned(NamedTuple):
    """A cut tensor with its last two dimensions exchanged."""

    cut: Cut


def _refuse_parts_of_samples(*cuts: Cut) -> None:
    """What takes samples can't take rows of the first two dimensions, as of a linear layer's [N, C, L]."""
    for cut in cuts:
        if cut.groups[0] * cut.groups[1] > cut.size[0]:
            raise Whole


def _refuse_large_sum(nbytes: int, *cut: Cut | Tensor) -> None:
    if nbytes > sum(one.nbytes for one in cut):
        raise Whole


class _Sum:
    """A parameter's gradient."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, term: Tensor) -> None:
        self._dtype = term.dtype
        if self._total is None:
            wide = torch.promote_types(term.dtype, torch.float32)
            self._total = term.to(wide) if wide != term.dtype else term
        else:
            self._total.add_(term)

    def value(self) -> Tensor | None:
        return None if self._total is None else self._total.to(self._dtype)


def _convolution(
    func: Any, grad: Tensor, x: Cut, weight: Tensor, *how: Any, spare: Tensor | None = None
) -> Any:
    if not isinstance(x, Cut) or not isinstance(weight, Tensor) or len(x.size) < 3:
        raise Whole
    mask = how[-1]
    _refuse_parts_of_samples(x)
    if mask[1] and weight.nbytes > x.nbytes + grad.nbytes:
        return _convolution_by_channels(func, grad, x, weight, *how)
    g_x, g_bias, by_itself = Filled(x.size, spare), _Sum(), None
    g_weight = _Sum()
    if mask[1] and 2 * weight.nbytes > x.nbytes and _goes_by_channels(weight, how):
        by_itself = _weights_by_channels(func, grad, x.whole(), weight, *how[1:-1])
        how, mask = (*how[:-1], [mask[0], False, mask[2]]), [mask[0], False, mask[2]]
    for part, found in parts_of(x, nbytes=grad.nbytes) if mask[0] or mask[1] or mask[2] else ():
        one, of_weight, of_bias = func(part.of(grad), x.rows(part, found), weight, *how)
        if mask[0]:
            g_x.put(part, one)
        if mask[1]:
            g_weight.add(of_weight)
        if mask[2]:
            g_bias.add(of_bias)
        del one, found
    return g_x.value, g_weight.value() if by_itself is None else by_itself, g_bias.value()


def _goes_by_channels(weight: Tensor, how: tuple[Any, ...]) -> bool:
    """Whether some channels' weights can be differentiated by themselves."""
    *_, transposed, _, groups, _ = how
    return not transposed and groups == 1 and min(weight.shape[:2]) >= WEIGHTS_IN


def _convolution_by_channels(
    func: Any, grad: Tensor, x: Cut, weight: Tensor, *how: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Some channels' weights at a time, all samples: what a kernel lays out anew is part of the weights."""
    if not _goes_by_channels(weight, how):
        raise Whole
    (_, *other, mask), slices = how, WEIGHTS_IN
    whole = x.whole()
    g_x = torch.empty_like(whole) if mask[0] else None
    g_weight, later = None, waits_for(weight)
    if later is None:
        g_weight = _weights_by_channels(func, grad, whole, weight, *other)
    else:  # on copies: streams and their gradients, and what the tape has cached, are written over by then
        is_part = grad.untyped_storage().nbytes() != grad.nbytes
        copied = grad.clone() if is_part else grad
        later(partial(_weights_by_channels, func, copied, whole.clone(), weight, *other))
    if g_x is not None:
        for a, b in pairwise(weight.shape[1] * at // slices for at in range(slices + 1)):
            some = whole[:, a:b].contiguous(memory_format=_layout_of(whole))
            some_weights = weight[:, a:b].contiguous(memory_format=_layout_of(weight))
            g_x[:, a:b] = func(grad, some, some_weights, None, *other, [True, False, False])[0]
            del some, some_weights
    dims = [dim for dim in range(grad.dim()) if dim != 1]
    return g_x, g_weight, grad.sum(dims) if mask[2] else None


def _weights_by_channels(func: Any, grad: Tensor, x: Tensor, weight: Tensor, *other: Any) -> Tensor:
    g_weight, slices = torch.empty_like(weight), WEIGHTS_IN
    for a, b in pairwise(weight.shape[0] * at // slices for at in range(slices + 1)):
        some = grad[:, a:b].contiguous(memory_format=_layout_of(grad))
        g_weight[a:b] = func(some, x, weight[a:b], None, *other, [False, True, False])[1]
        del some
    return g_weight


def _layout_of(tensor: Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _batch_norm(
    func: Any, grad: Tensor, x: Cut, weight: Tensor | None, *how: Any, spare: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    running_mean, running_var, mean, deviation, training, eps, mask = how
    if not training:
        mean, deviation = running_mean, (running_var + eps).rsqrt()
    return _normalized(grad, x, weight, (mean, deviation, training), mask, spare)


def _cudnn_batch_norm(func: Any, x: Cut, grad: Tensor, weight: Tensor | None, *how: Any) -> Any:
    _, _, mean, deviation, *_ = how
    return _normalized(grad, x, weight, (mean, deviation, True), (True, True, True))


def _normalized(
    grad: Tensor,
    x: Cut,
    weight: Tensor | None,
    by: tuple[Tensor, Tensor, bool],
    mask: Any,
    spare: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``(x - mean) * deviation * weight + bias``; ``by``: mean, deviation's inverse, and
    whether these are x's own."""
    if not isinstance(x, Cut) or len(x.size) < 2:
        raise Whole
    _refuse_parts_of_samples(x)
    mean, deviation, own = by
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = [1, -1] + [1] * (len(x.size) - 2)
    sums = None
    if own or mask[1] or mask[2]:
        sums = left_for(x.handle, grad)
        if sums is None:
            sums = Sums(mean)
            for part, found in parts_of(x):
                sums.add(part.of(grad), x.rows(part, found))
    mean, deviation = (one.to(wide).view(shape) for one in (mean, deviation))
    g_x = None
    if mask[0]:
        scale = deviation if weight is None else deviation * weight.to(wide).view(shape)
        whole = spare if spare is not None and x.is_like(spare) else x.empty()
        if own:
            assert sums is not None
            n = x.size.numel() // x.size[1]
            shift = (sums.total / n).to(wide).view(shape)
            slope = (sums.along / n).to(wide).view(shape) * deviation.square()
        for part, found in parts_of(x):
            g = part.of(grad)
            if own:
                pull = (x.rows(part, found).to(wide) - mean).mul_(slope)
                g = torch.sub(g, pull, out=pull).sub_(shift)
                part.put(g.mul_(scale), whole)
            else:
                part.put(g * scale, whole)
        g_x = whole
    like = deviation.view(-1) if weight is None else weight
    g_weight = (sums.along * deviation.view(-1)).to(like.dtype) if mask[1] and sums is not None else None
    g_bias = sums.total.to(like.dtype) if mask[2] and sums is not None else None
    return g_x, g_weight, g_bias


def _max_pool(func: Any, grad: Tensor, x: Any, *how: Any) -> Tensor | None:
    *window, indices = how
    cuts = [one for one in (x, indices) if isinstance(one, Cut)]
    _refuse_parts_of_samples(*cuts)
    g_x = Filled(x.size if isinstance(x, Cut) else x.shape)
    for part, found in parts_of(*cuts):
        of_x, of_indices = (
            one.rows(part, found) if isinstance(one, Cut) else part.of(one) for one in (x, indices)
        )
        g_x.put(part, func(part.of(grad), of_x, *window, of_indices))
    return g_x.value


def _pool(func: Any, grad: Tensor, x: Cut, *how: Any) -> Tensor | None:
    """One that wants to know x's size and layout, and none of its values."""
    _refuse_parts_of_samples(x)
    g_x = Filled(x.size)
    for part, _ in parts_of(x):
        size = part.sized(x.size)
        layout = torch.contiguous_format
        if len(size) == 4 and x.stride[1] == 1 and size[1] > 1:
            layout = torch.channels_last
        of_x = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
        g_x.put(part, func(part.of(grad), of_x, *how))
    return g_x.value


def _mm(func: Any, one: Any, other: Any) -> Tensor | None:
    total = _Sum()
    if isinstance(one, Turned) and isinstance(other, Tensor):  # x^T g, over rows of both
        _refuse_large_sum(one.cut.size[1] * other.shape[1] * other.itemsize, one.cut, other)
        for part, found in parts_of(one.cut):
            total.add(func(one.cut.rows(part, found).t(), part.of(other)))
    elif isinstance(other, Cut) and isinstance(one, Tensor):  # g^T x
        _refuse_large_sum(one.shape[0] * other.size[1] * one.itemsize, one, other)
        for part, found in parts_of(other):
            total.add(func(part.of(one.t()).t(), other.rows(part, found)))
    else:
        raise Whole
    return total.value()


def _bmm(func: Any, one: Any, other: Any) -> Tensor | None:
    opened = [getattr(arg, "cut", arg) for arg in (one, other)]
    _refuse_parts_of_samples(*(arg for arg in opened if isinstance(arg, Cut)))
    sizes = [arg.size if isinstance(arg, Cut) else arg.shape for arg in opened]
    rows = sizes[0][-1] if isinstance(one, Turned) else sizes[0][-2]
    columns = sizes[1][-2] if isinstance(other, Turned) else sizes[1][-1]
    result = Filled((sizes[0][0], rows, columns))

    def factor(arg: Any, part: Part, found: Any) -> Tensor:
        if isinstance(arg, Turned):
            return arg.cut.rows(part, found).transpose(1, 2)
        return arg.rows(part, found) if isinstance(arg, Cut) else part.of(arg)

    for part, found in parts_of(*(arg for arg in opened if isinstance(arg, Cut))):
        result.put(part, func(factor(one, part, found), factor(other, part, found)))
    return result.value


def _mul(func: Any, one: Any, other: Any) -> Tensor:
    if not isinstance(other, Cut) or not isinstance(one, Tensor) or one.shape != other.size:
        raise Whole
    product = torch.empty_strided(
        other.size, other.stride, dtype=torch.promote_types(one.dtype, other.dtype), device=one.device
    )
    for part, found in parts_of(other):
        part.put(func(part.of(one), other.rows(part, found)), product)
    return product


BY_SLICES: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution,
    aten.native_batch_norm_backward.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _cudnn_batch_norm,
    aten.max_pool2d_with_indices_backward.default: _max_pool,
    aten.avg_pool2d_backward.default: _pool,
    aten._adaptive_avg_pool2d_backward.default: _pool,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.mul.Tensor: _mul,
}
