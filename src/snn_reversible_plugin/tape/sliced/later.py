"""Gradients of weights that are computed when somebody has a use for them, and not in the backward's turn.

The one idea: where a weight is larger than what goes through its layer, the layer's input and the gradient
of its output are less to hold than the weight's gradient is. Source: a backward in two parts, as in Qi et
al., "Zero Bubble Pipeline Parallelism", ICLR 2024, who split it for time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from snn_reversible_plugin.ops.layouts import is_plain

Computed = Callable[[], Tensor]

_local = threading.local()


class _Waiting:
    """What waits in one backward: by the weight's address, which is its own as long as it lives."""

    def __init__(self, addresses: Set[int]) -> None:
        self.addresses = addresses
        self.found: dict[int, Computed] = {}


@contextmanager
def waiting(addresses: Set[int]) -> Iterator[dict[int, Computed]]:
    """In a backward on this thread: weights at these addresses get no gradient, but how to compute it."""
    before, now = getattr(_local, "waiting", None), _Waiting(addresses)
    _local.waiting = now
    try:
        yield now.found
    finally:
        _local.waiting = before


def waits_for(weight: Tensor) -> Callable[[Computed], None] | None:
    """Who takes how to compute a weight's gradient; None: nobody, so that it is computed now."""
    now: _Waiting | None = getattr(_local, "waiting", None)
    if now is None or not is_plain(weight):
        return None
    address = weight.data_ptr()
    if address not in now.addresses or address in now.found:
        return None
    return partial(now.found.__setitem__, address)
