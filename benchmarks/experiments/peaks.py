"""Peaks of a training step in every mode: of the benchmarks' networks and of the published families."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entry, Options, Tick, Work
from ..measure import counted_alone, counter_on
from ..published import FAMILIES
from ..workloads import NETWORKS, WORKLOADS

STEPPED = "minimal, stepped"  # with step_in_backward, which frees parameters' gradients
FORWARD = "stock's forward"  # without a gradient, so that nothing is held for a backward
METHODS = ("stock", "memory", "auto", STEPPED, FORWARD)
LARGER = {"rev-s-resnet37": 32}  # images, for what each takes where gradients of parameters are few
LEAST = re.compile(r"takes at least ([\d,]+)")  # of the error of a budget that can't be met


def works(options: Options) -> Iterator[Work]:
    for workload in NETWORKS:
        if shape := workload.shape(options.quick):
            yield Work(workload.name, METHODS, {"network": workload.name, "shape": list(shape)})
        if (images := LARGER.get(workload.name)) and not options.quick:
            settings = {"network": workload.name, "shape": [shape[0], images, *shape[2:]]}
            yield Work(f"{workload.name}, {images} images", METHODS, settings)
    for family in FAMILIES.values():
        width, shape = family.small if options.quick else family.large
        settings = {"family": family.name, "width": width, "shape": list(shape)}
        # A procedure of its own may go backward several times a step.
        methods = tuple(one for one in METHODS if not (family.own_procedure and one in (STEPPED, FORWARD)))
        yield Work(family.name, methods, settings)


def measure(
    method: str,
    options: Options,
    tick: Tick,
    shape: list[int],
    network: str | None = None,
    family: str | None = None,
    width: int = 0,
) -> Entry:
    """Bytes of the second step; of "memory" also the whole, and what a budget says of it beforehand.

    Of a forward alone, its peak.
    """
    torch.manual_seed(0)
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    if network is not None:
        workload = WORKLOADS[network]
        model, x, loss = workload.make(), workload.batch(tuple(shape), options.device), workload.loss_of
    else:
        assert family is not None
        published = FAMILIES[family]
        model, x, loss = published.network(width), published.batch(tuple(shape)), published.loss
    model, x = model.to(options.device), x.to(options.device)
    entry: Entry = {"method": method}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if family is not None:
        entry["own_procedure"] = FAMILIES[family].own_procedure
    if method == FORWARD:
        tick("a forward")
        with torch.no_grad(), counted_alone(model), counter_on(x.device) as counter:
            loss(model, x)
        return entry | {"peak": counter.peak}
    if method == STEPPED:
        srp.convert_to_reversible(model, mode="minimal")
        srp.step_in_backward(optimizer)
    elif method != "stock":
        srp.convert_to_reversible(model, mode=method)

    def run() -> torch.Tensor:
        model.zero_grad()
        return loss(model, x)

    tick("a step to warm up")
    run().backward()
    if method == STEPPED:
        optimizer.step()
    model.zero_grad()
    tick("a step")
    with counted_alone(model):
        entry["held"], entry["peak"] = count_step(run)
    if method == "memory":
        tensors = (*model.parameters(), *model.buffers(), x)
        entry["whole"] = entry["peak"] + sum(tensor.nbytes for tensor in tensors)
        entry["foreseen"] = _foreseen(model, run)
    model.zero_grad()
    gc.collect()
    return entry


def _foreseen(model: nn.Module, run: Callable[[], torch.Tensor]) -> int | None:
    """The least that a budget says a step takes; None where it says nothing."""
    srp.convert_to_reversible(model, budget=1)
    try:
        run()
    except RuntimeError as error:
        found = LEAST.search(str(error))
        return None if found is None else int(found[1].replace(",", ""))
    return None
