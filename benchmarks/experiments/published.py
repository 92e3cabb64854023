"""A training step of each published family, stock and converted, where stock holds 100 MB and more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate, counted_alone, ratio
from ..published import FAMILIES
from ..published.family import Family

METHODS = ("stock", "memory", "speed")


def works(options: Options) -> Iterator[Work]:
    for family in FAMILIES.values():
        width, shape = family.small if options.quick else family.large
        settings = {
            "family": family.name,
            "width": width,
            "shape": list(shape),
            "repeats": options.rounds(3),
        }
        yield Work(family.name, METHODS, settings)


def prepare(method: str, family: Family, width: int) -> nn.Module:
    """The network under one of the methods, built anew: snnTorch's resets know no copies."""
    torch.manual_seed(0)
    model = family.network(width)
    return model if method == "stock" else srp.convert_to_reversible(model, mode=method)


def together(
    methods: Sequence[str],
    options: Options,
    tick: Tick,
    family: str,
    width: int,
    shape: list[int],
    repeats: int,
) -> Entries:
    published = FAMILIES[family]
    x = published.batch(tuple(shape)).to(options.device)
    losses, found = {}, {}
    for method in methods:
        model = prepare(method, published, width).to(options.device)

        def loss(model: nn.Module = model) -> torch.Tensor:
            model.zero_grad()
            return published.loss(model, x)

        tick(f"{family}: {method}, memory")
        loss().backward()  # what is made at the first step and kept is not a step's
        with counted_alone(model):
            held, peak = count_step(loss)
        losses[method] = loss
        found[method] = {"family": family, "method": method, "held": held, "peak": peak}
        found[method]["own_procedure"] = published.own_procedure
        model.zero_grad()
    runs = {method: (lambda loss=loss: loss().backward()) for method, loss in losses.items()}
    tell = partial(_tell, tick, family)
    seconds = alternate(runs, repeats, x.device, tell)
    for method, entry in found.items():
        entry["time_ratio"] = ratio(seconds[method], seconds["stock"])
    return found


def _tell(tick: Tick, family: str, method: str) -> None:
    tick(f"{family}: {method}, time")
