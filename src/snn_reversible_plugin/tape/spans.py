"""What values an operation can give, as far as that makes them small integers.

The one idea: ``round(clamp(x, 0, 4))`` is one of five numbers whatever x is. A span is followed from the
operation that bounds a value, through sums and products with numbers, to the one that rounds it. Nothing
looks at a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from snn_reversible_plugin.ops.levels import MOST_BITS, bits_for

# NOTE [Bounds that hold in floating point]
#
# 1. Rounding to a dtype is monotone: from x <= c follows fl(x op d) <= fl(c op d). So a bound is good where
#    the dtype has it exactly, which those of eight significant bits are in each: others are given up.
# 2. NaN passes through all of these, and a bound of 0 may be -0.0. Both have codes of their own.
# 3. A rounding operation gives a whole number, also where nothing bounds it yet: clamp(round(x), 0, 4).


class Span(NamedTuple):
    """The least and the largest value, and whether all are whole numbers. Any value may be NaN as well."""

    low: float
    high: float
    whole: bool = False

    def levels(self) -> tuple[int, int] | None:
        """The integers that it consists of, if a few bits hold them."""
        if (
            not self.whole
            or not math.isfinite(self.high - self.low)
            or self.high - self.low > 1 << MOST_BITS
        ):
            return None
        low, high = int(self.low), int(self.high)
        return (low, high) if bits_for(low, high) <= MOST_BITS else None


ANY = Span(-math.inf, math.inf)


def span_after(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], of: Span) -> Span | None:
    """The span of an operation's result, given its first argument's; None: nothing is known."""
    rule = RULES.get(name)
    span = None if rule is None else rule(of, *args[1:], **kwargs)
    return span if span is not None and all(map(_exact, span[:2])) else None


def _exact(bound: float) -> bool:
    """Whether each floating-point dtype has this number."""
    if math.isinf(bound) or not bound:
        return True
    mantissa, exponent = math.frexp(bound)
    return (mantissa * 256).is_integer() and abs(exponent) < 10


def _clamp(of: Span, low: Any = None, high: Any = None, **named: Any) -> Span | None:
    low, high = named.get("min", low), named.get("max", high)
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        return None
    if not low <= high:
        return None
    whole = of.whole and all(math.isinf(bound) or float(bound).is_integer() for bound in (low, high))
    return Span(min(max(of.low, low), high), min(max(of.high, low), high), whole)


def _rounding(function: Callable[[Any], int]) -> Callable[..., Span | None]:
    def rule(of: Span, **named: Any) -> Span | None:
        if named:  # to decimals
            return None
        low, high = (x if math.isinf(x) else function(x) for x in of[:2])
        return Span(low, high, whole=True)

    return rule


def _linear(function: Callable[[float, float], float], keeps_whole: bool) -> Callable[..., Span | None]:
    def rule(of: Span, number: Any, *more: Any, **named: Any) -> Span | None:
        if more or named or not isinstance(number, (int, float)) or isinstance(number, bool) or of is ANY:
            return None
        if not number or not math.isfinite(number):
            return None
        low, high = sorted((function(of.low, number), function(of.high, number)))
        return Span(low, high, keeps_whole and of.whole and float(number).is_integer())

    return rule


ROUNDS: dict[str, Callable[[Any], int]] = {
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
}
RULES: dict[str, Callable[..., Span | None]] = {
    **{name: _rounding(function) for name, function in ROUNDS.items()},
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda of, high: _clamp(of, None, high),
    "hardtanh": lambda of, low=-1, high=1: _clamp(of, low, high),
    "relu": lambda of: _clamp(of, 0, None),
    "sigmoid": lambda _: Span(0.0, 1.0),
    "add": _linear(lambda x, number: x + number, keeps_whole=True),
    "sub": _linear(lambda x, number: x - number, keeps_whole=True),
    "mul": _linear(lambda x, number: x * number, keeps_whole=True),
    "div": _linear(lambda x, number: x / number, keeps_whole=False),
}

# Those whose results are stored, where a few bits hold them: sums and products of such are computed again.
STORED = {*ROUNDS, "clamp", "clamp_min", "clamp_max", "hardtanh", "relu"}
