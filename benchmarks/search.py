"""The largest batch, or number of time steps, whose training step stays within a given memory.

Each try is one real step whose peak the allocator counts, so no process limit is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .measure import Result, peak_within
from .methods import COMPILED, CannotRun, prepare
from .workloads import Workload

PART = 8  # of the batch or of the steps: what fits into the whole's peak would take hours to find


def largest_within(peak_of: Callable[[int], int | None], budget: int, start: int, most: int) -> int:
    """The largest size whose peak is within the budget, 0 if none is.

    Peaks are taken to grow with the size. The next size to try is read off the line through the last two
    peaks, and bisection takes over where it would leave the bracket.

    Args:
        peak_of: the peak in bytes of a step of this size, None if it is over the budget.
        budget: bytes.
        start: the first size to try.
        most: the size beyond which nobody cares.

    Example:
        >>> largest_within(lambda n: 100 + 7 * n if 100 + 7 * n <= 500 else None, 500, 8, 1000)
        57
    """
    fits, too_large = 0, most + 1
    seen: list[tuple[int, int]] = []
    size = min(start, most)
    while too_large - fits > 1:
        peak = peak_of(size)
        if peak is None or peak > budget:
            too_large = size
        else:
            fits = size
            seen.append((size, peak))
        size = _next(seen, budget, fits, too_large, most)
    return fits


def _next(seen: list[tuple[int, int]], budget: int, fits: int, too_large: int, most: int) -> int:
    middle = (fits + too_large) // 2
    guess = middle if too_large <= most else min(2 * fits, most)
    if seen:
        (n1, p1), (n2, p2) = seen[-2:] if len(seen) > 1 else [(0, 0), seen[-1]]
        if p2 > p1 and n2 > n1:
            guess = n2 + int((budget - p2) * (n2 - n1) / (p2 - p1))
            # One past the guess settles it when the guess has been tried.
            guess = guess + 1 if guess == fits else guess
    return guess if fits < guess < too_large else max(fits + 1, middle)


def find_largest(
    workload: Workload,
    shape: tuple[int, ...],
    device: str,
    results: Iterable[Result],
    tick: Callable[[str], None],
) -> None:
    """Fill in ``largest`` for every method that ran: what fits into stock's peak at a part of the shape.

    But for what is compiled, which each size would compile anew.
    """
    measured = {
        result.method: result
        for result in results
        if result.peak is not None and result.method not in COMPILED
    }
    if workload.grows is None or "stock" not in measured:
        return
    torch.manual_seed(0)
    stock = workload.make().to(device)
    dim = workload.grows

    def batch(size: int) -> torch.Tensor:
        return workload.batch((*shape[:dim], size, *shape[dim + 1 :]), device)

    start = max(1, shape[dim] // PART)
    budget = int(_allocations(workload, stock, batch(start)))
    for name, result in measured.items():
        tick(f"{workload.name}: {name}, the largest that fits")
        if name == "stock":
            result.largest = start
            continue
        try:
            training = prepare(name, workload, stock, batch(start))
        except CannotRun:
            continue
        result.largest = largest_within(
            lambda size, training=training: peak_within(training, batch(size), budget),  # type: ignore[misc]
            budget,
            start,
            128 * start,
        )


def _allocations(workload: Workload, stock: torch.nn.Module, x: torch.Tensor) -> float:
    peak = peak_within(prepare("stock", workload, stock, x), x, float("inf"))
    assert peak is not None
    return peak
