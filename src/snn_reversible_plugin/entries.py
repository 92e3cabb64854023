"""What is known of live tensors: a table from a tensor to its handle.

Tensors are looked up by identity and version, entries die with their tensors, and the table outlives a
tape, so that a state handed from one call to the next is known in the next.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from snn_reversible_plugin.handles import Handle

OUTSIDE: Any = object()


class _Entry(weakref.ref):
    """What is known of a live tensor: its handle (None: made under a tape, no recipe) at a version."""

    __slots__ = ("handle", "key", "version")

    handle: Handle | None
    key: int
    version: int


_entries: dict[int, _Entry] = {}


def _forget(entry: _Entry) -> None:
    if _entries.get(entry.key) is entry:
        del _entries[entry.key]


def enter(tensor: torch.Tensor, handle: Handle | None, base: torch.Tensor | None = None) -> None:
    """Write down a tensor's handle. A new view gets the version counter of its ``base`` only after
    the operation has returned, so the base is asked."""
    entry = _Entry(tensor, _forget)
    entry.key, entry.handle = id(tensor), handle
    counted = tensor if base is None else base
    entry.version = -1 if counted.is_inference() else counted._version
    _entries[entry.key] = entry


def look_up(tensor: torch.Tensor) -> Any:
    """A tensor's handle; None if it was made under a tape and has none; else ``OUTSIDE``."""
    entry = _entries.get(id(tensor))
    if entry is None or entry() is not tensor:
        return OUTSIDE
    if entry.version >= 0 and entry.version != tensor._version:
        return None
    return entry.handle


def written(tensor: torch.Tensor) -> None:
    """Follow the version counter, which moves on once the recorded in-place operation returns."""
    entry = _entries.get(id(tensor))
    if entry is not None and entry() is tensor and entry.version >= 0:
        entry.version += 1
