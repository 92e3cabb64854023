"""What is known of live tensors: a table from a tensor to its handle.

Tensors are looked up by identity and version, entries die with their tensors, and the table outlives a
tape, so that a state handed from one call to the next is known in the next.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import is_plain, storage_key
from snn_reversible_plugin.tape.handles import Handle

OUTSIDE: Any = object()


# NOTE [When an entry holds]
#
# 1. For the same tensor object: an id alone comes back after a free, so the weak reference is compared.
# 2. At the same version: an in-place operation moves the version counter on.
# 3. At the same address: `x.data = y` changes a tensor without touching its version.
# 4. As long as nobody wrote to the storage through an alias: `x.data.mul_(2)` moves a version counter of
#    its own. Recorded writes are numbered by storage, and void what is older.


class _Entry(weakref.ref):
    """What is known of a live tensor: its handle (None: made under a tape, no recipe) at a version."""

    __slots__ = ("address", "handle", "key", "serial", "version")

    handle: Handle | None
    key: int
    version: int
    address: int
    serial: int


_entries: dict[int, _Entry] = {}
_writes: dict[int, int] = {}
_serial = itertools.count()


def _forget(entry: _Entry) -> None:
    if _entries.get(entry.key) is entry:
        del _entries[entry.key]


def enter(tensor: torch.Tensor, handle: Handle | None, base: torch.Tensor | None = None) -> None:
    """Write down a tensor's handle. A new view gets the version counter of its ``base`` only after
    the operation has returned, so the base is asked."""
    if not is_plain(tensor):
        return
    entry = _Entry(tensor, _forget)
    entry.key, entry.handle = id(tensor), handle
    counted = tensor if base is None else base
    entry.version = -1 if counted.is_inference() else counted._version
    entry.address = tensor.data_ptr()
    entry.serial = next(_serial)
    _entries[entry.key] = entry


def look_up(tensor: torch.Tensor) -> Any:
    """A tensor's handle; None if it was made under a tape and has none; else ``OUTSIDE``."""
    entry = _entries.get(id(tensor))
    if entry is None or entry() is not tensor:
        return OUTSIDE
    if (
        (entry.version >= 0 and entry.version != tensor._version)
        or entry.address != tensor.data_ptr()
        or (_writes and _writes.get(storage_key(tensor), -1) > entry.serial)
    ):
        return None
    return entry.handle


def written(tensor: torch.Tensor, root: torch.Tensor | None = None) -> None:
    """An in-place operation that the tape recorded is about to return, and to move the version on.

    ``root``: what the tensor is a view of, if its entry says what it holds by now.
    """
    if not is_plain(tensor):
        return
    _writes[storage_key(tensor)] = next(_serial)
    for one in (tensor,) if root is None else (tensor, root):
        entry = _entries.get(id(one))
        if entry is not None and entry() is one:
            entry.serial = next(_serial)
            if entry.version >= 0:
                entry.version += 1


def forget_writes() -> None:
    """Start a recording afresh: storages have come and gone since the last one."""
    _writes.clear()
