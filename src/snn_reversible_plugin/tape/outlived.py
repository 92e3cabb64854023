"""What is kept by reference and has outlived its tape, by storage.

The one idea: a network that is called step by step has a tape a call, and what one call relies on may be
written to in the next, before there is a backward: the vectors of spectral norm, a running mean. Whoever is
about to write asks here too.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from itertools import compress
from typing import Any

import torch

from snn_reversible_plugin.tape.as_stock import ByStorage, Followed
from snn_reversible_plugin.tape.handles import Kept
from snn_reversible_plugin.tape.operators import aten
from snn_reversible_plugin.tape.origins import (
    enter,
    entered_between,
    forget,
    is_ended,
    look_up,
    now,
    older_among,
)
from snn_reversible_plugin.tape.own_functions import is_from_bits
from snn_reversible_plugin.tape.recipes import SHORT
from snn_reversible_plugin.tape.replayed import Replayed

_FEW = 4096
_by_storage: ByStorage = {}
_count = 0
_many = _FEW


class _Past(threading.local):
    """The graphs that a thread has recorded, and between which moments."""

    def __init__(self) -> None:
        self.graphs: list[tuple[weakref.ref[Any], int, int]] = []


_past = _Past()


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


def end_histories(func: Any, tensors: Iterable[torch.Tensor], began: int) -> None:
    """Take states of earlier recordings that no gradient goes to as they are; see recipes, note 10.

    ``began``: when this recording began.
    """
    for tensor in older_among(tensors, began):
        if func is aten.detach.default or not tensor.requires_grad:
            handle = look_up(tensor)
            is_long = isinstance(handle, Replayed) and (handle.products or handle.depth > SHORT)
            if handle is None or is_long:
                enter(tensor, None, ended=True)


def is_over(graph: Any, began: int) -> None:
    """A recording that began then is over; ``graph`` lives as long as what autograd saved in it."""
    _past.graphs.append((weakref.ref(graph), began, now()))


def forget_spent_graphs() -> None:
    """Let go of what states are rebuilt from that have outlived their graph: they live anyway.

    All but bits: a state of a neuron that goes backward at each time step would hold a second tensor.
    """
    graphs = _past.graphs
    gone = [graph() is None for graph, _, _ in graphs]
    if not any(gone):
        return
    _, began, ended = zip(*compress(graphs, gone), strict=True)
    _past.graphs = [one for one, is_gone in zip(graphs, gone, strict=True) if not is_gone]
    for tensor in entered_between(began, ended):  # a network called step by step leaves many at once
        handle = look_up(tensor)
        if isinstance(handle, Replayed) and not is_from_bits(handle, tensor.nbytes):
            forget(tensor)


def pass_on_the_end(tensors: Iterable[torch.Tensor], out: torch.Tensor, base: torch.Tensor | None) -> None:
    """What is made without a gradient of a state whose history has ended is such a state."""
    if not torch.is_grad_enabled() and any(map(is_ended, tensors)):
        enter(out, None, base, ended=True)


def _sweep() -> None:
    """Leave out what has died, where that may have become much."""
    global _count, _many
    for storage in list(_by_storage):
        live = [ref for ref in _by_storage.pop(storage, ()) if ref() is not None]
        if live:
            _by_storage.setdefault(storage, []).extend(live)
    _count = sum(map(len, list(_by_storage.values())))
    _many = max(_FEW, 2 * _count)
