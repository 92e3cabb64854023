"""Writes into views, as a tape records them: what :mod:`.tape.parts` knows, told by operations."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.operators import Operator, aten
from snn_reversible_plugin.tape.origins import look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.parts import (
    Parts,
    can_be_in_parts,
    copied_into,
    note_what_was_put_together,
    one_of_those_put_together,
    written_part,
)
from snn_reversible_plugin.tape.recipes import handles_for, price_of_part, tensors_among
from snn_reversible_plugin.tape.replayed import Replayed

if TYPE_CHECKING:
    from snn_reversible_plugin.tape.tape import Tape


class TensorsOfParts:
    """The tensors of a recording that are written part by part."""

    def __init__(self, tape: Tape) -> None:
        self._tape = weakref.ref(tape)
        self._parts: weakref.WeakKeyDictionary[Handle, Parts] = weakref.WeakKeyDictionary()

    def clear(self) -> None:
        """Forget the places; the recipes stay."""
        self._parts.clear()

    def write(
        self,
        root: torch.Tensor,
        func: Any,
        operator: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Handle | None, Handle | None, Parts | None]:
        """An operation is about to write into a view of a root.

        Returns:
            The view's new value, where it is simply what is copied into it; the root's; and what is known
            of its parts. None for what has no recipe.
        """
        if root.dtype is torch.bool:
            return None, Packed(), None
        tape, handle = self._tape(), look_up(root)
        if tape is None or not can_be_in_parts(root, handle):
            return None, None, None
        view, *operands = args
        before = tape.relied_on(root, handle)
        parts = self._parts.pop(before, None) or Parts(before)
        copied = func is aten.copy_.default and isinstance(operands[0], torch.Tensor)
        if copied:
            parts.count_as_one(look_up(operands[0]))
        written = view, operands, kwargs
        cost = price_of_part(operator, root, before, written, tape.work_limit, parts.newly_kept)
        if cost is None:
            return None, None, None
        parts.newly_kept += cost.newly_kept
        known = tape.operands(tensors_among(operands, kwargs), cost.known)
        handles = handles_for(operands, known)
        named = dict(zip(kwargs, handles_for(kwargs.values(), known), strict=True))
        after = written_part(before, (view, root), func, (handles, named), cost)
        self._parts[after] = parts
        value = copied_into(view, operands[0], handles[0], cost) if copied else None
        return value, after, parts

    def put_together(self, args: tuple[Any, ...], recipe: Handle) -> None:
        """``torch.cat`` was written down."""
        note_what_was_put_together(recipe, *args)

    def read(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: torch.Tensor, index: int = -1
    ) -> Handle | None:
        """The value of a view that doesn't wait for its whole root; ``index``: among several outputs."""
        root = args[0]
        handle = look_up(root)
        if func is aten.slice.Tensor and isinstance(handle, Replayed) and handle.func is aten.cat.default:
            dim, start = (*args[1:3], 0, 0)[:2] if len(args) > 2 else (0, 0)
            return one_of_those_put_together(out, handle, dim, start or 0)
        if not self._parts:
            return None
        parts = self._parts.get(handle) if isinstance(handle, Replayed) else None
        value = None if parts is None else parts.read(out, root)
        if parts is None or value is not parts.base:
            return value
        recipe = Replayed(func, (value, *args[1:]), kwargs, depth=1, cheap=True)
        if isinstance(value, Replayed):
            recipe.products, recipe.depth, recipe.cheap = value.products, value.depth + 1, value.cheap
            recipe.series = value.series
        return recipe if index < 0 else recipe.output(index, [])
