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
from snn_reversible_plugin.tape.handles import stored_once

RECORDS_A_CHUNK = 8


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

    __slots__ = ("_bases", "_chunks", "_ends", "_room", "device", "size", "stride")

    def __init__(self, like: Tensor) -> None:
        self.size, self.stride, self.device = like.size(), like.stride(), like.device
        self._chunks: list[Tensor] = []
        self._bases = array("Q")
        self._ends = array("Q")
        self._room = 0

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
