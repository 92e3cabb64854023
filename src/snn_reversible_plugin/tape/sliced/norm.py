"""A batch norm's forward: what is noted of it, and its result in the place of its input.

The one idea: channels don't see each other, so what a norm gives for some of them may be written over them
before the next ones. The first time of a shape it runs as a whole, and its slices are compared.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snn_reversible_plugin.ops.layouts import in_place_of, is_dense
from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.off_stack import OffStack
from snn_reversible_plugin.tape.outsiders import alias
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced.forward import StepOf, kind_of
from snn_reversible_plugin.tape.sliced.noted import Noted, note
from snn_reversible_plugin.tape.sliced.rows import Part, Whole, rows_of

if TYPE_CHECKING:
    from snn_reversible_plugin.tape.tape import Tape

_seen: dict[Any, bool] = {}  # whether channels by themselves have the bits of the whole
_proved: dict[Any, bool] = {}  # whether rows have, with the statistics noted


def batch_norm(func: Any, args: tuple[Any, ...], step_of: StepOf, over: bool) -> Any:
    """What a batch norm's operator gives.

    Args:
        func: the operator.
        args: the input [N, C, ...], weight, bias, running mean and variance, and how.
        step_of: bytes of a slice.
        over: the input may be written over.
    """
    x = args[0]
    if x.dim() < 2 or not is_dense(x) or x.nbytes < 2 * step_of(0, x.device):
        return func(*args)
    key = (func, step_of(x.nbytes, x.device), torch.get_num_threads(), *map(kind_of, args))
    if key not in _seen:
        if len(_seen) > 4096:
            _seen.clear()
        running = [one if one is None else one.clone() for one in args[3:5]]
        whole = func(*args)
        again = (*args[:3], *running, *args[5:])
        _seen[key] = whole[0].stride() == x.stride() and _are_alike(func, again, step_of, whole, args[3:5])
        return whole
    if not (over and _seen[key]):
        return func(*args)
    out = in_place_of(x)
    beside = []
    for part, found, *others in _in_slices(func, args, step_of):
        out[:, part] = found
        beside.append(others)
    return out, *map(torch.cat, zip(*beside, strict=True))


def _in_slices(func: Any, args: tuple[Any, ...], step_of: StepOf) -> Iterator[tuple[Any, ...]]:
    """Which channels, and what the operator gives for these."""
    x, *of_channels = args[:5]
    channels = x.shape[1]
    each = max(1, step_of(x.nbytes, x.device) * channels // x.nbytes)
    channels_last = x.dim() == 4 and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for start in range(0, channels, each):
        part = slice(start, start + each)
        some = [one if one is None else one[part] for one in of_channels]
        yield part, *func(x[:, part].contiguous(memory_format=layout), *some, *args[5:])


def _are_alike(
    func: Any, args: tuple[Any, ...], step_of: StepOf, whole: tuple[Tensor, ...], running: tuple[Any, ...]
) -> bool:
    """Whether slices give what the whole gave, and leave the same running statistics."""
    beside = []
    for part, found, *others in _in_slices(func, args, step_of):
        if not torch.equal(found, whole[0][:, part]):
            return False
        beside.append(others)
    found_beside = [*map(torch.cat, zip(*beside, strict=True)), *args[3:5]]
    pairs = zip(found_beside, (*whole[1:], *running), strict=True)
    return all(one is None or torch.equal(one, other) for one, other in pairs)


def note_normalized(tape: Tape | None, recipe: Replayed, x: Tensor, outputs: Sequence[Tensor]) -> None:
    """A batch norm ran on x: what it gave beside its result is noted, and whether the rows of that, of the
    channels' statistics, are the forward's bits."""
    out, mean, deviation = outputs[:3]
    if not isinstance(recipe.args[0], Handle):
        return
    noted = Noted(out.size(), (alias(mean), alias(deviation)) if mean.numel() else None)
    note(recipe, noted)
    part, key = Part(1, len(x), 0, min(len(x), 2)), _key(recipe.func, x, recipe.args[5])
    if key not in _proved:
        if len(_proved) > 4096:
            _proved.clear()
        try:
            with OffStack(tape), torch.no_grad():
                rows = rows_of(recipe, part, {recipe.args[0]: part.of(x.detach())})
                _proved[key] = torch.equal(rows, part.of(out.detach()))
        except Whole:
            _proved[key] = False
    noted.exact = _proved[key]


def is_proved(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a batch norm of such arguments was compared, and its rows have the forward's bits."""
    return _proved.get(_key(func, args[0], args[5]), False)


def _key(func: Any, x: Tensor, training: bool) -> Any:
    return func, x.size(), x.stride(), x.dtype, x.device, training
