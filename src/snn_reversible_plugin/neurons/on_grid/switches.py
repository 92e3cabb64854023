"""Switches of neurons on the grid: where steps on it may run, and by which of their two forms.

The one idea: every neuron on the grid has its step twice, reversible and as ordinary operations that
autograd differentiates. The second is the specification: ``verify`` holds the first to it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from snn_reversible_plugin.grid import check_bits
from snn_reversible_plugin.modules.swap import NAME, stock_type

BITS = 16

_local = threading.local()


@contextmanager
def autograd() -> Iterator[None]:
    """Inside, steps on the grid run as operations that autograd differentiates."""
    before = by_autograd()
    _local.by_autograd = True
    try:
        yield
    finally:
        _local.by_autograd = before


def by_autograd() -> bool:
    """Whether autograd differentiates steps on the grid here."""
    return getattr(_local, "by_autograd", False)


def bits_of(module: Any) -> int:
    """Binary digits behind the point of a neuron's grid: its ``grid_bits``, 16 by default.

    Raises:
        ValueError: it is no integer from 0 to 23.
    """
    bits = module.__dict__.get("grid_bits")
    if bits is None:
        bits = getattr(type(module), "grid_bits", BITS)
    check_bits(bits)
    return bits


def name_of(module: Any) -> str:
    """What errors call a module: its name in the converted model, else its type."""
    kind, name = stock_type(module).__name__, NAME.of(module)
    return f"{name} ({kind})" if name else kind
