"""``python -m benchmarks.parallel_blocks``: reversible blocks in sequence, and in groups.

The same number of blocks trains a step in a sequence and in groups that run at once. Groups compute another
function, so only the cost is compared: median seconds, alternating.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from snn_reversible_plugin import RevSBlock, RevSSequence
from snn_reversible_plugin.models.parts import conv_norm
from snn_reversible_plugin.reports.measure import count_step

from .temporal_columns import rounds


def make(depth: int, channels: int, parallel: int, device: str) -> RevSSequence:
    def branch() -> nn.Module:
        layers = [neuron.LIFNode(step_mode="m"), *conv_norm(channels, channels, 3)]
        return nn.Sequential(*layers, neuron.LIFNode(step_mode="m"), *conv_norm(channels, channels, 3))

    torch.manual_seed(0)
    blocks = [RevSBlock(branch(), branch()) for _ in range(depth)]
    return RevSSequence(blocks, states="reset", parallel=parallel).to(device)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def main(
    depth: Annotated[int, typer.Option(help="blocks")] = 8,
    parallel: Annotated[int, typer.Option(help="blocks in a group")] = 4,
    batch: Annotated[int, typer.Option(help="examples")] = 4,
    steps: Annotated[int, typer.Option(help="time steps")] = 4,
    repeats: Annotated[int, typer.Option(help="timed rounds")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compare the two at 16 and 64 channels, 8x8 and 16x16 pixels."""
    table = Table(title=f"{depth} blocks, groups of {parallel}, T={steps}, batch {batch}, {device}")
    for heading in ("channels", "pixels", "sequence, ms", "groups, ms", "ratio", "held, kB", "held, kB"):
        table.add_column(heading, justify="right")
    for channels in (16, 64):
        for pixels in (8, 16):
            x = torch.randn(steps, batch, 2 * channels, pixels, pixels, device=device)
            models = [make(depth, channels, size, device) for size in (1, parallel)]
            calls = [partial(loss_of, model, x) for model in models]
            one, groups = rounds(calls, repeats)
            held = [count_step(call)[0] / 1e3 for call in calls]
            row = (one * 1e3, groups * 1e3, groups / one, *held)
            numbers = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in row]
            table.add_row(str(channels), str(pixels), *numbers)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
