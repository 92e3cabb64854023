"""A recipe, run on some of the rows of its result.

The one idea: of most operations, rows of the result need the same rows of the operands and nothing else.
What is stored in bits is unpacked for these rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.operators import Operator, aten, operator_of
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import PLAIN, Replayed
from snn_reversible_plugin.tape.sliced.noted import noted_of, size_of

# NOTE [Rows]
#
# 1. A tensor's rows are the elements of its leading dimensions, as many as they have: of [T * N, ...] and
#    [T, N, ...] the same T * N. A part takes the rows from `start` to `stop` of each of `outer` groups:
#    of one group for a layer that sees no time, of T groups (each time step's N) for a neuron.
# 2. The rows of a part are laid out as [rows, ...], whatever the leading dimensions were.
# 3. Batch norm takes the mean and the deviation that its forward noted, as numbers for which the kernel
#    of evaluation does the same arithmetic: a variance of one, and the deviation in the weight.
# 4. What has no rule here, or another layout, raises Whole: then the tensor is rebuilt as one.


class Whole(Exception):
    """Something has no rows that could be computed by themselves."""


class Part(NamedTuple):
    """Rows from ``start`` to ``stop`` of each of ``outer`` groups of ``inner`` rows."""

    outer: int
    inner: int
    start: int
    stop: int

    def split(self, size: torch.Size) -> tuple[int, int]:
        """How many leading dimensions the rows are, and how many of their elements a row has."""
        rows = self.outer * self.inner
        elements = 1
        for dims, length in enumerate(size, 1):
            elements *= length
            if elements >= rows:
                if elements % rows:
                    break
                return dims, elements // rows
        raise Whole

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor: a view where they are one stretch."""
        dims, each = self.split(tensor.shape)
        rest = tensor.shape[dims:]
        try:
            groups = tensor.view(self.outer, self.inner * each, *rest)
        except RuntimeError:
            raise Whole from None
        rows = groups[:, self.start * each : self.stop * each]
        return rows.flatten(0, 1) if self.outer > 1 else rows[0]

    def put(self, rows: Tensor, into: Tensor) -> None:
        """Write them into a tensor."""
        dims, each = self.split(into.shape)
        groups = into.view(self.outer, self.inner * each, *into.shape[dims:])
        target = groups[:, self.start * each : self.stop * each]
        target.copy_(rows.view(target.shape) if rows.shape != target.shape else rows)

    def sized(self, size: torch.Size) -> tuple[int, ...]:
        """The size of these rows of a tensor of this size."""
        dims, each = self.split(size)
        return (self.outer * (self.stop - self.start) * each, *size[dims:])


def rows_of(handle: Handle, part: Part, found: dict[Handle, Tensor], after: int = 0) -> Tensor:
    """Rows of what a handle stands for.

    Args:
        handle: of the whole tensor.
        part: which rows.
        found: rows of this part that are known.
        after: how many operations ask for it, one inside the other. A loop over time can be longer than
            Python's stack is deep.

    Raises:
        Whole: they can't be computed by themselves.
    """
    known = found.get(handle)
    if known is not None:
        return known
    if isinstance(handle, Kept):
        rows = part.of(handle.get(False)[0])
    elif isinstance(handle, Packed):
        rows = _unpacked(handle, part)
    elif isinstance(handle, Replayed) and (value := handle.at_hand()) is not None:
        rows = part.of(value)
    elif handle.__class__ in PLAIN and after < MOST_OPERATIONS:
        rows = _run(handle, part, found, after)  # type: ignore[arg-type]
    else:
        raise Whole
    found[handle] = rows
    return rows


def _unpacked(handle: Packed, part: Part) -> Tensor:
    """The spikes of these rows, from their stretches of the bits."""
    dims, _ = part.split(handle.size)
    size, stride = handle.size, handle.stride
    row = math.prod(size) // (part.outer * part.inner)
    expected = math.prod(size[dims:])
    for length, step in zip(reversed(size[:dims]), reversed(stride[:dims]), strict=True):
        if length > 1 and step != expected:
            raise Whole
        expected *= length
    length = (part.stop - part.start) * row
    assert handle.bits is not None
    flat = torch.empty(part.outer * length, dtype=handle.dtype, device=handle.bits.device)
    for group in range(part.outer):
        begin = (group * part.inner + part.start) * row
        handle.unpack_range(begin, flat[group * length : (group + 1) * length])
    rows = part.sized(size)
    inner = stride[dims:]
    first = max((one * step for one, step in zip(size[dims:], inner, strict=True)), default=1)
    return flat.as_strided(rows, (first, *inner))


