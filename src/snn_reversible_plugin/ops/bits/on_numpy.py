"""Bit packing on the CPU through numpy's packbits, which is faster there than the torch form.

Held to :mod:`.ops.bits.reference` by the tests. Chunks are small, so that the
one-byte intermediate stays in the cache.
"""

from __future__ import annotations

import numpy as np
import torch

CHUNK = 1 << 19


def pack_bits(flat: torch.Tensor) -> torch.Tensor:
    """See :func:`.ops.pack_bits`."""
    n = flat.numel()
    bits = torch.empty((n + 7) // 8, dtype=torch.uint8)
    packed = bits.numpy()
    for start in range(0, n, CHUNK):
        # numpy has no bfloat16, and compares the others faster than torch does.
        part = flat[start : start + CHUNK]
        ones = (part.ne(0) if part.dtype is torch.bfloat16 else part).numpy()
        stop = start + len(ones)
        packed[start // 8 : (stop + 7) // 8] = np.packbits(ones != 0, bitorder="little")
    return bits


def unpack_bits(bits: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`.ops.unpack_bits`."""
    n = out.numel()
    packed = bits.numpy()
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        ones = np.unpackbits(packed[start // 8 : (stop + 7) // 8], count=stop - start, bitorder="little")
        out[start:stop].copy_(torch.from_numpy(ones))
