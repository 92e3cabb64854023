"""``python -m benchmarks.surgery``: stock, converted and wrapped networks as depth grows, in one run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from spikingjelly.activation_based import functional, neuron
from spikingjelly.activation_based.model import ms_resnet, sew_resnet, spikformer
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step, time_step

from . import store
from .measure import MIB
from .rows import Rows

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


def main(
    depths: Annotated[str, typer.Option(help="blocks in the long stage, or in the encoder")] = "4,8,16,32",
    shape: Annotated[str, typer.Option(help="of the input")] = "4,4,3,32,32",
    repeats: Annotated[int, typer.Option(help="timed steps of each method, after one warm-up")] = 3,
    save: Annotated[bool, typer.Option(help="write benchmarks/results/surgery.json")] = True,
) -> None:
    """Print what a training step holds, its peak, and its time over stock's; 10 classes, T first."""
    found: list[dict[str, Any]] = []
    for name, make in NETWORKS.items():
        for depth in map(int, depths.split(",")):
            torch.manual_seed(0)
            stock = make(depth)
            functional.set_step_mode(stock, "m")
            models = {method: prepare(method, stock) for method in METHODS}
            x = torch.rand(tuple(map(int, shape.split(","))))
            seconds: dict[str, list[float]] = {method: [] for method in METHODS}
            for round_ in range(repeats + 1):
                for method, model in models.items():
                    taken = time_step(partial(step, model, x))
                    if round_:  # the first warms up
                        seconds[method].append(taken)
            for method, model in models.items():
                held, peak = count_step(partial(step, model, x))
                ratio = statistics.median(
                    a / b for a, b in zip(seconds[method], seconds["stock"], strict=True)
                )
                found.append(
                    {
                        "network": name, "blocks": depth, "method": method, "held": held, "peak": peak,
                        "time_ratio": ratio,
                    }
                )  # fmt: skip
    Console().print(rows(found).rich(f"input {shape}"))
    if save:
        store.write("surgery", found, shape=shape, **store.machine("cpu"))


def rows(found: list[dict[str, Any]]) -> Rows:
    """What a training step holds, its peak, and its time over stock's."""
    return Rows(
        ("network", "blocks", "method", "held, MiB", "peak, MiB", "time"),
        [
            (
                one["network"], str(one["blocks"]), one["method"], f"{one['held'] / MIB:.1f}",
                f"{one['peak'] / MIB:.1f}", f"{one['time_ratio']:.2f}x",
            )
            for one in found
        ],
    )  # fmt: skip


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The loss of a fresh training step."""
    functional.reset_net(model)
    model.zero_grad()
    return model(x).square().mean()


if __name__ == "__main__":
    store.settle()
    typer.run(main)
