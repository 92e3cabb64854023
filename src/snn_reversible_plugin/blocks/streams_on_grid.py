"""Residual blocks of a stock network whose stream is on the grid, so that it can be undone.

The one idea: the block runs its own forward; only its sums, stream plus branch, are computed on the
grid, under a tape (which then undoes them, :mod:`.blocks.streams`) as without one. Source: this
package's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from snn_reversible_plugin.blocks.residual import find_branches
from snn_reversible_plugin.blocks.streams import BITS, SUMS, ResidualSums, is_stream, snapped, stream_sum
from snn_reversible_plugin.grid import snap
from snn_reversible_plugin.modules.kinds import is_spiking
from snn_reversible_plugin.modules.registry import StaysStock
from snn_reversible_plugin.modules.swap import NAME, SwappedClass
from snn_reversible_plugin.tape import current, runs_eagerly
from snn_reversible_plugin.tape.surroundings import OwnMode


def carries_a_membrane(block: nn.Module) -> bool:
    """Whether a block is known to add a branch that is no spikes to its input.

    Sums of spikes alone are whole numbers: those are rebuilt from their bits, with no grid.
    """
    try:
        found = find_branches(block, type(block).__name__, None)
    except StaysStock:
        return False
    if found is None or found[1]:
        return False
    return not all(map(_fires_last, found[0]))


def _fires_last(branch: nn.Module) -> bool:
    """Whether what a branch ends with is a neuron, also inside an attention or an MLP.

    The last that a module registers is taken for the last that it runs. A wrong guess costs memory, not
    exactness: a stream that stays as it is, or spikes that are rounded to themselves.
    """
    while not is_spiking(branch):
        inner = list(branch.children())
        if not inner:
            return False
        branch = inner[-1]
    return True


class OnGrid(SwappedClass):
    """A residual block that takes and gives a stream on the grid."""

    treatment = "residual sums undone in the backward"
    arithmetic = "grid"

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            not isinstance(x, Tensor)
            or not (x.dtype is torch.float32 or _autocasts(x))
            or x.layout is not torch.strided
            or not runs_eagerly()
        ):
            return super().__call__(x, *args, **kwargs)  # type: ignore[misc]
        name = NAME.of(self) or type(self).__name__  # type: ignore[arg-type]
        with _on_grid(name, x) as stream:
            return super().__call__(stream, *args, **kwargs)  # type: ignore[misc]


def _autocasts(x: Tensor) -> bool:
    """Whether x is short of float32 because autocast chose so, and what follows can be given float32."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and torch.is_autocast_enabled(x.device.type)


@contextmanager
def _on_grid(name: str, x: Tensor) -> Iterator[Tensor]:
    tape = current()
    if tape is None:
        x = snap(x, BITS)
        with _Sums(x):
            yield x
        return
    sums = ResidualSums(name)
    with tape.overriding(dict.fromkeys(SUMS, sums)):
        if not is_stream(x):
            x = snap(x, BITS)
            with tape.paused():
                sums.start(tape, x)
        yield x


class _Sums(OwnMode, TorchDispatchMode):
    """The sums of one block where no tape records."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self._streams = [x]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        at = stream_sum(func, args, kwargs, self._is_stream) if func in SUMS else None
        if at is None:
            return func(*args, **kwargs)
        total = args[at] + snapped(args[1 - at])
        out = args[0].copy_(total) if SUMS[func] else total
        self._streams.append(out)
        return out

    def _is_stream(self, value: Any) -> bool:
        return any(value is stream for stream in self._streams)
