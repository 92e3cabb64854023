"""``python -m benchmarks.temporal_columns``: T-RevSNN trained plainly, the published way, and on the grid.

A step of each on the same weights and batch: what is held between forward and backward, the peak of both
beyond parameters, gradients included, the time to the plain run's, and how far rebuilt states are off.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from snn_reversible_plugin.models import t_rev_snn
from snn_reversible_plugin.reports.measure import count_step

from .published_columns import PublishedColumns, publish_columns

WAYS = ("plain", "published", "float", "grid")


def make(size: str, steps: int, way: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    bits = None if way in ("float", "published") else 16
    model = t_rev_snn(size, steps=steps, num_classes=10, bits=bits).to(device)
    model.columns.reversible = way != "plain"
    return publish_columns(model) if way == "published" else model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    outs = out if isinstance(out, tuple) else (out,)
    targets = torch.arange(len(outs[0]), device=x.device) % 10
    return sum(nn.functional.cross_entropy(logits, targets) for logits in outs)  # type: ignore[return-value]


def difference(model: nn.Module, x: Tensor) -> float:
    """The largest error of a rebuilt state of the first time step."""
    model.columns.check = True
    model.zero_grad()
    loss_of(model, x).backward()
    model.columns.check = False
    if isinstance(model.columns, PublishedColumns):
        return max(model.columns.errors)
    return 0.0 if model.columns.last_rebuild is None else model.columns.last_rebuild.max_error


def rounds(steps: list[Callable[[], Tensor]], number: int) -> list[float]:
    """Median seconds of each step, alternating."""
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(number + 1):  # the first round warms up
        for step, found in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            loss = step()
            loss.backward()
            if loss.is_cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in seconds]


def main(
    size: Annotated[str, typer.Option(help="tiny, small or tiny_dvs")] = "tiny",
    steps: Annotated[
        list[int] | None, typer.Option(help="sub-networks; by default 4, 8, 16 and 32")
    ] = None,
    batch: Annotated[int, typer.Option(help="examples")] = 8,
    pixels: Annotated[int, typer.Option(help="pixels on a side")] = 64,
    ways: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(WAYS)}; by default all")] = None,
    repeats: Annotated[int, typer.Option(help="rounds of timed steps; 0: none")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compare the ways at several numbers of sub-networks."""
    table = Table(title=f"T-RevSNN {size}, batch {batch}, {pixels} pixels, {device}")
    for heading in ("sub-networks", "way", "held, MB", "peak, MB", "time to plain", "rebuild off by"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for count in steps or [4, 8, 16, 32]:
        shape = (count, batch, 2, pixels, pixels) if size == "tiny_dvs" else (batch, 3, pixels, pixels)
        x = torch.randn(shape, device=device)
        costs, errors, seconds = {}, {}, {}
        chosen = ways or list(WAYS)
        models = {way: make(size, count, way, device) for way in chosen}
        for way, model in models.items():
            errors[way] = difference(model, x) if way != "plain" else 0.0
            model.zero_grad()
            gc.collect()
            costs[way] = count_step(partial(loss_of, model, x))
            model.zero_grad()
        if repeats:
            calls = [partial(loss_of, model, x) for model in models.values()]
            seconds = dict(zip(models, rounds(calls, repeats), strict=True))
        for way in chosen:
            held, peak = (f"{value / 1e6:.1f}" for value in costs[way])
            ratio = f"{seconds[way] / seconds['plain']:.2f}" if "plain" in seconds else ""
            table.add_row(str(count), way, held, peak, ratio, f"{errors[way]:.3g}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
