"""The forward of a convolution or a pooling on slices of the batch.

The one idea: a kernel may lay out its whole input and output anew, which is more than both together, and
its input may be bits that are unpacked for it. Slices are taken where they were seen to give the forward's
bits: the first time of a shape it runs as a whole, and its slices are compared. Source: this package's own.
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
    """What an operator of some shapes gives, each by size, strides and dtype, in slices."""

    made: list[tuple[torch.Size, tuple[int, ...], dict[str, Any]]]
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
    found = _in_slices(func, args, step_of, between) if _is_large(args, step_of) else None
    if found is not None:
        return found[0]
    if between is not None:
        between.unpack(args[0])
    return func(*args)  # type: ignore[no-any-return]


def pooling(func: Any, args: tuple[Any, ...], step_of: StepOf, between: Between) -> Any:
    """A pooling: of spikes that are in bits as :func:`convolution`, and else as a whole."""
    x = args[0]
    found = None
    if x.dim() == 4 and len(x) > 3 and is_plain(x) and x.nbytes >= 2 * step_of(0, x.device):
        is_known = _key(func, args, step_of) in _seen
        found = _in_slices(func, args, step_of, between) if between.are_in_bits(x) or not is_known else None
    if found is None:
        between.unpack(x)
        return func(*args)
    return found if len(found) > 1 else found[0]


def _key(func: Any, args: tuple[Any, ...], step_of: StepOf) -> Any:
    return func, step_of(0, args[0].device), torch.get_num_threads(), *map(kind_of, args)


def _in_slices(
    func: Any, args: tuple[Any, ...], step_of: StepOf, between: Between | None
) -> tuple[Tensor, ...] | None:
    """What an operator gives, in slices or, the first time, as a whole; None: not to be had in slices."""
    x, *others = args
    key = _key(func, args, step_of)
    if key not in _seen:
        if len(_seen) > 4096:
            _seen.clear()
        if between is not None:
            between.unpack(x)
        whole = _as_tuple(func(*args))
        _seen[key] = _result(func, args, whole, step_of)
        return whole
    known = _seen[key]
    if known is None:
        return None
    made = tuple(torch.empty_strided(*like, device=x.device, **kind) for *like, kind in known.made)
    for part in known.parts:
        rows = part.of(x) if between is None else between.rows(x, part)
        _put(part, func(rows, *others), made)
        del rows  # before the next ones are made
    return made


def _put(part: Part, found: Any, made: tuple[Tensor, ...]) -> None:
    for one, out in zip(_as_tuple(found), made, strict=True):
        part.put(one, out)


def _as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


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


def _result(func: Any, args: tuple[Any, ...], whole: tuple[Tensor, ...], step_of: StepOf) -> _Result | None:
    x, *others = args
    nbytes = max(one.nbytes for one in (x, *whole))
    step = step_of(nbytes, x.device)
    if not all(map(is_plain, whole)) or nbytes < 2 * step:
        return None
    rows = len(x)
    slices = min(rows // 2, -(-nbytes // step))  # never one row alone
    ends = [rows * at // slices for at in range(slices + 1)]
    parts = [Part(1, rows, *ends[at : at + 2]) for at in range(slices)]
    try:
        for part in parts:
            alone = _as_tuple(func(part.of(x), *others))
            if not all(torch.equal(one, part.of(all_)) for one, all_ in zip(alone, whole, strict=True)):
                return None
    except Whole:
        return None
    return _Result([(one.size(), one.stride(), {"dtype": one.dtype}) for one in whole], parts)


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
