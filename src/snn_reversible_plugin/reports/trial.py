"""One training step of the user's model on the user's batch, run as often as a report needs.

The one idea: every run starts from the same state and the same random numbers, and leaves none behind.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from snn_reversible_plugin import convert
from snn_reversible_plugin.modules.as_it_ran import unchanged
from snn_reversible_plugin.reports.measure import StepCost, count_step, time_step

Loss = Callable[[Any], torch.Tensor]


@contextmanager
def as_converted(model: nn.Module) -> Iterator[convert.Settings]:
    """The settings of a converted model; another model is converted for the time being."""
    if isinstance(model, convert.Recorded):
        yield convert.settings_of(model)
        return
    convert.convert_to_reversible(model)
    try:
        yield convert.settings_of(model)
    finally:
        convert.restore(model)


def loss_of(output: Any, loss: Loss | None) -> torch.Tensor:
    """The user's loss; by default the mean of squares of all outputs that have a gradient."""
    if loss is not None:
        return loss(output)
    terms = [leaf.float().square().mean() for leaf in differentiable(output)]
    if not terms:
        raise ValueError(
            "no output of the model has a gradient: are all parameters frozen, or is grad mode off?"
        )
    return torch.stack(terms).sum()


def differentiable(output: Any) -> list[torch.Tensor]:
    """The tensors of a nested output that have a gradient."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]


def costs(
    model: nn.Module, inputs: tuple[Any, ...], loss: Loss | None, repeats: int
) -> tuple[StepCost, StepCost]:
    """The cost of a step, stock and converted; times are medians of alternating runs."""

    def step() -> torch.Tensor:
        return loss_of(model(*inputs), loss)

    def stock_step() -> torch.Tensor:
        with convert.stock(model):
            return step()

    seconds: dict[Callable[[], torch.Tensor], list[float]] = {stock_step: [], step: []}
    for _ in range(repeats):
        for run, times in seconds.items():
            with unchanged(model):
                times.append(time_step(run))
    found = []
    for run, times in seconds.items():
        with unchanged(model):
            held, peak = count_step(run)
        found.append(StepCost(held, peak, statistics.median(times)))
    return found[0], found[1]


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.2f} MB"
