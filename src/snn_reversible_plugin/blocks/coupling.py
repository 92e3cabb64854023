"""The coupling of two streams: how a block updates them, and how they enter.

The one idea: ``a, b = b, a + snap(branch(b))``: the streams take turns, so that an update is one line, and
so is its inverse. Source: Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), after Gomez et al., NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from snn_reversible_plugin.grid import add_snapped, snap

Streams = tuple[Tensor, Tensor]
ADDITIVE, LEAPFROG = "additive", "leapfrog"


def plain(
    branches: Iterable[tuple[str, Callable[[Tensor], Tensor]]], x1: Tensor, x2: Tensor, bits: int | None
) -> Streams:
    """Run branches one after the other."""
    for name, branch in branches:
        x1, x2 = x2, couple(name, x1, branch(x2), bits)
    return x1, x2


def couple(name: str, stream: Tensor, out: Tensor, bits: int | None) -> Tensor:
    """Add a branch's output to a stream."""
    if out.shape != stream.shape:
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(out.shape)} for a stream of shape "
            f"{tuple(stream.shape)}: a branch must keep the shape. What changes it goes between two chains."
        )
    if bits is None or torch.is_grad_enabled():
        out = out if bits is None else snap(out, bits)  # the branch's own output may go
        return stream + out
    return add_snapped(stream, out, bits)


def split(x: Tensor | Streams, dim: int, name: str) -> Streams:
    """The two streams of an input."""
    if isinstance(x, Tensor):
        if not -x.dim() <= dim < x.dim():
            raise ValueError(
                f"{name}: dim={dim}, and the input has shape {tuple(x.shape)}: give one that it has"
            )
        if x.shape[dim] % 2:
            raise ValueError(
                f"{name}: {x.shape[dim]} channels (dimension {dim} of {tuple(x.shape)}) don't split into "
                "two streams: give an even number, or a pair of streams."
            )
        x1, x2 = x.chunk(2, dim)
        return x1, x2
    x1, x2 = x
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        raise ValueError(
            f"{name}: the streams must have one shape and type, not {tuple(x1.shape)} ({x1.dtype}) and "
            f"{tuple(x2.shape)} ({x2.dtype})"
        )
    return x1, x2


def entered(x1: Tensor, x2: Tensor, bits: int | None) -> Streams:
    """The streams as the first block gets them: each a tensor of its own, on the grid."""
    return (x1.clone(), x2.clone()) if bits is None else (snap(x1, bits), snap(x2, bits))
