"""Several forwards before one backward: what the step takes that they are of.

The one idea: nothing is kept of them, so that what the first such step took is what the next ones take.

Source: this package's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from snn_reversible_plugin.tape.measured import Measured
from snn_reversible_plugin.tape.pending import Pending

# NOTE [The first step of several forwards]
#
# 1. All of its forwards are on the thread of the first one: a profiler is a thread's own.
# 2. Between two of them none is on. What was given out there has been so by the allocator's count, and what
#    of it goes while a later forward runs counts on: what is foreseen may be too much by that.


class Together:
    """The first step with several forwards, all of them on the thread that this is made on.

    Args:
        first: the first forward.

    Attributes:
        lives: bytes that live beside what the step takes.
        peak: what it takes in all, where that is known.
        is_outgrown: whether the next step starts from more than this one, and is to be measured itself.
    """

    def __init__(self, first: Pending) -> None:
        self.first = first
        self._measured = first.measured
        self._thread = threading.get_ident()
        self.lives = 0
        self.peak: int | None = None
        self.is_outgrown = False

    @property
    def products(self) -> tuple[Any, ...]:
        """Of the first forward."""
        return self.first.products

    @property
    def is_here(self) -> bool:
        """Whether its forwards are this thread's."""
        return self._thread == threading.get_ident()

    @property
    def is_open(self) -> bool:
        """Whether the step is not over, as far as anybody knows."""
        return self._measured is not None

    def goes_on(self) -> Measured | None:
        """Another forward of the step begins; None: it is not measured."""
        if self._measured is not None and not self._measured.goes_on():
            self._measured = None
        return self._measured

    def computed(self, args: Iterable[Any]) -> None:
        """An operation of it takes these."""
        self.first.sizes.meets(args)

    def failed(self) -> None:
        """A forward of the step raised."""
        self._measured = None

    def step_begins(self, left: int) -> None:
        """The next step does, so that the first is over. ``left``: bytes that forwards left alive."""
        measured, self._measured = self._measured, None
        if measured is None or not measured.is_whole:
            return
        sizes = self.first.sizes
        measured.gradients = sizes.learned, sizes.gradients
        self.lives = max(sizes.lives, self.first.before - sizes.gradients) + measured.gone
        taken = measured.peak(self.lives)
        self.peak = None if taken is None else self.lives + taken
        self.is_outgrown = self.first.is_outgrown(left, self.peak)
