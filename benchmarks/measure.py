"""Measuring one workload under every method in one run: same weights, same batch, alternating in time."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import snntorch
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.kinds import is_spiking
from snn_reversible_plugin.reports.measure import AllocationCounter, CudaStatistics

from .methods import CannotRun, Training, check_rebuilds, prepare, rebuild_error
from .workloads import Workload


@dataclass
class Result:
    """One cell of the table. Memory in bytes, beyond parameters and inputs; times in seconds.

    Args:
        held: alive between forward and backward.
        peak: the most at any time, gradients of the parameters included.
        peak_beyond_gradients: the same without those gradients; on the CPU only.
        counted_by: "allocations", or "cuda" for CUDA's caching allocator.
        time_ratio: the median of the ratios to stock's step of the same round; ``time_spread`` the
            quartiles.
        gradient_difference: the largest absolute difference to stock's gradients; ``gradient_scale`` the
            largest stock gradient.
        gradient_error: for another forward than stock's, the difference to autograd on that forward.
        flipped_spikes: outputs of neurons in the forward that differ from stock's; ``spikes`` of how many.
        rebuilt_flips: outputs of neurons that differ when a reversible branch runs again.
        rebuild_error: the largest error of a rebuilt chain input.
        largest: the largest size of the growing dimension within stock's peak at a part of the shape.
        why_not: why there are no numbers.
    """

    workload: str
    method: str
    held: int | None = None
    peak: int | None = None
    peak_beyond_gradients: int | None = None
    counted_by: str = "allocations"
    seconds: list[float] = field(default_factory=list)
    time_ratio: float | None = None
    time_spread: tuple[float, float] | None = None
    gradient_difference: float | None = None
    gradient_scale: float | None = None
    gradient_error: float | None = None
    flipped_spikes: int | None = None
    spikes: int | None = None
    fired: int | None = None
    rebuilt_flips: int | None = None
    rebuild_error: float | None = None
    largest: int | None = None
    why_not: str | None = None


def measure(
    workload: Workload,
    shape: tuple[int, ...],
    device: str,
    methods: Iterable[str],
    repeats: int,
    tick: Callable[[str], None],
) -> list[Result]:
    """Run the workload under every method, "stock" first; ``tick`` is told of each run."""
    torch.manual_seed(0)
    stock = workload.make().to(device)
    x = workload.batch(shape, device)
    results: dict[str, Result] = {}
    trainings: dict[str, Training] = {}
    expected: list[torch.Tensor | None] = []
    expected_spikes: list[torch.Tensor] = []
    for name in methods:
        result = results[name] = Result(workload.name, name)
        tick(f"{workload.name}: {name}, memory")
        try:
            training = prepare(name, workload, stock, x)
            training.run(x)  # what is made at the first step and kept is not a step's
            count(training, x, result)
            gradients = [p.grad for p in training.model.parameters()]
            spikes = watch_spikes(training, x, result)
        except CannotRun as reason:
            result.why_not = str(reason)
            continue
        except Exception as error:  # a peer that fails is a result
            if name == "stock":
                raise
            result.why_not = f"{type(error).__name__}: {error}".splitlines()[0]
            result.held = result.peak = result.peak_beyond_gradients = None
            continue
        if name == "stock":
            expected, expected_spikes = gradients, spikes
        result.gradient_difference = _difference(expected, gradients)
        result.gradient_scale = max((float(g.abs().max()) for g in gradients if g is not None), default=0.0)
        result.flipped_spikes = _flips(expected_spikes, spikes)
        if training.plain is not None:
            tick(f"{workload.name}: {name}, its forward under autograd")
            training.plain.model.zero_grad()
            training.plain.run(x)
            result.gradient_error = _difference(
                [p.grad for p in training.plain.model.parameters()], gradients
            )
            training.plain = None
        training.model.zero_grad()
        trainings[name] = training

    def before(name: str) -> None:
        tick(f"{workload.name}: {name}, time")
        trainings[name].model.zero_grad()

    runs = {name: partial(training.run, x) for name, training in trainings.items()}
    times = alternate(runs, repeats, x.device, before)
    for name, seconds in times.items():
        result, ratios = results[name], _ratios(seconds, times["stock"])
        result.seconds, result.time_ratio = seconds, statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        result.time_spread = (low, high)
    return list(results.values())


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    before: Callable[[str], object] = str,
) -> dict[str, list[float]]:
    """Seconds of each run, in rounds: what else the machine does meets all alike. One round warms up.

    ``before`` is told whose turn it is, and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            before(name)
            start = _now(device)
            run()
            taken = _now(device) - start
            if round_:
                seconds[name].append(taken)
    return seconds


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios of the same round."""
    return statistics.median(_ratios(ours, theirs))


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def count(training: Training, x: torch.Tensor, result: Result) -> None:
    """Fill in the memory of one step."""
    training.model.zero_grad()
    gc.collect()
    with counted_alone(training.model), counter_on(x.device) as counter:
        if training.loss_of is None:
            training.run(x)
        else:
            loss = training.loss_of(x)
            result.held = counter.live
            loss.backward()
    result.peak = counter.peak
    result.peak_beyond_gradients = peak_beyond_gradients(counter, training.model)
    if not isinstance(counter, AllocationCounter):
        result.counted_by = "cuda"


def peak_beyond_gradients(counter: AllocationCounter | CudaStatistics, model: nn.Module) -> int | None:
    """The peak without the gradients that parameters have by now; None where nobody can tell."""
    if not isinstance(counter, AllocationCounter):
        return None
    return counter.peak_beyond(p.grad for p in model.parameters() if p.grad is not None)


def counter_on(device: torch.device) -> AllocationCounter | CudaStatistics:
    return CudaStatistics() if device.type == "cuda" else AllocationCounter()


@contextmanager
def counted_alone(model: nn.Module) -> Iterator[None]:
    """Inside, ``snntorch.utils.reset`` resets this model's neurons alone.

    Else it resets all that were ever constructed, so that a step takes their states as well: more with each
    network that was measured before.
    """
    there = list(snntorch.SpikingNeuron.instances)
    own = {id(module) for module in model.modules()}
    snntorch.SpikingNeuron.instances[:] = [one for one in there if id(one) in own]
    try:
        yield
    finally:
        snntorch.SpikingNeuron.instances[:] = there


def peak_within(training: Training, x: torch.Tensor, limit: float) -> int | None:
    """The peak of one step in bytes, None if it passes the limit."""
    training.model.zero_grad()
    gc.collect()
    with counted_alone(training.model), counter_on(x.device) as counter:
        training.run(x)
    return counter.peak if counter.peak <= limit else None


def watch_spikes(training: Training, x: torch.Tensor, result: Result) -> list[torch.Tensor]:
    """Run a step and return what each neuron gave in the forward, in order, as booleans.

    Where reversible branches run again in the backward, their neurons' outputs are compared with the
    forward's.
    """
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    names = {id(module): name for name, module in training.model.named_modules() if is_spiking(module)}

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        with tape.paused(), torch.no_grad():
            calls.append((module, tree_leaves(output)[0].ne(0)))

    handles = [m.register_forward_hook(hook) for m in training.model.modules() if id(m) in names]
    check_rebuilds(training.model, True)
    training.model.zero_grad()
    try:
        if training.loss_of is None:
            training.run(x)
            forward = len(calls)
        else:
            loss = training.loss_of(x)
            forward = len(calls)
            loss.backward()
    finally:
        check_rebuilds(training.model, False)
        for handle in handles:
            handle.remove()
    result.rebuild_error = rebuild_error(training.model)
    if result.rebuild_error is not None:
        first = {id(module): spikes for module, spikes in calls[:forward]}
        again = calls[forward:]
        result.rebuilt_flips = sum(
            int((first[id(m)] != spikes).sum()) for m, spikes in again if id(m) in first
        )
    spikes = [spikes for _, spikes in calls[:forward]]
    result.spikes = sum(s.numel() for s in spikes)
    result.fired = sum(int(s.sum()) for s in spikes)
    return spikes


def _flips(expected: list[torch.Tensor], found: list[torch.Tensor]) -> int | None:
    if [s.shape for s in expected] != [s.shape for s in found]:
        return None
    return sum(int((a != b).sum()) for a, b in zip(expected, found, strict=True))


def _difference(expected: list[torch.Tensor | None], found: list[torch.Tensor | None]) -> float | None:
    """The largest absolute difference; None between networks of different parameters."""
    if len(expected) != len(found):
        return None
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        if a is None and b is None:
            continue
        if a is None or b is None:
            return math.inf
        if a.shape != b.shape:
            return None
        largest = max(largest, float((a - b).abs().max()))
    return largest
