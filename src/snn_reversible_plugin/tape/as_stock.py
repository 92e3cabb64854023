"""What a node of stock's saves, for the value that stock's backward would find there.

The one idea: autograd saves by reference, and looks at the version counter only. A write that moves no
counter (``mem.data.clamp_``, the buffers that DistributedDataParallel overwrites before each call) is in
stock what the backward then reads. So a node that stock has too reads that here, and what only this
package needs (recipes, its own neurons' nodes) is the forward's value, copied before the write.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import FrameType

import torch

from snn_reversible_plugin.ops.layouts import storage_key
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.outsiders import alias

_PACKAGE = __name__.partition(".")[0]
_APPLIES = torch.autograd.function.__name__  # where `apply` is Python, a node saves from there


def is_stocks(frame: FrameType | None) -> bool:
    """Whether stock has the node too that saves, where this frame runs the operation: it is not ours."""
    if frame is not None and frame.f_globals.get("__name__") == _APPLIES:
        frame = frame.f_back
    name = "" if frame is None else str(frame.f_globals.get("__name__"))
    return name.partition(".")[0] != _PACKAGE


class ByReference(Kept):
    """As autograd keeps a tensor: who writes to it past the version counter changes it."""

    __slots__ = ()

    def spill(self, spared: bool = False) -> None:
        if spared and self.checksum is not None:
            self.checksum = None


def by_reference(kept: Kept) -> ByReference:
    """The one for stock's nodes of what is kept."""
    known = None if kept.for_stock is None else kept.for_stock()
    if isinstance(known, ByReference) and known.tensor is kept.tensor and known.version == kept.version:
        return known
    one = ByReference(kept.tensor)
    one.version, one.outside, one.parameter = kept.version, kept.outside, kept.parameter
    kept.for_stock = weakref.ref(one)
    return one


class Followed(Handle):
    """A state that is rebuilt, unless somebody has written to it: then what is written, by reference."""

    __slots__ = ("_of_tensor", "_rebuilt", "_version", "_written", "look", "treatment")

    anchored = True

    def __init__(self, rebuilt: Handle, tensor: torch.Tensor) -> None:
        self._rebuilt, self._version = rebuilt, tensor._version
        self._of_tensor: Callable[[], torch.Tensor | None] = weakref.ref(tensor)
        self._written: torch.Tensor | None = None
        self.look: Callable[[], None] | None = None  # whether somebody wrote since the recording was over
        self.treatment = rebuilt.treatment

    def spill(self, spared: bool = False) -> None:
        """Somebody writes to the tensor."""
        tensor = self._of_tensor()
        if tensor is not None:
            self._written = alias(tensor)

    def relies_on(self) -> Iterable[Handle]:
        return (self._rebuilt,)

    def get(self, last: bool) -> tuple[torch.Tensor, bool]:
        if self.look is not None:
            self.look()
        written = self._written
        if written is not None and written._version == self._version:
            return written, False
        return self._rebuilt.get(last)


ByStorage = dict[int, list[weakref.ref[Kept] | weakref.ref[Followed]]]


def follow(by_storage: ByStorage, rebuilt: Handle, tensor: torch.Tensor) -> Followed:
    """What a node of stock's is given for a state, to be told of writes to it."""
    followed = Followed(rebuilt, tensor)
    by_storage.setdefault(storage_key(tensor), []).append(weakref.ref(followed))
    return followed


def followed_among(by_storage: ByStorage, storage: int) -> list[weakref.ref[Followed]]:
    """Take out what would be told of writes to a storage."""
    refs = by_storage.pop(storage, [])
    by_storage[storage] = [ref for ref in refs if not isinstance(ref(), Followed)]
    return [ref for ref in refs if isinstance(ref(), Followed)]  # type: ignore[misc]
