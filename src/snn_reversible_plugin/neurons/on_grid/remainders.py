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

    __slots__ = (
        "_bases", "_chunks", "_ends", "_in_place", "_pieces", "_room", "device", "size", "stride",
        "unpacked",
    )  # fmt: skip

    def __init__(self, like: Tensor) -> None:
        self.size, self.stride, self.device = like.size(), like.stride(), like.device
        self._in_place = may_look(self.device)  # a copy is no launch
        self._chunks: list[Tensor] = []
        self._pieces: list[Any] = []  # the chunks as forms read and write them
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
        if total and not self._in_place:
            self._take(_in_one(pieces), end)
            self._ends.append(end + total)
            return
        if total <= self._room:
            self._write(pieces)
            self._ends.append(end + total)
            return
        left = total
        for piece in pieces:
            while len(piece):
                if not self._room:
                    # An eighth of what there is, so that short sequences don't pay for long ones.
                    self._room = max(left, min(end // 8, RECORDS_A_CHUNK * total))
                    self._take(
                        torch.empty(self._room, dtype=torch.uint8, device=self.device), end + total - left
                    )
                size = min(len(piece), self._room)
                self._write((piece[:size],))
                left -= size
                piece = piece[size:]
        self._ends.append(end + total)

    def _take(self, chunk: Tensor, base: int) -> None:
        self._chunks.append(chunk)
        self._pieces.append(as_pieces(chunk))
        self._bases.append(base)

    def _write(self, pieces: Sequence[Any]) -> None:
        """Write pieces for which there is room in the newest chunk."""
        if not self._room:
            return
        chunk = self._pieces[-1]
        at = len(chunk) - self._room
        for piece in pieces:
            end = at + len(piece)
            chunk[at:end] = piece
            at = end
        self._room = len(chunk) - at

    def record(self, index: int) -> Any:
        """The bytes of a record, in the form that :mod:`.ops` takes."""
        end = self._ends[index]
        start = self._ends[index - 1] if index else 0
        if end == start:
            return as_pieces(torch.empty(0, dtype=torch.uint8, device=self.device))
        bases = self._bases
        first, last = bisect_right(bases, start) - 1, bisect_right(bases, end - 1) - 1
        if first == last:
            base = bases[first]
            return self._pieces[first][start - base : end - base]
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
