"""Bit packing on GPUs: one launch, no temporary. Held to :mod:`.ops.bits.reference` by the tests."""

from __future__ import annotations

import torch
import triton

from snn_reversible_plugin.ops.bits import triton_kernels as kernels

GROUPS = 128  # of eight elements, a program


def programs(n: int) -> tuple[int]:
    """The launch grid of a kernel that works on n elements in tiles."""
    return (triton.cdiv(n, 8 * GROUPS),)


def pack_bits(flat: torch.Tensor, bits_each: int = 1) -> torch.Tensor:
    """See :func:`.ops.bits.pack_bits`. One launch, none where there is nothing to pack."""
    n = flat.numel()
    bits = torch.empty((n * bits_each + 7) // 8, dtype=torch.uint8, device=flat.device)
    if n:
        with torch.cuda.device_of(flat):
            kernels.pack[programs(n)](_plain(flat), bits, n, bits_each, GROUPS)
    return bits


def unpack_bits(bits: torch.Tensor, out: torch.Tensor, bits_each: int = 1) -> None:
    """See :func:`.ops.bits.unpack_bits`. One launch, none where there is nothing to unpack."""
    n = out.numel()
    if n:
        with torch.cuda.device_of(out):
            kernels.unpack[programs(n)](bits, _plain(out), n, bits_each, GROUPS)


def _plain(flat: torch.Tensor) -> torch.Tensor:
    return flat.view(torch.uint8) if flat.dtype is torch.bool else flat
