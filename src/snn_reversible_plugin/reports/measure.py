"""Measuring what a training step holds and what it peaks at, by counting allocations.

On a GPU CUDA's caching allocator keeps the count. On the CPU a dispatch mode counts every storage that
an operation returns, from its birth to its death; resident set size would be noise. Counted are
storages born inside the measurement, so parameters and inputs are not, and gradients are.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class StepCost:
    """The price of one training step: bytes ``held`` between forward and backward, ``peak`` bytes,
    and wall ``seconds`` (of a run without the counter)."""

    held: int
    peak: int
    seconds: float


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of live storages that were born while it is on.

    Example:
        >>> import torch
        >>> with AllocationCounter() as counter:
        ...     x = torch.zeros(256)
        >>> counter.live, counter.peak
        (1024, 1024)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _counts(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if _counts(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self._seen:
                    self._born(storage)
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def died(_ref: object) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)


def _counts(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def time_step(loss_of: Callable[[], torch.Tensor]) -> float:
    """Wall seconds of one forward and backward."""
    start = time.perf_counter()
    loss = loss_of()
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return time.perf_counter() - start


def count_step(loss_of: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """Bytes held between one forward and its backward, and bytes at the peak of both."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with AllocationCounter() as counter:
        loss = loss_of()
        if loss.is_cuda:
            held = torch.cuda.memory_allocated() - before
            loss.backward()
            torch.cuda.synchronize()
            return held, torch.cuda.max_memory_allocated() - before
        held = counter.live
        loss.backward()
    return held, counter.peak


def measure_step(loss_of: Callable[[], torch.Tensor]) -> StepCost:
    """Measure one training step, after one to warm up.

    Args:
        loss_of: runs the forward and returns a scalar loss. It is called three times, so it has to reset
            the network's states itself.

    Example:
        >>> import torch
        >>> layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
        >>> measure_step(lambda: layer(x).relu().sum()).held > 0
        True
    """
    time_step(loss_of)
    seconds = time_step(loss_of)
    held, peak = count_step(loss_of)
    return StepCost(held, peak, seconds)
