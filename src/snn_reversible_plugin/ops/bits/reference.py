"""Bit packing in plain torch, on any device: the specification of the faster forms.

Bit order is little: element ``8 i + j`` is bit ``j`` of byte ``i``. Works in chunks, so that the
transient is a few megabytes whatever the size of the tensor.
"""

from __future__ import annotations

import torch

CHUNK = 1 << 24


def pack_bits(flat: torch.Tensor) -> torch.Tensor:
    """See :func:`.ops.pack_bits`."""
    n = flat.numel()
    bits = torch.empty((n + 7) // 8, dtype=torch.uint8, device=flat.device)
    weights = (1 << torch.arange(8, device=flat.device)).to(torch.uint8)
    for start in range(0, n, CHUNK):
        ones = flat[start : start + CHUNK].ne(0).view(torch.uint8)
        if ones.numel() % 8:
            ones = torch.nn.functional.pad(ones, (0, -ones.numel() % 8))
        ones = ones.view(-1, 8).mul_(weights)
        bits[start // 8 : start // 8 + len(ones)] = ones.sum(1, dtype=torch.uint8)
    return bits


def unpack_bits(bits: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`.ops.unpack_bits`."""
    n = out.numel()
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part = bits[start // 8 : (stop + 7) // 8]
        ones = (part.unsqueeze(1) >> shifts).bitwise_and_(1).view(-1)
        out[start:stop].copy_(ones[: stop - start])
