"""What a forward notes of the large values that it computed, beside their recipes.

The one idea: a recipe says how a value is computed and not how large it is, which whoever cuts it has to
know before. Source: this package's own.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import Replayed


@dataclass(slots=True)
class Noted:
    """What a forward notes of a large value: its size, what a batch norm normalized it by, with whether the
    kernel of evaluation gave the same bits, how many operations took it, and what a backward has left for
    another one's node."""

    size: torch.Size
    statistics: tuple[Tensor, Tensor] | None = None
    exact: bool = True
    taken: int = 0
    left: Any = None


_noted: weakref.WeakKeyDictionary[Handle, Noted] = weakref.WeakKeyDictionary()


def note(handle: Handle, noted: Noted) -> None:
    """Remember a value's size."""
    _noted[handle] = noted


def note_taken(handle: Replayed) -> None:
    """Remember that an operation took its operands."""
    for operand in handle.operands():
        if (before := _noted.get(operand)) is not None:
            before.taken += 1


def noted_of(handle: Handle) -> Noted | None:
    """What was noted of a value."""
    return _noted.get(handle)


def size_of(handle: Any) -> torch.Size | None:
    """The size of what a handle stands for; None where it is small, or no handle."""
    if isinstance(handle, Kept):
        return handle.tensor.shape
    if isinstance(handle, Packed):
        return handle.size
    noted = _noted.get(handle) if isinstance(handle, Handle) else None
    return None if noted is None else noted.size
