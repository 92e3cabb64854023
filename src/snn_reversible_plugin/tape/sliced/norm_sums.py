"""The two sums over the batch that a batch norm's backward needs, taken where its gradient is made.

The one idea: a neuron's backward has, a slice at a time, the gradient of the norm's result and, on the way
to its current, what the norm was given. So the norm need not go through its slices once more for them.

Source: this package's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from snn_reversible_plugin.ops.layouts import storage_key
from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced.noted import noted_of
from snn_reversible_plugin.tape.sliced.sources import norm_before

PIECE = 1 << 18  # bytes of a slice to take at a time where a copy of it is made


class Sums:
    """Over the batch, of a gradient and of it along ``x - mean``, a channel each.

    Args:
        mean: of the channels of x [N, C, ...].
    """

    def __init__(self, mean: Tensor) -> None:
        self._mean = mean
        self.total = self.along = torch.zeros(mean.shape, dtype=torch.float64, device=mean.device)

    def add(self, g: Tensor, x: Tensor) -> None:
        """Some rows' gradients, and what the norm was given of them."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        mean = self._mean.to(wide).view([1, -1] + [1] * (x.dim() - 2))
        each = max(1, len(x) * PIECE // max(1, x.nbytes))
        for of_g, of_x in zip(g.split(each), x.split(each), strict=True):  # a moment's copy, twice as wide
            of_g = of_g.to(wide)
            self.total = self.total + of_g.sum(dims, dtype=torch.float64)
            self.along = self.along + (of_x.to(wide) - mean).mul_(of_g).sum(dims, dtype=torch.float64)


class _Left(NamedTuple):
    """Sums that wait for the norm's backward, with what tells the gradient that they are of: a memory that
    no other gets while this refers to it, unchanged, in one backward."""

    sums: Sums
    storage: StorageWeakRef
    told: tuple[int, ...]


class SumsForNorm:
    """Sums that a neuron's backward takes for the norm in front of it.

    Args:
        norm: the recipe of its result.
    """

    def __init__(self, norm: Replayed) -> None:
        noted = noted_of(norm)
        assert noted is not None and noted.statistics is not None
        self._given: Handle = norm.args[0]
        self._sums, self._is_whole = Sums(noted.statistics[0]), True

    def add(self, g: Tensor, found: dict[Handle, Tensor]) -> None:
        """A slice's gradient, and what was found on the way to its current."""
        x = found.get(self._given)
        if x is None:  # the norm's result stands, and nothing was computed
            self._is_whole = False
        else:
            self._sums.add(g.reshape(x.shape), x)

    def leave(self, g: Tensor) -> None:
        """All of a gradient went in, and is about to be handed out."""
        noted = noted_of(self._given)
        if noted is not None and self._is_whole:
            noted.left = _Left(self._sums, StorageWeakRef(g.untyped_storage()), _told(g))


def sums_for_norm(current: Handle) -> SumsForNorm | None:
    """Where a neuron's current is a batch norm's result and nobody else takes that."""
    norm = norm_before(current)
    return None if norm is None or noted_of(norm.args[0]) is None else SumsForNorm(norm)


def left_for(given: Handle, g: Tensor) -> Sums | None:
    """The sums that were left for the norm that was given this, if they are of this gradient; once."""
    noted = noted_of(given)
    left = None if noted is None else noted.left
    if noted is None or left is None:
        return None
    noted.left = None
    return left.sums if left.told == _told(g) and not left.storage.expired() else None


def _told(g: Tensor) -> tuple[int, ...]:
    return storage_key(g), g.data_ptr(), g.numel(), g._version, torch._C._current_graph_task_id()
