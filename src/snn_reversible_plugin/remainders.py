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

from snn_reversible_plugin import ops

RECORDS_A_CHUNK = 32


class Remainders:
    """Records of bytes, numbered from 0. A record lies within one chunk.

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

    def append(self, pieces: Sequence[Any]) -> None:
        """Write a record: its pieces one after the other."""
        total = sum(map(len, pieces))
        end = self._ends[-1] if self._ends else 0
        if total > self._room:
            # An eighth of what there is, so that short sequences don't pay for long ones.
            room = max(total, min(end // 8, RECORDS_A_CHUNK * total))
            self._chunks.append(torch.empty(room, dtype=torch.uint8, device=self.device))
            self._bases.append(end)
            self._room = room
        if total:
            at = end - self._bases[-1]
            chunk = ops.as_pieces(self._chunks[-1])
            for piece in pieces:
                chunk[at : at + len(piece)] = piece
                at += len(piece)
        self._room -= total
        self._ends.append(end + total)

    def record(self, index: int) -> Any:
        """The bytes of a record, in the form that :mod:`.ops` takes."""
        end = self._ends[index]
        start = self._ends[index - 1] if index else 0
        chunk = bisect_right(self._bases, start) - 1
        if end == start:
            return ops.as_pieces(torch.empty(0, dtype=torch.uint8, device=self.device))
        base = self._bases[chunk]
        return ops.as_pieces(self._chunks[chunk])[start - base : end - base]
