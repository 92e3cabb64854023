"""Measuring what a training step holds and what it peaks at, by the allocators' own count.

The one idea: an allocator knows of every byte that a kernel asks it for, also of workspaces that no
operation returns. On a GPU CUDA's caching allocator keeps statistics. On the CPU the allocator tells the
profiler of each block that it hands out and gets back; resident set size would be noise. Counted is what
was born inside the measurement, so parameters and inputs are not, and gradients are.

Source: ``torch.profiler`` with ``profile_memory``.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch

from snn_reversible_plugin.ops.allocations import Allocation, start, stop

# NOTE [What the count on the CPU sees]
#
# 1. Every block of PyTorch's CPU allocator: tensors, and the workspaces of kernels, oneDNN's too. Not what
#    a library takes from the C heap by itself (MKL's packing buffers, numpy's temporaries), nor what the
#    profiler writes down.
# 2. What the thread does that entered the counter, and the threads of autograd's engine that work for it.
#    Work that a Python thread of the user's does beside it isn't seen: a profiler is a thread's own.
# 3. Blocks go by address. The allocator reports the death of a block that it has once reported, also in a
#    later measurement, when the address belongs to another block. So a death counts only where the birth
#    was seen, and a birth at the address of a live block ends that one: somebody freed it unseen.
# 4. The profiler hands out events when it stops, so it is stopped and started again whenever somebody asks.
#    That is how counters nest: all that are on share one profiler.


@dataclass(frozen=True)
class StepCost:
    """The price of one training step: bytes ``held`` between forward and backward, ``peak`` bytes,
    and wall ``seconds`` (of a run without the counter)."""

    held: int
    peak: int
    seconds: float


class AllocationCounter:
    """Counts the bytes that the CPU's allocator has given out, and not got back, since the counter is on.

    Counters nest. What is counted is what the thread that entered does, and autograd for it.

    Raises:
        RuntimeError: another profiler is on.

    Example:
        >>> import torch
        >>> with AllocationCounter() as counter:
        ...     x = torch.zeros(256)
        ...     counter.live
        ...     del x
        1024
        >>> counter.live, counter.peak
        (0, 1024)
    """

    def __init__(self) -> None:
        self._live = self._peak = self._births = 0
        self._blocks: dict[int, tuple[int, int]] = {}  # address: number of its birth, bytes
        self._changes: list[tuple[int, int]] = []  # number of the birth, bytes

    def __enter__(self) -> Self:
        _events.add(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _events.remove(self)

    @property
    def live(self) -> int:
        """Bytes alive now, or when the counter was left."""
        _events.deliver(self)
        return self._live

    @property
    def peak(self) -> int:
        """The most bytes that were alive at any time."""
        _events.deliver(self)
        return self._peak

    def peak_beyond(self, tensors: Iterable[torch.Tensor]) -> int:
        """The most bytes that were alive at any time, without the storages of ``tensors``, alive now."""
        _events.deliver(self)
        addresses = (tensor.untyped_storage().data_ptr() for tensor in tensors)
        left_out = {self._blocks[address][0] for address in addresses if address in self._blocks}
        live = peak = 0
        for birth, change in self._changes:
            if birth not in left_out:
                live += change
                peak = max(peak, live)
        return peak

    def count(self, event: Allocation) -> None:
        """Take note of one event of the allocator's."""
        birth, lost = self._blocks.pop(event.address, (-1, 0))
        if lost:
            self._change(birth, -lost, event)
        if event.size > 0:
            self._blocks[event.address] = self._births, event.size
            self._change(self._births, event.size, event)
            self._births += 1

    def _change(self, birth: int, size: int, event: Allocation) -> None:
        self._changes.append((birth, size))
        self._live += size
        self._peak = max(self._peak, self._live)


class _Events(threading.local):
    """The allocator's events on one thread, for all counters that are on there."""

    def __init__(self) -> None:
        self._counters: list[AllocationCounter] = []
        self._profile: Any = None

    def add(self, counter: AllocationCounter) -> None:
        self._stop()
        self._counters.append(counter)
        try:
            self._start()
        except BaseException:
            self._counters.remove(counter)
            raise

    def remove(self, counter: AllocationCounter) -> None:
        self._stop()
        self._counters.remove(counter)
        if self._counters:
            self._start()

    def deliver(self, counter: AllocationCounter) -> None:
        """Bring a counter up to date."""
        if counter in self._counters:
            self._stop()
            self._start()

    def _start(self) -> None:
        if torch.autograd._profiler_enabled():
            raise RuntimeError(
                "memory can't be counted while a profiler is on: the count is the profiler's. "
                "Leave torch.profiler.profile first."
            )
        self._profile = start()

    def _stop(self) -> None:
        running, self._profile = self._profile, None
        if running is None:
            return
        for event in stop(running):
            for counter in self._counters:
                counter.count(event)


_events = _Events()


class CudaStatistics:
    """The same count on a GPU, by the statistics of CUDA's caching allocator: of the current device."""

    def __enter__(self) -> CudaStatistics:
        self._before = 0
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return torch.cuda.memory_allocated() - self._before

    @property
    def peak(self) -> int:
        """The most bytes that were alive at any time."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before


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
    with AllocationCounter() as on_cpu, CudaStatistics() as on_cuda:
        loss = loss_of()
        counter = on_cuda if loss.is_cuda else on_cpu
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
