"""T-RevSNN trained plainly, the published way, in floating point and on the grid.

A step of each on the same weights and batch: what is held between forward and backward, the peak of both
beyond parameters, gradients included, the time to the plain run's, and how far rebuilt states are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from snn_reversible_plugin.models import t_rev_snn
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate, ratio
from ..peers.published_columns import PublishedColumns, publish_columns


def make(size: str, steps: int, way: str) -> nn.Module:
    torch.manual_seed(0)
    bits = None if way in ("float", "published") else 16
    model = t_rev_snn(size, steps=steps, num_classes=10, bits=bits)
    model.columns.reversible = way != "plain"
    return publish_columns(model) if way == "published" else model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    out = model(x)
    outs = out if isinstance(out, tuple) else (out,)
    targets = torch.arange(len(outs[0]), device=x.device) % 10
    return sum(nn.functional.cross_entropy(logits, targets) for logits in outs)  # type: ignore[return-value]


def difference(model: nn.Module, x: Tensor) -> float:
    """The largest error of a rebuilt state of the first time step."""
    model.columns.check = True
    loss_of(model, x).backward()
    model.columns.check = False
    if isinstance(model.columns, PublishedColumns):
        return max(model.columns.errors)
    return 0.0 if model.columns.last_rebuild is None else model.columns.last_rebuild.max_error


def works(options: Options) -> Iterator[Work]:
    batch, pixels = (1, 32) if options.quick else (8, 64)
    for size in ("tiny",) if options.quick else ("tiny", "tiny_dvs"):
        for steps in (4,) if options.quick else (4, 8, 16, 32):
            shape = [steps, batch, 2, pixels, pixels] if size == "tiny_dvs" else [batch, 3, pixels, pixels]
            settings = {"size": size, "steps": steps, "shape": shape, "repeats": options.rounds(3)}
            yield Work(f"{size}, {steps}", ("plain", "published", "float", "grid"), settings)


def together(
    ways: Sequence[str], options: Options, tick: Tick, size: str, steps: int, shape: list[int], repeats: int
) -> Entries:
    models = {way: make(size, steps, way).to(options.device) for way in ways}
    x = torch.randn(shape).to(options.device)
    found = {}
    for way, model in models.items():
        tick(f"T-RevSNN {size}, {steps} sub-networks: {way}, memory")
        error = difference(model, x) if way != "plain" else 0.0
        held, peak = count_step(partial(loss_of, model, x))
        found[way] = {"way": way, "held": held, "peak": peak, "max_error": error}
        model.zero_grad()
    runs = {way: (lambda model=model: loss_of(model, x).backward()) for way, model in models.items()}
    tell = lambda way: tick(f"T-RevSNN {size}, {steps} sub-networks: {way}, time")  # noqa: E731
    seconds = alternate(runs, repeats, x.device, tell)
    for way, entry in found.items():
        entry["time_ratio"] = ratio(seconds[way], seconds["plain"])
    return found
