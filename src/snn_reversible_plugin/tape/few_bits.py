"""Results of which a few bits are stored: whole numbers within the bounds that :mod:`.tape.spans` finds."""

from __future__ import annotations

from typing import Any

import torch

from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.operators import Operator
from snn_reversible_plugin.tape.origins import look_up, span_of
from snn_reversible_plugin.tape.packed import Packed, PackedLevels
from snn_reversible_plugin.tape.spans import RULES, STORED, Span, span_after


def few_bits(
    operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Span | None, Handle | None]:
    """What an operation's result can be, and a handle for it if a few bits hold it. Before it writes."""
    if operator.name not in RULES or not isinstance(args[0], torch.Tensor):
        return None, None
    if not args[0].is_floating_point():
        return None, None
    span = span_after(operator.name, args, kwargs, span_of(args[0]))
    levels = None if span is None or operator.name not in STORED else span.levels()
    if levels is None or isinstance(look_up(args[0]), Packed):
        return span, None
    return span, PackedLevels(*levels)
