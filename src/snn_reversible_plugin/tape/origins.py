"""What is known of live tensors: a table from a tensor to its handle.

Tensors are looked up by identity and version, entries die with their tensors, and the table outlives a
tape, so that a state handed from one call to the next is known in the next.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import NO_DISPATCH, STRIDED, is_plain, storage_key
from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.spans import ANY, Span

OUTSIDE: Any = object()


# NOTE [When an entry holds]
#
# 1. For the same tensor object: an id alone comes back after a free, so the weak reference is compared.
# 2. At the same version: an in-place operation moves the version counter on.
# 3. At the same address: `x.data = y` changes a tensor without touching its version.
# 4. As long as nobody wrote to the storage through an alias: `x.data.mul_(2)` moves a version counter of
#    its own. Recorded writes are numbered by storage, and void what is older, in whichever thread.
# 5. What the table has lost counts as coming from outside, and is kept: where threads race for the place of
#    a tensor that died, it costs memory and never a value.
# 6. A handle goes with its tensor, by a callback that is no Python function: Python prints and swallows an
#    interrupt (Ctrl-C) that comes in such a function. What stays of a dead entry is overwritten by the next
#    tensor with its id, or swept by `tidy`.


class _Entry(weakref.ref):
    """What is known of a live tensor: its handle (None: made under a tape, no recipe) at a version."""

    __slots__ = ("address", "ended", "handle", "serial", "span", "version")

    handle: Handle | None
    span: Span | None
    version: int
    address: int
    serial: int
    ended: bool


_entries: dict[int, _Entry] = {}
_writes: dict[int, int] = {}
_latest_write = -1  # of all: what was entered since has been written to by nobody
_writing = threading.RLock()  # a finalizer may write while it is held
_serial = itertools.count()
_drop_handle = vars(_Entry)["handle"].__delete__
_FEW = 4096
_many = _FEW


def enter(
    tensor: torch.Tensor,
    handle: Handle | None,
    base: torch.Tensor | None = None,
    span: Span | None = None,
    ended: bool = False,
) -> None:
    """Write down a tensor's handle, and what is known of its values. A new view gets the version counter of
    its ``base`` only after the operation has returned, so the base is asked. ``ended``: it is a state whose
    history is no longer wanted."""
    cls = type(tensor)
    if tensor.layout is not STRIDED or cls.__torch_dispatch__ is not NO_DISPATCH or tensor.is_nested:
        return  # see is_plain
    entry = _Entry(tensor, _drop_handle)
    entry.handle, entry.span, entry.ended = handle, span, ended
    counted = tensor if base is None else base
    entry.version = -1 if counted.is_inference() else counted._version
    entry.address = tensor.data_ptr()
    entry.serial = next(_serial)
    _entries[id(tensor)] = entry


def forget(tensor: torch.Tensor) -> None:
    """Let go of a tensor's handle, and of what is known of its values; when it was made is known still."""
    entry = _entries.get(id(tensor))
    if entry is not None and entry() is tensor:
        entry.handle, entry.span, entry.ended = None, None, False


def look_up(tensor: torch.Tensor) -> Any:
    """A tensor's handle; None if it was made under a tape and has none; else ``OUTSIDE``."""
    entry = _entries.get(id(tensor))
    if entry is None or entry() is not tensor:
        return OUTSIDE
    # As _stands says, which is asked for each tensor that anything is done with: without another call.
    if (entry.version >= 0 and entry.version != tensor._version) or entry.address != tensor.data_ptr():
        return None
    serial = entry.serial
    if _latest_write > serial and _writes.get(storage_key(tensor), -1) > serial:
        return None
    return entry.handle


def older_among(tensors: Iterable[torch.Tensor], moment: int) -> list[torch.Tensor]:
    """Those of which what is known was written down before a moment."""
    older = []
    for tensor in tensors:
        entry = _entries.get(id(tensor))
        if entry is not None and entry.serial < moment and entry() is tensor:
            older.append(tensor)
    return older


def now() -> int:
    """A moment, for :func:`is_older`."""
    return next(_serial)


def is_ended(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a state whose history is no longer wanted, or made of one without a gradient."""
    entry = _entries.get(id(tensor))
    return entry is not None and entry.ended and entry() is tensor


def span_of(tensor: torch.Tensor) -> Span:
    """What is known of a tensor's values."""
    entry = _entries.get(id(tensor))
    if entry is None or entry() is not tensor or entry.span is None or not _stands(entry, tensor):
        return ANY
    return entry.span


def _stands(entry: _Entry, tensor: torch.Tensor) -> bool:
    """Whether nothing was written to a tensor since its entry."""
    return (
        (entry.version < 0 or entry.version == tensor._version)
        and entry.address == tensor.data_ptr()
        and not (_latest_write > entry.serial and _writes.get(storage_key(tensor), -1) > entry.serial)
    )


def written(tensor: torch.Tensor, root: torch.Tensor | None = None) -> None:
    """An in-place operation that the tape recorded is about to return, and to move the version on.

    ``root``: what the tensor is a view of, if its entry says what it holds by now.
    """
    if not is_plain(tensor):
        return
    _note_write(tensor)
    for one in (tensor,) if root is None else (tensor, root):
        entry = _entries.get(id(one))
        if entry is not None and entry() is one:
            entry.serial = next(_serial)
            if entry.version >= 0:
                entry.version += 1


def written_unseen(tensor: torch.Tensor) -> None:
    """Somebody wrote to a tensor's storage, and moved no version on: nothing is known of it any more."""
    if is_plain(tensor):
        _note_write(tensor)


def _note_write(tensor: torch.Tensor) -> None:
    global _latest_write
    with _writing:
        # The number of all is raised first: an interrupt may come between.
        _latest_write = serial = next(_serial)
        _writes[storage_key(tensor)] = serial


def live_in(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in the table that have this tensor's storage. Slow: it goes through the table."""
    storage = storage_key(tensor)
    live = [one for entry in list(_entries.values()) if (one := entry()) is not None]
    return [one for one in live if storage_key(one) == storage]


def entered_between(began: Sequence[int], ended: Sequence[int]) -> list[torch.Tensor]:
    """The live tensors that were written down in spans of time, one after another: when each began and
    ended. Slow: it goes through the table, once for all spans."""
    found = [
        entry
        for entry in list(_entries.values())
        if (at := bisect_right(began, entry.serial)) and entry.serial < ended[at - 1]
    ]
    return [tensor for entry in found if (tensor := entry()) is not None]


def tidy() -> None:
    """Sweep what no live tensor will be looked up for, where that has become much."""
    global _many
    if len(_entries) + len(_writes) < _many:
        return
    before = next(_serial)
    storages = set()
    # Copied at once: a list of pairs is made of objects, and garbage that is collected meanwhile may enter
    # more.
    for key, entry in _entries.copy().items():
        tensor = entry()
        if tensor is not None:
            storages.add(storage_key(tensor))
        elif _entries.get(key) is entry and (gone := _entries.pop(key, entry)) is not entry:
            _entries.setdefault(key, gone)  # another thread's, of a tensor that it entered just now
    with _writing:
        # Written since, by another thread, of a tensor that it entered since: that one counts.
        for key, serial in _writes.copy().items():
            if serial < before and key not in storages:
                _writes.pop(key, None)
    _many = max(_FEW, 2 * (len(_entries) + len(_writes)))
