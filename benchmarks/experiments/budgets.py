"""What a budget foresees of a training step, and what the step takes: networks and published families."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entries, Entry, Options, Tick, Work
from ..measure import counted_alone
from ..published import FAMILIES
from ..workloads import NETWORKS, WORKLOADS

PARTS = {"1.25 x": 1.25, "all": 1e3}  # budgets, of what "memory" takes
METHODS = ("memory", *PARTS)
Step = Callable[[], torch.Tensor]


def works(options: Options) -> Iterator[Work]:
    for workload in NETWORKS:
        if shape := workload.shape(options.quick):
            yield Work(workload.name, METHODS, {"network": workload.name, "shape": list(shape)})
    for family in FAMILIES.values():
        width, shape = family.small if options.quick else family.large
        yield Work(family.name, METHODS, {"family": family.name, "width": width, "shape": list(shape)})


def together(
    methods: Sequence[str],
    options: Options,
    tick: Tick,
    shape: list[int],
    network: str | None = None,
    family: str | None = None,
    width: int = 0,
) -> Entries:
    """Bytes of a step in all: of "memory", and of what is within a budget of parts of that."""

    def make() -> tuple[nn.Module, torch.Tensor, Step]:
        torch.manual_seed(0)
        if network is not None:
            work = WORKLOADS[network]
            model, x, loss = work.make(), work.batch(tuple(shape), options.device), work.loss_of
        else:
            published = FAMILIES[family or ""]
            model, x, loss = published.network(width), published.batch(tuple(shape)), published.loss
        model, x = model.to(options.device), x.to(options.device)

        def run() -> torch.Tensor:
            model.zero_grad()
            return loss(model, x)

        return model, x, run

    model, x, run = make()
    srp.convert_to_reversible(model)
    tick("memory")
    whole = _whole(model, x, run, warm=1)
    found: Entries = {"memory": {"method": "memory", "whole": whole}}
    for method in methods:
        if method in PARTS:
            tick(method)
            found[method] = {"method": method, **_within(make, int(PARTS[method] * whole))}
    return found


def _within(make: Callable[[], tuple[nn.Module, torch.Tensor, Step]], budget: int) -> Entry:
    model, x, run = make()
    srp.convert_to_reversible(model, budget=budget)
    whole = _whole(model, x, run, warm=2)  # the first is measured, the second follows a plan
    plans = settings_of(model).plans
    assert plans is not None
    followed = [plan for plan in plans.by_first.values() if plan is not None]
    least = max((plan.least for plan in followed if plan.least is not None), default=None)
    peak = max((plan.peak for plan in followed if plan.peak is not None), default=None)
    kept = sum(sum(plan.kept) for plan in followed)
    return {"budget": budget, "least": least, "foreseen": peak, "whole": whole, "kept": kept}


def _whole(model: nn.Module, x: torch.Tensor, run: Step, warm: int) -> int:
    """The allocator's peak in a step, with what lives anyway."""
    with counted_alone(model):
        for _ in range(warm):
            run().backward()
        model.zero_grad()
        gc.collect()
        before = [*model.buffers()]
        _, peak = count_step(run)
    model.zero_grad()
    # Membranes are buffers to some, and the step has made new ones, which the allocator has told of.
    live = [one for one in model.buffers() if any(one is other for other in before)]
    return peak + sum(tensor.nbytes for tensor in (*model.parameters(), *live, x))
