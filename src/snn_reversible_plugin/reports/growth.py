"""How what a training step has alive grows with its batch.

The one idea: a step does the same in a small batch as in a larger one, only with larger tensors. So what
is alive at each of its moments is a line over batches, and the peak is the highest of these lines. In small
batches it may be one that hardly grows, where the parameters' gradients stand; a line through two peaks
would be taken for the step's.

For example, gradients of 5 MB stand beside 0.01 MB a sample at the end of the backward, and 1 MB beside
0.03 MB a sample at its beginning: up to 200 samples the peak is at the end, from there on at the beginning,
where it grows three times as fast.

Source: this package's own.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from snn_reversible_plugin.ops.allocations import Allocation, start, stop
from snn_reversible_plugin.reports.measure import AllocationCounter, CudaStatistics
from snn_reversible_plugin.reports.trial import Step


@dataclass(frozen=True)
class Taken:
    """What a step with a batch takes, in bytes.

    ``lives``: what lives anyway, inputs too; it is in ``peak``. ``fixed``: parameters, buffers and
    gradients, ``grows``: all else at its own peak. ``moments``: what is alive after each event of the
    allocator's, and ``order`` which block it was of, negative where it was freed.
    """

    batch: int
    lives: int
    peak: int
    fixed: int
    grows: int
    moments: Tensor
    order: list[int]


class Growth:
    """What a batch takes, as two others say: the one from which on, and another.

    ``is_known``: both did the same, event by event.
    """

    def __init__(self, at: Taken, other: Taken) -> None:
        self._batch = at.batch
        apart = at.batch - other.batch
        self.is_known = at.order == other.order
        if self.is_known:
            more = at.peak - at.lives - at.moments.max()  # what the device counts and no event says
            self._now = at.moments + (at.lives + more)
            self._rates = (at.moments - other.moments + (at.lives - other.lives)) / apart
        else:
            # Kernels or slices went other ways. What grows fastest may be hidden below the gradients.
            rates = at.peak - other.peak, at.grows - other.grows
            self._now = torch.tensor([float(at.peak)], dtype=torch.float64)
            self._rates = torch.tensor([max(rates) / apart], dtype=torch.float64)

    def at(self, batch: int) -> int:
        """Bytes at the peak of a step with a batch."""
        return math.ceil((self._now + (batch - self._batch) * self._rates).max().item())

    def at_most(self, limit: int) -> float:
        """The largest batch within a limit; infinite where nothing grows."""
        grows = self._rates > 0
        room = (limit - self._now[grows]) / self._rates[grows]
        return self._batch + math.floor(room.min().item()) if len(room) else math.inf


def measure(step: Step, batch: int, device: torch.device) -> Taken:
    """What the second step with a batch takes: the first of a shape may choose for later ones."""
    lives = _bytes(step.alive())
    own = _bytes([*step.model.parameters(), *step.model.buffers()])
    with step.unchanged():
        step.run().backward()
    with step.unchanged():
        gc.collect()
        with CudaStatistics() as on_cuda:
            moments = _moments(lambda: step.run().backward(), device)
            peak = on_cuda.peak if device.type == "cuda" else moments.peak
        dense = [one.grad for one in step.model.parameters() if _has_storage(one.grad)]
        grows = lives - own + moments.peak_beyond(dense)
        fixed = own + _bytes(dense)
    return Taken(batch, lives, lives + peak, fixed, grows, moments.alive(), moments.order)


def _has_storage(gradient: Tensor | None) -> TypeGuard[Tensor]:
    """Neither none nor sparse, and not freed by ``step_in_backward``."""
    return gradient is not None and gradient.layout == torch.strided and type(gradient) is Tensor


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Moments(AllocationCounter):
    """Keeps what is alive after each event, and which block it was of."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[int] = [0]
        self.order: list[int] = [0]

    def _change(self, birth: int, size: int, event: Allocation) -> None:
        super()._change(birth, size, event)
        self._alive.append(self._live)
        self.order.append(birth if size > 0 else ~birth)

    def alive(self) -> Tensor:
        return torch.tensor(self._alive, dtype=torch.float64)


def _moments(run: Callable[[], None], device: torch.device) -> _Moments:
    moments = _Moments()
    if device.type == "cpu":
        with moments:
            run()
        return moments
    if torch.autograd._profiler_enabled():
        raise RuntimeError("memory can't be counted while a profiler is on: leave it first")
    running = start()
    try:
        run()
    finally:
        events = stop(running, device.type)
    for event in events:
        moments.count(event)
    return moments
