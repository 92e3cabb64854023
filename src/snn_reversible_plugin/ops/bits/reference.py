"""Bit packing in plain torch, on any device: the specification of the faster forms.

The elements are one string of bits, ``bits_each`` of them an element, the lowest first; bit ``8 i + j`` of
the string is bit ``j`` of byte ``i``. Works in chunks, so that the transient is a few megabytes whatever
the size of the tensor.
"""

from __future__ import annotations

import torch

CHUNK = 1 << 24


def pack_bits(flat: torch.Tensor, bits_each: int = 1) -> torch.Tensor:
    """See :func:`.ops.bits.pack_bits`."""
    n = flat.numel()
    bits = torch.empty((n * bits_each + 7) // 8, dtype=torch.uint8, device=flat.device)
    weights = (1 << torch.arange(8, device=flat.device)).to(torch.uint8)
    for start in range(0, n, CHUNK):
        ones = _as_bits(flat[start : start + CHUNK], bits_each)
        if ones.numel() % 8:
            ones = torch.nn.functional.pad(ones, (0, -ones.numel() % 8))
        ones = ones.view(-1, 8).mul_(weights)
        first = start * bits_each // 8
        bits[first : first + len(ones)] = ones.sum(1, dtype=torch.uint8)
    return bits


def _as_bits(part: torch.Tensor, bits_each: int) -> torch.Tensor:
    if bits_each == 1:
        return part.ne(0).view(torch.uint8)
    places = torch.arange(bits_each, device=part.device, dtype=torch.uint8)
    return (part.to(torch.uint8).unsqueeze(1) >> places).bitwise_and_(1).view(-1)


def unpack_bits(bits: torch.Tensor, out: torch.Tensor, bits_each: int = 1) -> None:
    """See :func:`.ops.bits.unpack_bits`."""
    n = out.numel()
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        part = bits[start * bits_each // 8 : (stop * bits_each + 7) // 8]
        ones = (part.unsqueeze(1) >> places).bitwise_and_(1).view(-1)[: (stop - start) * bits_each]
        if bits_each > 1:
            ones = (ones.view(-1, bits_each) << places[:bits_each]).sum(1, dtype=torch.uint8)
        out[start:stop].copy_(ones)
