"""Switches of neurons on the grid: where steps on it may run, and by which of their two forms.

The one idea: every neuron on the grid has its step twice, reversible and as ordinary operations that
autograd differentiates. The second is the specification: ``verify`` holds the first to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from snn_reversible_plugin.grid import check_bits
from snn_reversible_plugin.modules.swap import NAME, stock_type
from snn_reversible_plugin.ops.interrupts import Switch

BITS = 16

_by_autograd = Switch()


def autograd() -> AbstractContextManager[None]:
    """Context manager: inside, steps on the grid run as operations that autograd differentiates."""
    return _by_autograd.on()


def by_autograd() -> bool:
    """Whether autograd differentiates steps on the grid here."""
    return _by_autograd.is_on()


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
