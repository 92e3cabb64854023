"""Planes on the CPU: each is one pass without branches, for branches on spikes are guessed wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from snn_reversible_plugin.ops.compiled import compiled

_ONES = np.array([byte.bit_count() for byte in range(256)], np.uint8)


def pack(codes: torch.Tensor, values: int, most: int) -> torch.Tensor | None:
    """See :class:`.ops.planes.PlanesForm`."""
    counts = np.bincount(codes.numpy(), minlength=values)
    order = np.argsort(-counts, kind="stable").astype(np.uint8)
    reach = np.cumsum(counts[order][::-1])[::-1]  # how many elements have a rank, and a bit in its plane
    size = values + int(((reach + 7) // 8).sum())
    if size >= most:
        return None
    packed, rank = np.empty(size, np.uint8), np.empty(values, np.uint8)
    packed[:values], rank[order] = order, np.arange(values)
    _pack(codes.numpy(), rank, packed[values:])
    return torch.from_numpy(packed)


def unpack(planes: torch.Tensor, ranks: torch.Tensor) -> None:
    """See :class:`.ops.planes.PlanesForm`."""
    _unpack(planes.numpy(), _ONES, ranks.numpy())


@compiled
def _pack(codes: Any, rank: Any, planes: Any) -> None:
    count, at = len(codes), 0
    left = np.empty(count + 1, np.uint8)
    for i in range(count):
        left[i] = rank[codes[i]]
    while count:
        more = 0
        for start in range(0, count, 8):
            byte = 0
            for bit in range(min(8, count - start)):
                above = int(left[start + bit] != 0)
                byte |= above << bit
                left[more] = left[start + bit] - 1  # overwritten by the next, unless it is above
                more += above
            planes[at] = byte
            at += 1
        count = more


@compiled
def _unpack(planes: Any, ones: Any, ranks: Any) -> None:
    begins, counts = np.zeros(17, np.int64), np.zeros(17, np.int64)
    counts[0], deepest = len(ranks), 0
    while counts[deepest]:
        begin = begins[deepest]
        end = begin + (counts[deepest] + 7) // 8
        above = 0
        for byte in planes[begin:end]:
            above += ones[byte]
        deepest += 1
        begins[deepest], counts[deepest] = end, above
    more = np.zeros(counts[1] + 1, np.uint8)
    for plane in range(deepest - 1, -1, -1):
        count, begin = counts[plane], begins[plane]
        # From the last element on, so that what is read is not yet overwritten.
        to, j = (more if plane else ranks), counts[plane + 1]
        for i in range(count - 1, -1, -1):
            above = (planes[begin + (i >> 3)] >> (i & 7)) & 1
            to[i] = above * (1 + more[j - 1])
            j -= above
