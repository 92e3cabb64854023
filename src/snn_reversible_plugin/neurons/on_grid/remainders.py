"""What a step on the grid loses, byte after byte, over thousands of steps.

The one idea: a record a step in a few long stretches of memory, instead of an object a step. Records may
be read in any order and as often as one likes, so that a graph can be walked twice.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.step import as_pieces
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import storage_key
from snn_reversible_plugin.tape.handles import stored_once

RECORDS_A_CHUNK = 8

# NOTE [Records of a device]
#
# There a copy is a launch, so that what a step wrote down is taken over as it is. A step's pieces are one
# stretch of memory where its form made them so; others are put together, which is a launch.


class Remainders:
    """Records of bytes, numbered from 0, in chunks without gaps: a record may go on in the next one.

    ``size`` and ``stride`` are the layout of the neurons that the records are of.

    Example:
        >>> import torch
        >>> store = Remainders(torch.empty(3))
        >>> store.append([torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3], dtype=torch.uint8)])
        >>> store.append([])
        >>> torch.as_tensor(store.record(0)), len(store), store.nbytes
        (tensor([1, 2, 3], dtype=torch.uint8), 2, 3)
    """

    __slots__ = ("_bases", "_chunks", "_ends", "_room", "device", "size", "stride", "unpacked")

    def __init__(self, like: Tensor) -> None:
        self.size, self.stride, self.device = like.size(), like.stride(), like.device
        self._chunks: list[Tensor] = []
        self._bases = array("Q")
        self._ends = array("Q")
        self._room = 0
        self.unpacked: tuple[int, Tensor] | None = None  # a step's spikes, where somebody will ask again

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for records."""
        return sum(len(chunk) for chunk in self._chunks)

    def stored(self, seen: set[int]) -> int:
        """The same, where nobody has counted it before: see :meth:`Handle.stored`."""
        return stored_once(id(self), self.nbytes, seen)

    def append(self, pieces: Sequence[Any]) -> None:
        """Write a record: its pieces one after the other."""
        total = sum(map(len, pieces))
        end = self._ends[-1] if self._ends else 0
        if total and not may_look(self.device):
            self._chunks.append(_in_one(pieces))
            self._bases.append(end)
            self._ends.append(end + total)
            return
        left = total
        for piece in pieces:
            while len(piece):
                if not self._room:
                    # An eighth of what there is, so that short sequences don't pay for long ones.
                    self._room = max(left, min(end // 8, RECORDS_A_CHUNK * total))
                    self._chunks.append(torch.empty(self._room, dtype=torch.uint8, device=self.device))
                    self._bases.append(end + total - left)
                chunk = as_pieces(self._chunks[-1])
                at, size = len(chunk) - self._room, min(len(piece), self._room)
                chunk[at : at + size] = piece[:size]
                self._room -= size
                left -= size
                piece = piece[size:]
        self._ends.append(end + total)

    def record(self, index: int) -> Any:
        """The bytes of a record, in the form that :mod:`.ops` takes."""
        end = self._ends[index]
        start = self._ends[index - 1] if index else 0
        if end == start:
            return as_pieces(torch.empty(0, dtype=torch.uint8, device=self.device))
        first, last = (bisect_right(self._bases, at) - 1 for at in (start, end - 1))
        if first == last:
            base = self._bases[first]
            return as_pieces(self._chunks[first])[start - base : end - base]
        parts = (
            self._chunks[at][max(start - base, 0) : end - base]
            for at, base in enumerate(self._bases[first : last + 1], first)
        )
        return as_pieces(torch.cat(tuple(parts)))


def _in_one(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces one after the other, without a copy where they are."""
    first, at = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        if piece.storage_offset() != at or storage_key(piece) != storage_key(first):
            return torch.cat(tuple(pieces))
        at += len(piece)
    return first.as_strided((at - first.storage_offset(),), (1,))