# -- operations ----------------------------------------------------------------------------------------

Rule = Callable[["_Run"], Tensor]
_RESHAPES = frozenset(
    ["view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "alias", "detach",
     "expand"]
)  # fmt: skip
_BY_ELEMENT = frozenset(
    ["add", "sub", "mul", "div", "neg", "clone", "_to_copy", "relu", "clamp", "clamp_min", "clamp_max",
     "hardtanh"]
)  # fmt: skip
_BY_SAMPLE = frozenset(
    ["convolution", "_convolution", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d",
     "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest2d",
     "upsample_bilinear2d", "mm", "linear"]
)  # fmt: skip


def is_reshape(operator: Operator) -> bool:
    """Whether an operator gives the same elements in the same order, or expands them."""
    return operator.name in _RESHAPES


MOST_OPERATIONS = 64  # one inside the other
_functions: set[Any] = set()


def by_element(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Decorator: recipes of a function that is no operator, and sees one element at a time."""
    _functions.add(function)
    return function


def is_by_element(function: Any) -> bool:
    """Whether a recipe's function is one of these."""
    return function in _functions


class _Run(NamedTuple):
    """One operation to run on a part."""

    handle: Replayed
    name: str
    part: Part
    found: dict[Handle, Tensor]
    after: int

    def size(self) -> torch.Size:
        """The size of the whole result."""
        noted = noted_of(self.handle)
        if noted is None:
            raise Whole
        return noted.size

    def rows(self, arg: Any) -> Tensor:
        if not isinstance(arg, Handle):
            raise Whole
        return rows_of(arg, self.part, self.found, self.after + 1)

    def beside(self, arg: Any) -> Any:
        """An operand that all rows share: a parameter, or what is made of parameters."""
        if not isinstance(arg, Handle):
            return [self.beside(one) for one in arg] if type(arg) is list else arg
        known = self.found.get(arg)
        if known is None:
            if isinstance(arg, Packed) or (noted_of(arg) is not None and not getattr(arg, "cheap", False)):
                raise Whole
            known = self.found[arg] = arg.peek()
        return known

    def call(self, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        result = self.handle.func(*args, **kwargs)
        return result if self.handle.index is None else result[self.handle.index]  # type: ignore[no-any-return]


def _run(handle: Replayed, part: Part, found: dict[Handle, Tensor], after: int) -> Tensor:
    is_function = handle.func in _functions
    name = operator_of(handle.func).name if isinstance(handle.func, OpOverload) else ""
    rule = _by_element if is_function else _RULES.get(name)
    if rule is None:
        raise Whole
    return rule(_Run(handle, name, part, found, after))


def _reshaped(run: _Run) -> Tensor:
    """The same elements in the same order: the same rows, whatever a row's size."""
    source, size = run.handle.args[0], run.part.sized(run.size())
    if run.name == "expand" and size_of(source) != run.size():
        return _repeated(run)
    rows = run.rows(source)
    if rows.numel() != math.prod(size):
        raise Whole
    return rows.reshape(size)


def is_repeated(source: Iterable[int], size: Iterable[int]) -> bool:
    """Whether something of a size may be what a source repeats in its first dimension: in time."""
    source, size = tuple(source), tuple(size)
    return len(size) > 1 and source in (size[1:], (1, *size[1:]))


def _repeated(run: _Run) -> Tensor:
    """Each time step has the same rows."""
    source, size = run.handle.args[0], run.size()
    before, part = size_of(source), run.part
    steps, rows = size[0], part.outer * part.inner
    if before is None or not is_repeated(before, size) or rows % steps:
        raise Whole
    each = rows // steps  # of a step

    def of_step(start: int, stop: int) -> Tensor:
        first = min(start, max(stop - 2, 0))  # a single row is often a kernel's special case
        found = rows_of(source, Part(1, each, first, max(stop, min(first + 2, each))), {}, run.after + 1)
        return found[start - first : stop - first]

    if part.outer == steps:
        one = of_step(part.start, part.stop)
        return one.repeat(steps, *[1] * (one.dim() - 1))
    if part.outer > 1:
        raise Whole
    firsts = range(part.start // each * each, part.stop, each)
    return torch.cat([of_step(max(part.start - at, 0), min(part.stop - at, each)) for at in firsts])


def _permuted(run: _Run) -> Tensor:
    """Dimensions inside of a row changed places."""
    source, *how = run.handle.args
    size = size_of(source)
    if size is None:
        raise Whole
    order = list(range(len(size)))
    if run.name == "permute":
        order = [dim % len(size) for dim in how[0]]
    else:
        one, other = (dim % len(size) for dim in (how or (0, 1)))
        order[one], order[other] = order[other], order[one]
    dims, _ = run.part.split(size)
    if order[:dims] != list(range(dims)):
        raise Whole
    return run.rows(source).permute(0, *(dim - dims + 1 for dim in order[dims:]))


def _cut_out(run: _Run) -> Tensor:
    """Part of each row, along a dimension inside of it."""
    source, *how = run.handle.args
    size = size_of(source)
    if size is None:
        raise Whole
    at = 1 if run.name in ("split", "split_with_sizes") else 0
    how = [*how, 0][: max(at + 1, len(how))]
    dims, _ = run.part.split(size)
    dim = how[at] % len(size)
    if dim < dims or run.handle.kwargs:
        raise Whole
    how[at] = dim - dims + 1
    return run.call([run.rows(source), *how], {})


def _put_together(run: _Run) -> Tensor:
    """Parts of each row, along a dimension inside of it."""
    parts, *how = run.handle.args
    size = run.size()
    dims, _ = run.part.split(size)
    dim = (how[0] if how else 0) % len(size)
    if dim < dims or run.handle.kwargs:
        raise Whole
    return run.call([[*map(run.rows, parts)], dim - dims + 1], {})


def _by_element(run: _Run) -> Tensor:
    whole = run.size()
    dims, _ = run.part.split(whole)

    def operand(arg: Any) -> Any:
        if not isinstance(arg, Handle):
            return arg
        size = size_of(arg)
        if size == whole:
            rows = run.rows(arg)
            return rows.clone() if run.handle.inplace and arg is run.handle.args[0] else rows
        value = run.beside(arg)
        if value.dim() > len(whole) - dims:
            raise Whole
        return value

    args = [operand(arg) for arg in run.handle.args]
    return run.call(args, {name: operand(arg) for name, arg in run.handle.kwargs.items()})


def _by_sample(run: _Run) -> Tensor:
    first, *others = run.handle.args
    size = size_of(first)
    if size is None or run.part.split(size)[0] != 1 or run.handle.inplace:
        raise Whole
    if run.name == "linear" and len(size) < 2:
        raise Whole
    kwargs = {name: run.beside(arg) for name, arg in run.handle.kwargs.items()}
    return run.call([run.rows(first), *map(run.beside, others)], kwargs)


def _product(run: _Run) -> Tensor:
    """addmm(bias, rows, weight)."""
    bias, first, *others = run.handle.args
    of_bias = run.beside(bias)
    size = size_of(first)
    if size is None or run.part.split(size)[0] != 1 or of_bias.dim() > 1:
        raise Whole
    kwargs = {name: run.beside(arg) for name, arg in run.handle.kwargs.items()}
    return run.call([of_bias, run.rows(first), *map(run.beside, others)], kwargs)


def _products(run: _Run) -> Tensor:
    """bmm: a product a row."""
    sizes = [size_of(arg) for arg in run.handle.args[:2]]
    if any(size is None or run.part.split(size)[0] != 1 for size in sizes):
        raise Whole
    return run.call([run.rows(arg) for arg in run.handle.args[:2]], {})


def _normalized(run: _Run) -> Tensor:
    x, weight, bias, mean, var, *_ = run.handle.args
    size, noted = size_of(x), noted_of(run.handle)
    if run.handle.index or size is None or run.part.split(size)[0] != 1:
        raise Whole
    training, eps = run.handle.args[5], run.handle.args[7]
    weight, bias, rows = run.beside(weight), run.beside(bias), run.rows(x)
    if not training:
        mean, var = run.beside(mean), run.beside(var)
        return aten.native_batch_norm(rows, weight, bias, mean, var, False, 0.0, eps)[0]  # type: ignore[no-any-return]
    if noted is None or noted.statistics is None:
        raise Whole
    mean, deviation = noted.statistics  # the deviation's inverse
    scale = deviation if weight is None else deviation * weight
    return aten.native_batch_norm(rows, scale, bias, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]  # type: ignore[no-any-return]


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    "repeat": _repeated,
    **dict.fromkeys(["permute", "transpose", "t"], _permuted),
    **dict.fromkeys(["split", "split_with_sizes", "slice", "select", "narrow"], _cut_out),
    "cat": _put_together,
    **dict.fromkeys(_BY_ELEMENT, _by_element),
    **dict.fromkeys(_BY_SAMPLE, _by_sample),
    **dict.fromkeys(["native_batch_norm", "cudnn_batch_norm"], _normalized),
    "addmm": _product,
    "bmm": _products,
}
