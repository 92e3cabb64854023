"""Reversible blocks one after the other, and in groups that run at once: what as many of them cost.

Groups compute another function than the sequence, so nothing but memory and time is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from snn_reversible_plugin import RevSBlock, RevSSequence
from snn_reversible_plugin.models.parts import conv_norm
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate, ratio

GROUPS = {"sequence": 1, "groups of 2": 2, "groups of 4": 4}


def make(depth: int, channels: int, parallel: int) -> RevSSequence:
    def branch() -> nn.Module:
        layers = [neuron.LIFNode(step_mode="m"), *conv_norm(channels, channels, 3)]
        return nn.Sequential(*layers, neuron.LIFNode(step_mode="m"), *conv_norm(channels, channels, 3))

    torch.manual_seed(0)
    blocks = [RevSBlock(branch(), branch()) for _ in range(depth)]
    return RevSSequence(blocks, states="reset", parallel=parallel)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    return model(x).square().mean()  # type: ignore[no-any-return]


def works(options: Options) -> Iterator[Work]:
    for channels in (4,) if options.quick else (16, 64):
        for pixels in (4,) if options.quick else (8, 16):
            settings = {"depth": 4 if options.quick else 8, "channels": channels}
            shape = [4, 1 if options.quick else 4, 2 * channels, pixels, pixels]
            settings |= {"shape": shape, "repeats": options.rounds(7)}  # type: ignore[dict-item]
            yield Work(f"{channels} channels, {pixels}x{pixels}", tuple(GROUPS), settings)


def together(
    methods: Sequence[str],
    options: Options,
    tick: Tick,
    depth: int,
    channels: int,
    shape: list[int],
    repeats: int,
) -> Entries:
    models = {name: make(depth, channels, GROUPS[name]).to(options.device) for name in methods}
    x, found = torch.randn(shape).to(options.device), {}
    for name, model in models.items():
        tick(f"{channels} channels, {shape[-1]} pixels: {name}, memory")
        loss_of(model, x).backward()
        held, peak = count_step(partial(loss_of, model, x))
        found[name] = {"way": name, "pixels": shape[-1], "held": held, "peak": peak}
    runs = {name: (lambda model=model: loss_of(model, x).backward()) for name, model in models.items()}
    tell = lambda name: tick(f"{channels} channels, {shape[-1]} pixels: {name}, time")  # noqa: E731
    seconds = alternate(runs, repeats, x.device, tell)
    for name, entry in found.items():
        entry["time_ratio"] = ratio(seconds[name], seconds["sequence"])
    return found
