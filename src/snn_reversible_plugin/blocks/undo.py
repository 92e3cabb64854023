"""What a reversible chain gets back: a stream with a branch subtracted, and how well that went.

The one idea: the difference takes the place of the stream, so that undoing a block allocates next to
nothing; and what went wrong, if anything, is counted in the field's own unit, spikes that flipped.
Source: Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), whose rebuild drifts in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin import ops, tape
from snn_reversible_plugin.grid import sub_snapped_
from snn_reversible_plugin.modules.kinds import is_spiking, spikes_of
from snn_reversible_plugin.ops.layouts import is_dense, with_strides

Spikes = list[tuple[Tensor, int]]  # of each call of a neuron: its spikes as bits, and how many there are
Flips = tuple[Tensor, int]  # how many spikes flipped, on their device, of how many
PIECES, LEAST = 16, 1 << 13  # parts of a stream, and the fewest elements that are worth an operation


@dataclass(frozen=True)
class Rebuild:
    """What check mode found when a chain was rebuilt, in comparison with its forward.

    Attributes:
        flipped_bits: bits of the chain's input that differ.
        max_error: by how much it differs at most.
        spikes: outputs of neurons inside the branches that were compared, neurons times time steps.
        flipped_spikes: those that differ: a spike came or went.
        by_branch: flipped spikes of each branch where there are any, in the order of the rebuild, so that
            the first is where it began.

    Example:
        >>> print(Rebuild(flipped_bits=0, max_error=0.0, spikes=1000, flipped_spikes=0))
        0 of 1,000 spikes flipped; the rebuilt input is equal bit for bit
    """

    flipped_bits: int
    max_error: float
    spikes: int = 0
    flipped_spikes: int = 0
    by_branch: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.flipped_spikes:,} of {self.spikes:,} spikes flipped"
        if self.by_branch:
            text += f", first in {next(iter(self.by_branch))}"
        if not self.flipped_bits:
            return f"{text}; the rebuilt input is equal bit for bit"
        return f"{text}; {self.flipped_bits:,} bits of the rebuilt input, off by up to {self.max_error:.3g}"


class Undo:
    """Subtracts a branch from ``stream``, if there is one; the difference is ``rebuilt``, shown to ``see``.

    Args:
        strides: the layout that the rebuilt stream has to have.
        bits: of the grid that the branch is rounded to, None for floating point.
        owned: nobody else reads ``stream``, so the difference may take its place.
        see: is called with the rebuilt stream.
    """

    def __init__(
        self, strides: tuple[int, ...], bits: int | None, owned: bool, see: Callable[[Tensor], None]
    ) -> None:
        self.strides, self.bits, self.owned, self.see = strides, bits, owned, see
        self.stream: Tensor | None = None
        self.rebuilt: Any = None

    def __call__(self, branch: Tensor) -> None:
        stream, self.stream = self.stream, None
        if stream is None:
            return
        if self.bits is None:
            stream = stream - branch
        else:
            stream = stream if self.owned else stream.clone()
            for part, of_branch in _pieces(stream, branch):
                sub_snapped_(part, of_branch, self.bits)
        self.rebuilt = with_strides(stream, self.strides)
        self.see(self.rebuilt)


def _pieces(stream: Tensor, branch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both that belong together: what is computed of one part is small beside the whole."""
    if stream.stride() != branch.stride() or not is_dense(stream):
        return zip((stream,), (branch,), strict=True)
    size, stride = (stream.numel(),), (1,)
    pieces = max(1, min(PIECES, stream.numel() // LEAST))
    flat = (tensor.as_strided(size, stride).chunk(pieces) for tensor in (stream, branch))
    return zip(*flat, strict=True)


class SpikeObserver:
    """A forward hook of neurons that writes their spikes down."""

    def __init__(self, found: Spikes) -> None:
        self._found = found

    def __call__(self, neuron: nn.Module, _inputs: Any, output: Any) -> None:
        spikes = spikes_of(neuron, output) if is_spiking(neuron) else output
        with tape.paused(), torch.no_grad():
            self._found.append((ops.pack_bits(spikes.detach().reshape(-1)), spikes.numel()))


@contextmanager
def observed_spikes(modules: Iterable[nn.Module]) -> Iterator[Spikes]:
    """The spikes of every neuron among the modules, in the order of the calls.

    Neurons are those of both frameworks, and modules that say of what they return that it is spikes.
    """
    found: Spikes = []
    observer = SpikeObserver(found)
    neurons = (m for m in modules if is_spiking(m) or getattr(m, "returns_spikes", False))
    hooks = [module.register_forward_hook(observer) for module in neurons]
    try:
        yield found
    finally:
        for handle in hooks:
            handle.remove()


def flipped(name: str, forward: Spikes, rebuild: Spikes) -> Flips:
    """Count the spikes in which two runs of a branch differ, without waiting for the device."""
    if [count for _, count in forward] != [count for _, count in rebuild]:
        raise RuntimeError(
            f"{name}: its neurons ran {len(forward)} times in the forward and {len(rebuild)} times in the "
            "rebuild, or on other shapes. The branch is not deterministic: let it go the same way each "
            "time, or set reversible=False."
        )
    total = torch.zeros((), dtype=torch.int64)
    for (ours, _), (theirs, _) in zip(forward, rebuild, strict=True):
        total = total.to(ours.device) + _ones(ours ^ theirs)
    return total, sum(count for _, count in forward)


def difference(rebuilt: Sequence[Tensor], original: Sequence[Tensor], flips: dict[str, Flips]) -> Rebuild:
    """What differs between streams that belong together, and flipped on the way. Waits for the device."""
    bits, error = 0, 0.0
    for ours, theirs in zip(rebuilt, original, strict=True):
        if theirs.numel() == 0:
            continue
        bits += int(_ones(ours.contiguous().view(torch.uint8) ^ theirs.contiguous().view(torch.uint8)))
        error = max(error, float((ours - theirs).abs().max()))
    counts = {name: int(count) for name, (count, _) in flips.items()}
    spikes = sum(number for _, number in flips.values())
    by_branch = {name: count for name, count in counts.items() if count}
    return Rebuild(bits, error, spikes, sum(counts.values()), by_branch)


def _ones(data: Tensor) -> Tensor:
    """The number of bits that are set in bytes."""
    return sum((data >> place & 1).sum() for place in range(8))  # type: ignore[return-value]
