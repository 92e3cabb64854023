"""What is kept by reference and has outlived its tape, by storage.

The one idea: a network that is called step by step has a tape a call, and what one call relies on may be
written to in the next, before there is a backward: the vectors of spectral norm, a running mean. Whoever is
about to write asks here too.
"""

from __future__ import annotations

import weakref

from snn_reversible_plugin.tape.as_stock import ByStorage, Followed
from snn_reversible_plugin.tape.handles import Kept

_FEW = 4096
_by_storage: ByStorage = {}
_count = 0
_many = _FEW


def outlive(by_storage: ByStorage) -> None:
    """A tape is over; it kept these, and a backward will want those that something relies on."""
    global _count
    for storage, refs in by_storage.items():
        needed = [ref for ref in refs if (kept := ref()) is not None and kept.anchored]
        if needed:
            _by_storage.setdefault(storage, []).extend(needed)
            _count += len(needed)
    if _count > _many:
        _sweep()


def outlived(storage: int) -> list[weakref.ref[Kept] | weakref.ref[Followed]]:
    """What relies on a storage since earlier tapes; it is told of one write."""
    return _by_storage.pop(storage, [])


def _sweep() -> None:
    """Leave out what has died, where that may have become much."""
    global _count, _many
    for storage in list(_by_storage):
        live = [ref for ref in _by_storage.pop(storage, ()) if ref() is not None]
        if live:
            _by_storage.setdefault(storage, []).extend(live)
    _count = sum(map(len, list(_by_storage.values())))
    _many = max(_FEW, 2 * _count)
