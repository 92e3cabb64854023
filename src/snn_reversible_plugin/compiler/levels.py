"""Which values are small integers by construction: spikes, their sums, integer spikes, masks of a dropout.

The one idea: an interval and a promise, carried through the graph. A comparison gives 0 or 1; a cast, a
stack or a slice of such values has the same levels; a sum adds the ends; ``round(clamp(x, 0, 4))`` has
five. Nothing is ever assumed of what a value looks like: what no rule knows may be any number. Source:
interval arithmetic (Moore 1966).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from snn_reversible_plugin.compiler.graph import TAKEN, name_of, tensor_of


@dataclass(frozen=True)
class Levels:
    """All values lie from ``lowest`` to ``highest``; are they ``whole`` numbers, and may they be ``nan``?

    Example:
        >>> Levels(0, 1, whole=True).bits
        1
        >>> (Levels(0, 1, whole=True) + Levels(0, 4, whole=True)).bits
        4
        >>> ANYTHING.bits is None
        True
    """

    lowest: float
    highest: float
    whole: bool = False
    nan: bool = False

    @property
    def count(self) -> float:
        """How many codes they take, one of them for NaN where there may be one."""
        return self.highest - self.lowest + 1 + self.nan if self.whole else math.inf

    @property
    def bits(self) -> int | None:
        """Bits of a code: 1, 2, 4 or 8; None where no byte holds one."""
        return next((bits for bits in (1, 2, 4, 8) if self.count <= 1 << bits), None)

    @property
    def is_constant(self) -> bool:
        """Whether there is one value only."""
        return self.lowest == self.highest and not self.nan

    def __or__(self, other: Levels) -> Levels:
        return Levels(
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.whole and other.whole,
            self.nan or other.nan,
        )

    def __add__(self, other: Levels) -> Levels:
        ends = (self.lowest, self.highest, other.lowest, other.highest)
        nan = self.nan or other.nan or any(map(math.isinf, ends))
        both = self.whole and other.whole
        return Levels(self.lowest + other.lowest, self.highest + other.highest, both, nan)

    def __neg__(self) -> Levels:
        return replace(self, lowest=-self.highest, highest=-self.lowest)

    def __mul__(self, other: Levels) -> Levels:
        ends = [a * b for a in (self.lowest, self.highest) for b in (other.lowest, other.highest)]
        if any(not math.isfinite(end) for end in ends):
            return ANYTHING
        return Levels(min(ends), max(ends), self.whole and other.whole, self.nan or other.nan)

    def within(self, lowest: float, highest: float) -> Levels:
        """After a clamp."""
        low, high = (min(max(end, lowest), highest) for end in (self.lowest, self.highest))
        ends_whole = all(float(end).is_integer() for end in (low, high) if math.isfinite(end))
        return Levels(low, high, self.whole and ends_whole, self.nan)

    def rounded(self, how: Callable[[float], int]) -> Levels:
        """After ``round``, ``floor`` and the like."""
        low, high = (how(end) if math.isfinite(end) else end for end in (self.lowest, self.highest))
        return Levels(low, high, True, self.nan)


ANYTHING = Levels(-math.inf, math.inf, nan=True)
TRUTH = Levels(0, 1, whole=True)
# Above this a half-precision float may not hold a whole number.
_EXACT = 256
_ROUNDED: dict[str, Callable[[float], int]] = {
    "round": round, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc,
}  # fmt: skip
_UNIONS = frozenset(["cat", "stack", "maximum", "minimum", "select_scatter", "slice_scatter"])
_FIRST_OF_PAIR = frozenset(["max_pool2d_with_indices", "max_pool3d_with_indices", "max", "min"])


def levels_of(graph: fx.Graph) -> dict[fx.Node, Levels]:
    """The levels of every node of a graph that has a bound or is whole."""
    found: dict[fx.Node, Levels] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        levels = _levels(node, found)
        if levels is not ANYTHING:
            found[node] = levels
    return found


def _levels(node: fx.Node, found: dict[fx.Node, Levels]) -> Levels:
    value, name = tensor_of(node), name_of(node)
    if value is not None and value.dtype is torch.bool:
        return TRUTH
    if value is not None and value.is_complex():
        return ANYTHING
    rule = _RULES.get(name)
    if rule is None:
        return ANYTHING
    levels = rule(node, lambda argument: _of(argument, found))
    beyond = value is not None and max(abs(levels.lowest), abs(levels.highest)) > _EXACT
    return replace(levels, whole=False) if beyond and levels.whole else levels


def _of(argument: Any, found: dict[fx.Node, Levels]) -> Levels:
    if isinstance(argument, bool):
        return Levels(int(argument), int(argument), True)
    if isinstance(argument, (int, float)):
        if math.isnan(argument):
            return ANYTHING
        return Levels(
            argument, argument, float(argument).is_integer() if math.isfinite(argument) else False
        )
    return found.get(argument, ANYTHING) if isinstance(argument, fx.Node) else ANYTHING


Of = Callable[[Any], Levels]


def _first(node: fx.Node, of: Of) -> Levels:
    return of(node.args[0])


def _filled(node: fx.Node, of: Of) -> Levels:
    return of(node.args[1])


def _cast(node: fx.Node, of: Of) -> Levels:
    levels, value = of(node.args[0]), tensor_of(node)
    if value is None or levels is ANYTHING:
        return ANYTHING
    # What an integer makes of NaN is anybody's guess.
    if not value.is_floating_point() and (levels.nan or not levels.whole):
        return ANYTHING
    return levels


def _sum(sign: int) -> Callable[[fx.Node, Of], Levels]:
    def rule(node: fx.Node, of: Of) -> Levels:
        other, alpha = of(node.args[1]), node.kwargs.get("alpha", 1)
        return of(node.args[0]) + other * of(alpha) * Levels(sign, sign, True)

    return rule


def _swapped_difference(node: fx.Node, of: Of) -> Levels:
    return of(node.args[1]) + -(of(node.args[0]) * of(node.kwargs.get("alpha", 1)))


def _product(node: fx.Node, of: Of) -> Levels:
    return of(node.args[0]) * of(node.args[1])


def _union(arguments: Iterable[Any], of: Of) -> Levels:
    levels: Levels | None = None
    for argument in arguments:
        levels = of(argument) if levels is None else levels | of(argument)
    return ANYTHING if levels is None else levels


def _union_of_inputs(node: fx.Node, of: Of) -> Levels:
    # Of values alone: indices and masks choose among them.
    tensors = ((one, tensor_of(one)) for one in node.all_input_nodes)
    return _union((one for one, value in tensors if value is None or value.is_floating_point()), of)


def _where(node: fx.Node, of: Of) -> Levels:
    return _union(node.args[1:3], of)


def _clamp(node: fx.Node, of: Of) -> Levels:
    low, high = (*node.args[1:], None, None)[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return ANYTHING
    return of(node.args[0]).within(
        -math.inf if low is None else low,  # type: ignore[arg-type]
        math.inf if high is None else high,  # type: ignore[arg-type]
    )


def _clamp_min(node: fx.Node, of: Of) -> Levels:
    bound = node.args[1]
    return of(node.args[0]).within(bound, math.inf) if isinstance(bound, (int, float)) else ANYTHING


def _clamp_max(node: fx.Node, of: Of) -> Levels:
    bound = node.args[1]
    return of(node.args[0]).within(-math.inf, bound) if isinstance(bound, (int, float)) else ANYTHING


def _relu(node: fx.Node, of: Of) -> Levels:
    return of(node.args[0]).within(0, math.inf)


def _padded(node: fx.Node, of: Of) -> Levels:
    value = node.args[2] if len(node.args) > 2 else 0
    padding = node.args[1]
    if not isinstance(padding, (list, tuple)):
        return ANYTHING
    return of(node.args[0]) | of(value)


def _getitem(node: fx.Node, of: Of) -> Levels:
    parent = node.args[0]
    assert isinstance(parent, fx.Node)
    name = name_of(parent)
    if name in TAKEN:
        return of(parent.args[0])
    pooled = name in _FIRST_OF_PAIR or name.startswith("_low_memory_max_pool")
    return of(parent.args[0]) if pooled and node.args[1] == 0 else ANYTHING


def _copied(node: fx.Node, of: Of) -> Levels:
    return of(node.args[1])


def _rounding(how: Callable[[float], int]) -> Callable[[fx.Node, Of], Levels]:
    def rule(node: fx.Node, of: Of) -> Levels:
        if node.kwargs.get("decimals"):
            return ANYTHING
        levels = of(node.args[0])
        return ANYTHING if levels is ANYTHING else levels.rounded(how)

    return rule


def _concatenated(node: fx.Node, of: Of) -> Levels:
    parts = node.args[0]
    return _union(parts, of) if isinstance(parts, (list, tuple)) else ANYTHING


_RULES: dict[str, Callable[[fx.Node, Of], Levels]] = {
    **dict.fromkeys(TAKEN, _first),
    **dict.fromkeys(_UNIONS, _union_of_inputs),
    **{name: _rounding(how) for name, how in _ROUNDED.items()},
    "cat": _concatenated,
    "stack": _concatenated,
    "getitem": _getitem,
    "full": _filled,
    "full_like": _filled,
    "scalar_tensor": _first,
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros"], lambda node, of: of(0)),
    **dict.fromkeys(["ones", "ones_like", "new_ones"], lambda node, of: of(1)),
    "convert_element_type": _cast,
    "_to_copy": _cast,
    "add": _sum(1),
    "sub": _sum(-1),
    "mul": _product,
    "rsub": _swapped_difference,
    "neg": lambda node, of: -of(node.args[0]),
    "where": _where,
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "relu": _relu,
    "amax": _first,
    "amin": _first,
    "constant_pad_nd": _padded,
    "copy": _copied,
}
