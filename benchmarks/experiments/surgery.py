"""Stock, converted and wrapped networks as depth grows, in one run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model import ms_resnet, sew_resnet, spikformer
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate, ratio
from ..networks import multi_step

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "Spikformer": lambda depth: spikformer.Spikformer(
        T=4, img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=96, num_heads=4,
        depths=depth,
    ),
    "MS-ResNet": lambda depth: ms_resnet.MSResNet(
        T=4, num_classes=10, layers=(depth + 1, 1, 1), base_channels=16, stem_kernel_size=3, stem_stride=1
    ),
    "SEW-ResNet": lambda depth: sew_resnet.SEWResNet(
        sew_resnet.BasicBlock, (depth, 1, 1, 1), num_classes=10, cnf="ADD", spiking_neuron=neuron.LIFNode,
        detach_reset=True,
    ),
}  # fmt: skip
METHODS = ("stock", "converted", "wrapped", "wrapped, converted", "wrapped (reset), converted")


def prepare(method: str, model: nn.Module) -> nn.Module:
    """A copy of the model under one of the methods."""
    model = copy.deepcopy(model)
    if "wrapped" in method:
        srp.wrap_residual_blocks(model, states="reset" if "reset" in method else "carry")
    if "converted" in method:
        srp.convert_to_reversible(model)
    return model


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    functional.reset_net(model)
    model.zero_grad()
    return model(x).square().mean()


def works(options: Options) -> Iterator[Work]:
    shape = [4, 1, 3, 32, 32] if options.quick else [4, 4, 3, 32, 32]
    for network in NETWORKS:
        for depth in (4,) if options.quick else (4, 8, 16, 32):
            settings = {"network": network, "blocks": depth, "shape": shape, "repeats": options.rounds(3)}
            yield Work(f"{network}, {depth} blocks", METHODS, settings)


def together(
    methods: Sequence[str],
    options: Options,
    tick: Tick,
    network: str,
    blocks: int,
    shape: list[int],
    repeats: int,
) -> Entries:
    torch.manual_seed(0)
    stock = multi_step(NETWORKS[network](blocks))
    x = torch.rand(shape).to(options.device)
    losses = {method: partial(loss_of, prepare(method, stock).to(options.device), x) for method in methods}
    runs = {method: (lambda loss=loss: loss().backward()) for method, loss in losses.items()}
    tell = lambda method: tick(f"{network}, {blocks} blocks: {method}, time")  # noqa: E731
    seconds = alternate(runs, repeats, x.device, tell)
    found = {}
    for method, loss in losses.items():
        held, peak = count_step(loss)
        time_ratio = ratio(seconds[method], seconds["stock"])
        found[method] = {"method": method, "held": held, "peak": peak, "time_ratio": time_ratio}
    return found
