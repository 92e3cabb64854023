"""``python -m benchmarks.drift``: what is rebuilt at depth, in floating point and on the grid.

The same chain of reversible blocks trains one step three ways: the published procedure, this package's
chain with streams in plain floating point, and on the grid. Counted are the spikes of the rebuild that are
not the forward's; measured is the largest error of the rebuilt input.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.progress import track

from snn_reversible_plugin import RevSSequence

from . import store
from .measure import Result, watch_spikes
from .methods import Training
from .networks import reversible_chain
from .published import publish
from .workloads import _rate_loss

WAYS = ("published", "float", "grid")


def drift(
    depth: int, way: str, shape: tuple[int, ...], device: str, seed: int = 0
) -> dict[str, float | int | None]:
    """One training step of a chain; what its rebuild got wrong."""
    torch.manual_seed(seed)
    model = reversible_chain(depth)().to(device)
    x = torch.rand(shape, device=device)
    chain = model[1]
    assert isinstance(chain, RevSSequence)
    if way == "published":
        publish(model)
    elif way == "float":
        for block in chain.blocks:
            block.bits = None
    result = Result("", way)
    watch_spikes(Training(model, lambda batch: _rate_loss(model, batch)), x, result)
    return {
        "flipped_spikes": result.rebuilt_flips,
        "spikes": result.spikes,
        "max_error": result.rebuild_error,
    }


def main(
    depths: Annotated[list[int] | None, typer.Option(help="blocks; by default 27, 54, 100 and 200")] = None,
    steps: Annotated[int, typer.Option(help="time steps")] = 4,
    batch: Annotated[int, typer.Option(help="examples")] = 8,
    size: Annotated[int, typer.Option(help="pixels on a side")] = 32,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    save: Annotated[bool, typer.Option(help="write benchmarks/results/drift.json")] = True,
) -> None:
    """Compare what is rebuilt with what was, at several depths."""
    shape = (steps, batch, 2, size, size)
    todo = [(depth, way) for depth in depths or [27, 54, 100, 200] for way in WAYS]
    found: dict[str, dict[str, object]] = {}
    for depth, way in track(todo, "drift"):
        found.setdefault(str(depth), {})[way] = drift(depth, way, shape, device)
        if save:
            store.write("drift", found, shape=list(shape), **store.machine(device))
    from .drift_tables import table

    print(table(found))


if __name__ == "__main__":
    typer.run(main)
