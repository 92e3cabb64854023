"""How long a training step takes, beside the same step of another kind.

The one idea: what else a machine does comes and goes, so the steps take turns, and each is compared with
the other of its round. Said is the median of the rounds' ratios with its quartiles; where these lie far
apart one figure would be an accident, and the span is said instead.

Source: this package's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FEWEST, MOST = 3, 11  # rounds
ENOUGH = 2.0  # seconds, after which there are no more rounds than the fewest
_NOISY = 0.15  # of the median, between the quartiles


@dataclass(frozen=True)
class TimeRatio:
    """How many times stock's time a step takes: the ``median`` over ``rounds``, and the quartiles ``low``
    and ``high``.

    Example:
        >>> print(TimeRatio.of([1.2, 1.3, 1.4], [1.0, 1.0, 1.0]))
        1.30x (quartiles 1.25x and 1.35x)
        >>> print(TimeRatio.of([1.2, 1.3, 2.4], [1.0, 1.0, 1.0]))
        between 1.2x and 1.9x: too noisy here
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: Iterable[float], stock: Iterable[float]) -> TimeRatio:
        """From the seconds of a step and of stock's, by round."""
        ratios = [ours / theirs for ours, theirs in zip(seconds, stock, strict=True)]
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0], 1)
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(median, low, high, len(ratios))

    @property
    def is_noisy(self) -> bool:
        """Whether the quartiles are too far apart for one figure."""
        return self.high - self.low > _NOISY * self.median

    def __str__(self) -> str:
        if self.is_noisy:
            return f"between {self.low:.1f}x and {self.high:.1f}x: too noisy here"
        if self.rounds == 1:
            return f"{self.median:.2f}x (one round)"
        return f"{self.median:.2f}x (quartiles {self.low:.2f}x and {self.high:.2f}x)"


def in_turns(steps: Sequence[Callable[[], float]], rounds: int | None = None) -> list[list[float]]:
    """Seconds of each step by round, where each has run before.

    Args:
        steps: take one, and return its seconds. Who goes first changes from round to round.
        rounds: how many; by default three where a round takes long, and up to eleven within two seconds.

    Example:
        >>> in_turns([lambda: 1.0, lambda: 2.0], rounds=2)
        [[1.0, 1.0], [2.0, 2.0]]
    """
    seconds: list[list[float]] = [[] for _ in steps]
    started = time.perf_counter()
    done = 0
    while done < (rounds or MOST):
        if rounds is None and done >= FEWEST and time.perf_counter() - started >= ENOUGH:
            break
        turn = list(zip(steps, seconds, strict=True))
        for step, found in turn if done % 2 == 0 else reversed(turn):
            found.append(step())
        done += 1
    return seconds
