"""Bit packing on the CPU through numpy's packbits, which is faster there than the torch form.

Held to :mod:`.ops.bits.reference` by the tests. Chunks are small, so that the
one-byte intermediate stays in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CHUNK = 1 << 19


def pack_bits(flat: torch.Tensor, bits_each: int = 1) -> torch.Tensor:
    """See :func:`.ops.bits.pack_bits`."""
    n = flat.numel()
    bits = torch.empty((n * bits_each + 7) // 8, dtype=torch.uint8)
    packed = bits.numpy()
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        ones = _as_bits(flat[start:stop], bits_each)
        first, last = start * bits_each // 8, (stop * bits_each + 7) // 8
        packed[first:last] = np.packbits(ones, bitorder="little")
    return bits


def _as_bits(part: torch.Tensor, bits_each: int) -> np.ndarray[Any, Any]:
    if bits_each == 1:
        if part.dtype is torch.bool:
            return part.numpy()
        if part.dtype is torch.bfloat16:  # numpy has none
            return part.ne(0).numpy()
        # numpy compares faster than torch does. After `.numpy()` spikes could never let go of their bytes.
        return np.from_dlpack(part) != 0
    values = part.to(torch.uint8).numpy()
    return np.unpackbits(values[:, None], axis=1, count=bits_each, bitorder="little")


def unpack_bits(bits: torch.Tensor, out: torch.Tensor, bits_each: int = 1) -> None:
    """See :func:`.ops.bits.unpack_bits`."""
    n = out.numel()
    packed = bits.numpy()
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part = packed[start * bits_each // 8 : (stop * bits_each + 7) // 8]
        values = np.unpackbits(part, count=(stop - start) * bits_each, bitorder="little")
        if bits_each > 1:
            values = np.packbits(values.reshape(-1, bits_each), axis=1, bitorder="little")[:, 0]
        out[start:stop].copy_(torch.from_numpy(values))
