"""The largest batch within a card's memory, predicted from two small ones.

One prediction of each network and method is tried where it takes little. A budget itself is tried with one
network, where the machine has room for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import torch

from snn_reversible_plugin.reports.fit import free_memory

from ..experiment import Entry, Options, Tick, Work
from ..measure import peak_within
from ..methods import COMPILED, METHODS, CannotRun, Training, prepare
from ..workloads import WORKLOADS, Workload

SHOWN = ("vgg", "sew-resnet18", "spiking-resnet34", "spikformer", "tutorial-6", "detection-416")
# GiB, and what each is tried with on one network: the slow mode once, for it takes minutes.
CHECKS = {8: ("stock", "memory", "minimal"), 12: ("stock", "memory"), 24: ("stock", "memory")}
CHECKED = "vgg"
TRIED = ("stock", "checkpoint", "memopt 1", *(name for name, one in METHODS.items() if one.ours))
WITHOUT = {*COMPILED, "blocks + tape, speed"}
MOST = 3  # times the larger small batch's peak: the budget of the prediction that is tried,
MOST_BYTES = 7 << 29  # and no more than so much
ROOM = 1.25  # times a budget has to be free: what the process takes beside a step


def works(options: Options) -> Iterator[Work]:
    methods = tuple(name for name in TRIED if name not in WITHOUT)
    for name in SHOWN:
        if shape := WORKLOADS[name].shape(options.quick):
            yield Work(name, methods, _settings(name, shape))
    if not options.quick:
        shape = WORKLOADS[CHECKED].full
        for gib, checked_with in CHECKS.items():
            yield Work(f"{CHECKED} in {gib} GiB", checked_with, _settings(CHECKED, shape) | {"budget": gib})


def _settings(name: str, shape: tuple[int, ...]) -> Entry:
    return {"workload": name, "shape": list(shape), "small": small(shape)}


def small(shape: tuple[int, ...]) -> list[int]:
    """The two batches: one and two where images are large. Of small images, smaller batches may have their
    peak in another layer than large ones."""
    return [1, 2] if shape[-1] > 64 else [4, 8]


def measure(
    method: str,
    options: Options,
    tick: Tick,
    workload: str,
    shape: list[int],
    small: list[int],
    budget: int | None = None,
) -> Entry:
    """Bytes of parameters, buffers, gradients, inputs and all that a step takes; no optimizer's state."""
    work = WORKLOADS[workload]
    if budget is not None:
        free = free_memory(torch.device(options.device))
        if free < ROOM * budget * 2**30:
            why = f"{free / 2**30:.0f} GiB are free here, and it takes {ROOM * budget:.0f}"
            return {"method": method, "why_not": why}
    torch.manual_seed(0)
    stock = work.make().to(options.device)
    try:
        (least, at_least), (more, at_more) = (
            (size, _bytes(method, work, stock, _batch(work, shape, size, options.device))) for size in small
        )
    except CannotRun as reason:
        return {"method": method, "why_not": str(reason)}
    a_sample = max(1.0, (at_more - at_least) / (more - least))
    alone = at_least - least * a_sample
    tick("a prediction is tried")
    limit = min(MOST * at_more, MOST_BYTES) if budget is None else budget * 2**30
    tried = max(more + 1, int((limit - alone) / a_sample))
    found = _bytes(method, work, stock, _batch(work, shape, tried, options.device))
    return {
        "method": method,
        "a_sample": round(a_sample),
        "alone": round(alone),
        "fits": {str(gib): max(0, int((gib * 2**30 - alone) / a_sample)) for gib in CHECKS},
        "tried": tried,
        "took": found,
        "off": found / (alone + tried * a_sample) - 1,
    }


def _batch(work: Workload, shape: list[int], size: int, device: str) -> torch.Tensor:
    at = work.batch_dim
    return work.batch((*shape[:at], size, *shape[at + 1 :]), device)


def _bytes(method: str, work: Workload, stock: torch.nn.Module, x: torch.Tensor) -> int:
    training: Training = prepare(method, work, stock, x)
    training.run(x)  # the first step of a shape may choose for later ones
    peak = peak_within(training, x, inf)
    assert peak is not None
    lives = (*training.model.parameters(), *training.model.buffers(), x)
    return peak + sum(tensor.nbytes for tensor in lives)
