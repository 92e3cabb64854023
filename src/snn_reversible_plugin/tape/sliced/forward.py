"""A convolution's forward on slices of the batch, so that its kernel's workspace is that of a slice.

The one idea: a kernel may lay out its whole input and output anew, which is more than both together. Slices
are taken where they were seen to give the forward's bits: the first time of a shape it runs as a whole, and
its slices are compared. Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.operators import aten
from snn_reversible_plugin.tape.sliced.between import Between
from snn_reversible_plugin.tape.sliced.rows import Part, Whole
from snn_reversible_plugin.tape.surroundings import OwnMode


class _Result(NamedTuple):
    """What a convolution of some shapes gives, in slices."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Part]


_seen: dict[Any, _Result | None] = {}  # None: other bits in slices, or nothing to gain


StepOf = Callable[[int, torch.device], int]


def convolution(args: tuple[Any, ...], step_of: StepOf, between: Between | None = None) -> Tensor:
    """The convolution of its arguments, in slices where these have its bits.

    Args:
        args: the operator's.
        step_of: bytes of a slice.
        between: says whether the input is in bits: it is unpacked, a slice at a time if that serves.
    """
    func = aten.convolution.default
    x, *others = args
    known = key = None
    if is_large := _is_large(args, step_of):
        key = (step_of(0, x.device), torch.get_num_threads(), *map(kind_of, args))
        known = _seen.get(key)
    if known is None:
        if between is not None:
            between.unpack(x)
        whole = func(*args)
        if is_large and key not in _seen:
            if len(_seen) > 4096:
                _seen.clear()
            _seen[key] = _result(args, whole, step_of)
        return whole  # type: ignore[no-any-return]
    out = torch.empty_strided(known.size, known.stride, dtype=known.dtype, device=x.device)
    for part in known.parts:
        rows = part.of(x) if between is None else between.rows(x, part)
        part.put(func(rows, *others), out)
    return out


def _is_large(args: tuple[Any, ...], step_of: StepOf) -> bool:
    x, weight = args[:2]
    if x.dim() < 3 or len(x) < 4 or not is_plain(x) or not is_plain(weight):
        return False
    step = step_of(0, x.device)
    return x.nbytes >= 2 * step or x.nbytes // x.shape[1] * len(weight) >= 2 * step


def kind_of(arg: Any) -> Any:
    """What of an operator's argument decides which kernel runs."""
    if not isinstance(arg, Tensor):
        return repr(arg)
    return arg.shape, arg.stride(), arg.dtype, arg.device


def _result(args: tuple[Any, ...], whole: Tensor, step_of: StepOf) -> _Result | None:
    func, (x, *others) = aten.convolution.default, args
    nbytes = max(x.nbytes, whole.nbytes)
    step = step_of(nbytes, x.device)
    if not is_plain(whole) or nbytes < 2 * step:
        return None
    rows = len(x)
    slices = min(rows // 2, -(-nbytes // step))  # never one row alone
    ends = [rows * at // slices for at in range(slices + 1)]
    parts = [Part(1, rows, *ends[at : at + 2]) for at in range(slices)]
    try:
        if not all(torch.equal(func(part.of(x), *others), part.of(whole)) for part in parts):
            return None
    except Whole:
        return None
    return _Result(whole.size(), whole.stride(), whole.dtype, parts)


class ConvolutionsInSlices(OwnMode, TorchDispatchMode):
    """Inside, unrecorded convolutions run in slices; ``step_of`` as for :func:`convolution`."""

    def __init__(self, step_of: StepOf) -> None:
        super().__init__()
        self._step_of = step_of

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.convolution.default and not kwargs:
            return convolution(args, self._step_of)
        return func(*args, **(kwargs or {}))
