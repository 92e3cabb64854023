"""Measuring one workload under every method in one run: same weights, same batch, alternating in time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin.memory import count_step, time_step

from .methods import METHODS, CannotRun, prepare
from .workloads import Workload

MIB = 2**20


@dataclass
class Result:
    """One cell of the table. Memory in bytes, beyond parameters and inputs; ``time_ratio`` to stock."""

    workload: str
    method: str
    held: int | None = None
    peak: int | None = None
    seconds: list[float] | None = None
    time_ratio: float | None = None
    gradient_difference: float | None = None
    bytes_a_neuron_step: float | None = None
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(workload: Workload, device: str, repeats: int, tick: Callable[[str], None]) -> list[Result]:
    """Run the workload under every method; ``tick`` is told of each run."""
    torch.manual_seed(0)
    stock = workload.make().to(device)
    x = torch.rand(workload.shape, device=device)
    results: dict[str, Result] = {}
    models: dict[str, nn.Module] = {}
    gradients: list[torch.Tensor | None] = []
    for name in METHODS:
        result = results[name] = Result(workload.name, name)
        tick(f"{workload.name}: {name}, memory")
        try:
            model = prepare(name, workload, stock, x)
            model.zero_grad()
            torch.manual_seed(1)
            result.held, result.peak = count_step(lambda model=model: workload.loss_of(model, x))
        except CannotRun as reason:
            result.why_not = str(reason)
            continue
        found = [p.grad for p in model.parameters()]
        if name == "stock":
            gradients = found
        result.gradient_difference = _difference(gradients, found)
        if workload.neuron_steps:
            result.bytes_a_neuron_step = result.held / workload.neuron_steps
        models[name] = model
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(repeats + 1):
        for name, model in models.items():
            tick(f"{workload.name}: {name}, time")
            model.zero_grad()
            taken = time_step(lambda model=model: workload.loss_of(model, x))
            if round_:  # the first warms up
                seconds[name].append(taken)
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["stock"], strict=True)]
        results[name].seconds = times
        results[name].time_ratio = statistics.median(ratios)
    return list(results.values())


def _difference(expected: list[torch.Tensor | None], found: list[torch.Tensor | None]) -> float:
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return math.inf
        largest = max(largest, float((a - b).abs().max()))
    return largest
