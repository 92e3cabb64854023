"""Switches of neurons on the grid: where steps on it may run, and by which of their two forms.

The one idea: every neuron on the grid has its step twice, reversible and as ordinary operations that
autograd differentiates. The second is the specification: ``verify`` holds the first to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from torch import Tensor

from snn_reversible_plugin.grid import bits_for, check_bits
from snn_reversible_plugin.grid.numbers import BITS
from snn_reversible_plugin.modules.swap import NAME, ON_GRID, stock_type
from snn_reversible_plugin.ops.interrupts import Switch

# NOTE [What is fixed at the conversion]
#
# 1. The grid's bits follow the neuron's threshold: `grid.bits_for`. A threshold that is learned moves on,
#    the grid stays: another one would be another function, in the middle of a training. Converting again
#    chooses again, and `grid_bits` of a neuron goes before.
# 2. What a step on a device writes down has a size that the host knows without looking at the device: so
#    many bits a digit as the decays of the conversion ask for, and one more for a decay that is learned.
#    A decay that forgets more later is found by the look in the backward.
#    Say beta = 0.6 is learned: 1 / 0.6 takes one bit a digit. Two are reserved, which do down to 0.25.
# 3. A threshold that nothing is meant to reach says nothing of the membrane: a readout's 20000 stands over
#    membranes of 1, and would round them to quarters. Thresholds of 128 or more stay off the grid, whose
#    steps would be wider than those of TF32 at 1. `grid_bits` puts such a neuron on it.

FEWEST = 10
"""The fewest digits behind the point that a threshold puts a neuron on the grid with."""

_by_autograd = Switch()


def autograd() -> AbstractContextManager[None]:
    """Context manager: inside, steps on the grid run as operations that autograd differentiates."""
    return _by_autograd.on()


def by_autograd() -> bool:
    """Whether autograd differentiates steps on the grid here."""
    return _by_autograd.is_on()


class Fixed(NamedTuple):
    """What the conversion fixed of a neuron.

    Attributes:
        bits: binary digits behind the point.
        decays: the smallest that each state's records on a device have room for; 0 where there is none.
    """

    bits: int
    decays: dict[str, float]


def fix(module: Any, scale: Iterable[Any], decays: dict[str, Any]) -> None:
    """Fix a neuron's grid, as it is set now. Waits for its device.

    Args:
        module: the neuron.
        scale: its thresholds and values of reset: numbers or tensors.
        decays: of its states: numbers or tensors.
    """
    smallest = {}
    for name, decay in decays.items():
        least = max(_extremes(decay)[0], 0.0)
        learned = isinstance(decay, Tensor) and decay.requires_grad
        smallest[name] = least / 2 if learned else least
    ON_GRID.set(module, Fixed(bits_for(_largest(scale)), smallest))


def why_too_coarse(module: Any, *scale: Any) -> str | None:
    """Why a neuron's grid might say too little of its membrane, or None. Waits for its device.

    Args:
        module: the neuron.
        scale: its thresholds and values of reset: numbers or tensors.
    """
    bits = bits_for(largest := _largest(scale))
    if hasattr(module, "grid_bits") or bits >= FEWEST:
        return None
    return (
        f"its threshold, or its reset, is {largest:g}: multiples of 2^-{bits} may be too coarse for its "
        "membrane (grid_bits of the neuron sets others)"
    )


def _largest(scale: Iterable[Any]) -> float:
    return max((_extremes(value)[1] for value in scale), default=1.0)


def _extremes(value: Any) -> tuple[float, float]:
    """The smallest value, and the largest magnitude; of a tensor without values, those of 1."""
    if not isinstance(value, Tensor):
        return float(value), abs(float(value))
    if value.is_meta or not value.numel():
        return 1.0, 1.0
    value = value.detach().float()
    return float(value.min()), float(value.abs().max())


def bits_of(module: Any) -> int:
    """Binary digits behind the point of a neuron's grid: its ``grid_bits``, else what the conversion fixed.

    Raises:
        ValueError: it is no integer from 0 to 23.
    """
    bits = module.__dict__.get("grid_bits")
    if bits is None:
        fixed: Fixed | None = ON_GRID.of(module)
        bits = getattr(type(module), "grid_bits", BITS if fixed is None else fixed.bits)
    check_bits(bits)
    return bits


def smallest_decay(module: Any, state: str) -> float:
    """The smallest decay of a state that its records on a device have room for."""
    fixed: Fixed | None = ON_GRID.of(module)
    return 0.5 if fixed is None else fixed.decays.get(state, 1.0)


def name_of(module: Any) -> str:
    """What errors call a module: its name in the converted model, else its type."""
    kind, name = stock_type(module).__name__, NAME.of(module)
    return f"{name} ({kind})" if name else kind
