"""What a reversible chain gets back: a stream with a branch subtracted, and how well that went.

The one idea: the difference takes the place of the branch's value, so that undoing a block allocates
nothing. Source: design section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rebuild:
    """What check mode found when the chain's input was rebuilt: bits that differ, and by how much."""

    flipped_bits: int
    max_error: float


class Undo:
    """Subtracts a branch from a stream. What snap made is fresh, so the difference may take its place."""

    def __init__(self, stream: Tensor, strides: tuple[int, ...], in_place: bool) -> None:
        self.rebuilt, self.strides, self.in_place = stream, strides, in_place

    def __call__(self, value: Tensor) -> None:
        if self.in_place and value.stride() == self.strides and value.dtype is self.rebuilt.dtype:
            self.rebuilt = torch.sub(self.rebuilt, value, out=value)
        else:
            self.rebuilt = with_strides(self.rebuilt - value, self.strides)


def with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values in another layout, if they have another."""
    if tensor.stride() == strides:
        return tensor
    out = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return out.copy_(tensor)


def difference(rebuilt: tuple[Tensor, Tensor], original: tuple[Tensor, Tensor]) -> Rebuild:
    """Count the bits in which two pairs of streams differ. Waits for the device."""
    flipped, error = 0, 0.0
    for ours, theirs in zip(rebuilt, original, strict=True):
        if theirs.numel() == 0:
            continue
        bits = ours.contiguous().view(torch.uint8) ^ theirs.contiguous().view(torch.uint8)
        flipped += sum(int((bits >> place & 1).sum()) for place in range(8))
        error = max(error, float((ours - theirs).abs().max()))
    return Rebuild(flipped, error)
