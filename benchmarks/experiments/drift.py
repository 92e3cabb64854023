"""What is rebuilt at depth, in floating point and on the grid.

The same chain of reversible blocks trains one step three ways: the published procedure, this package's
chain with streams in plain floating point, and on the grid. Counted are the spikes of the rebuild that are
not the forward's; measured is the largest error of the rebuilt input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from snn_reversible_plugin import RevSSequence

from ..experiment import Entry, Options, Tick, Work
from ..measure import Result, watch_spikes
from ..methods import Training
from ..networks import reversible_chain
from ..peers.published import publish
from ..workloads import rate_loss


def works(options: Options) -> Iterator[Work]:
    shape = [2, 1, 2, 8, 8] if options.quick else [4, 8, 2, 32, 32]
    for depth in (8, 27) if options.quick else (27, 54, 100, 200):
        yield Work(str(depth), ("published", "float", "grid"), {"depth": depth, "shape": shape})


def measure(way: str, options: Options, _tick: Tick, depth: int, shape: list[int]) -> Entry:
    """One training step of a chain; what its rebuild got wrong."""
    torch.manual_seed(0)
    model = reversible_chain(depth)().to(options.device)
    x = torch.rand(shape, device=options.device)
    chain = model[1]
    assert isinstance(chain, RevSSequence)
    if way == "published":
        publish(model)
    elif way == "float":
        for block in chain.blocks:
            block.bits = None
    result = Result("", way)
    watch_spikes(Training(model, lambda batch: rate_loss(model, batch)), x, result)
    return {
        "flipped_spikes": result.rebuilt_flips, "spikes": result.spikes, "max_error": result.rebuild_error
    }  # fmt: skip
