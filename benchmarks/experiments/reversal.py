"""What neurons on the grid rebuild, hold and cost, in a loop over time.

Three experiments: membranes rebuilt over thousands of steps, beside plain float inversion; bytes held for
each neuron and time step of a Linear-LIF-Linear-LIF-Linear loop, by cause, Python's objects counted, stock
in the same run; and the time of a training step as a ratio to stock's, alternating.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from itertools import product
from typing import Any

import snntorch
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.neurons.on_grid import timeline
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entry, Options, Tick, Work
from ..measure import alternate, ratio
from ..networks import LeakyLoop, LIFLoop, Loop


def snntorch_loop(beta: float, soft: bool, width: int) -> Loop:
    return LeakyLoop(width, beta=beta, reset_mechanism="subtract" if soft else "zero")


def spikingjelly_loop(beta: float, soft: bool, width: int) -> Loop:
    return LIFLoop(
        width, tau=1 / (1 - beta), decay_input=False, v_reset=None if soft else 0.0, v_threshold=1.0,
        surrogate_function=surrogate.ATan(),
    )  # fmt: skip


LOOPS: dict[str, Callable[[float, bool, int], Loop]] = {
    "snnTorch": snntorch_loop,
    "SpikingJelly": spikingjelly_loop,
}


def tuned(net: Loop, x_seq: Tensor, rate: float) -> tuple[Loop, float]:
    """Scale the inputs of both layers until about this share of neurons fires; the share that does."""
    counts: list[float] = []
    for lif, fc in ((net.lif1, net.fc1), (net.lif2, net.fc2)):
        hook = lif.register_forward_hook(lambda _m, _i, out: counts.append(_spikes(out).mean().item()))
        low, high = 0.01, 100.0
        weight = fc.weight.detach().clone()
        for _ in range(14):
            gain = (low * high) ** 0.5
            counts.clear()
            with torch.no_grad():
                fc.weight.copy_(weight * gain)
                net(x_seq)
            low, high = (gain, high) if statistics.mean(counts) < rate else (low, gain)
        hook.remove()
    return net, statistics.mean(counts)


def _spikes(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def timelines(besides: Collection[int] = ()) -> list[timeline.Timeline]:
    """All that live, but for those with these ids."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) is timeline.Timeline]
    return [one for one in found if id(one) not in besides]


def held(net: nn.Module, x_seq: Tensor) -> tuple[float, float]:
    """Bytes of tensors and of Python's objects that live between forward and backward."""
    for _ in range(2):
        net(x_seq[:3]).sum().backward()
    tensors, _ = count_step(lambda: net(x_seq).sum())
    gc.collect()
    tracemalloc.start()
    net(x_seq).sum().backward()  # what a first pass leaves behind is not held for a backward
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    loss = net(x_seq).sum()
    gc.collect()
    objects = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    loss.backward()
    return tensors, objects


def _reset(soft: bool) -> str:
    return "soft reset" if soft else "hard reset"


def lengths(options: Options) -> Iterator[Work]:
    for soft, beta, steps in product(
        (True, False), (0.3, 0.5, 0.9, 0.99), (50,) if options.quick else (1000, 5000)
    ):
        settings = {"soft": soft, "beta": beta, "steps": steps}
        yield Work(f"{_reset(soft)}, beta {beta}, T = {steps}", ("grid",), settings)


def rebuilt(_grid: str, options: Options, _tick: Tick, soft: bool, beta: float, steps: int) -> Entry:
    """Bits that differ in membranes rebuilt from the last one, and how far plain float inversion gets."""
    torch.manual_seed(0)
    before = [*map(id, timelines())]
    net = nn.Linear(8, 64)
    lif = snntorch.Leaky(beta, reset_mechanism="subtract" if soft else "zero")
    root = nn.ModuleList([net, lif]).to(options.device)
    srp.convert_to_reversible(root)
    x, seen = (torch.randn(4, 8) * (2 - 1.8 * beta)).to(options.device), []
    with srp.reversible(root):
        mem = lif.reset_mem()
        for _ in range(steps):
            spk, mem = lif(net(x), mem)
            seen.append((mem, spk))
    (line,) = timelines(before)
    differ = sum(
        int((line.state(t).view_as(mem) != mem).sum()) for t, (mem, _) in reversed(list(enumerate(seen, 1)))
    )
    return {"differ": differ, "float_error": _float_inversion(net(x).detach(), steps, beta, soft)}


@torch.no_grad()
def _float_inversion(current: Tensor, steps: int, beta: float, soft: bool) -> float:
    """How far plain float32 inversion drifts from the membranes of its own forward, worst over time."""
    mem, seen = torch.zeros_like(current), []
    for _ in range(steps):
        fired = (mem > 1).float()
        mem = beta * (mem if soft else (1 - fired) * mem) + current - (fired if soft else 0)
        seen.append((mem, fired))
    mem, worst = seen[-1][0].clone(), 0.0
    for t in range(len(seen) - 1, 0, -1):
        _, fired = seen[t]
        mem = (mem - current + (fired if soft else 0)) / beta
        if not soft:
            mem = torch.where(fired != 0, seen[t - 1][0], mem)  # stored at spikes
        error = (mem - seen[t - 1][0]).abs().max().item()
        worst = max(worst, error) if error == error else float("inf")
    return worst


def loops(options: Options) -> Iterator[Work]:
    shape = [20, 2, 16] if options.quick else [1000, 128, 512]
    for loop, (soft, beta) in product(LOOPS, ((True, 0.5), (True, 0.9), (False, 0.5), (False, 0.9))):
        settings = {"loop": loop, "soft": soft, "beta": beta, "shape": shape}
        yield Work(f"{loop}, {_reset(soft)}, beta {beta}", ("grid",), settings)


def bytes_held(
    _grid: str, options: Options, _tick: Tick, loop: str, soft: bool, beta: float, shape: list[int]
) -> Entry:
    """Bytes for each neuron and step, by cause."""
    torch.manual_seed(0)
    steps, batch, width = shape
    x_seq = torch.rand(shape).to(options.device)
    net, rate = tuned(LOOPS[loop](beta, soft, width).to(options.device), x_seq[:40], 0.1)
    twin = srp.convert_to_reversible(copy.deepcopy(net))
    n = 2 * steps * batch * width
    stock = sum(held(net, x_seq))
    tensors, objects = held(twin, x_seq)
    before = [*map(id, timelines())]
    out = twin(x_seq)
    records = sum(line.records.nbytes for line in timelines(before))
    spikes = 2 * (steps + 1) * -(-batch * width // 8)
    del out
    return {
        "firing": rate, "stock": stock / n, "grid": (tensors + objects) / n, "spikes": spikes / n,
        "remainders": (records - spikes) / n, "objects": objects / n, "less": stock / (tensors + objects),
    }  # fmt: skip


def short_loops(options: Options) -> Iterator[Work]:
    shape = [5, 2, 16] if options.quick else [50, 128, 512]
    for loop, soft in product(LOOPS, (True, False)):
        settings = {"loop": loop, "soft": soft, "shape": shape, "repeats": options.rounds(7)}
        yield Work(f"{loop}, {_reset(soft)}", ("grid",), settings)


def step_time(
    _grid: str, options: Options, tick: Tick, loop: str, soft: bool, shape: list[int], repeats: int
) -> Entry:
    """A training step on the grid against stock's, alternating."""
    torch.manual_seed(0)
    x_seq = torch.rand(shape).to(options.device)
    net, _ = tuned(LOOPS[loop](0.9, soft, shape[-1]).to(options.device), x_seq, 0.1)
    models = {
        "stock": net,
        "tape": srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock"),
        "grid": srp.convert_to_reversible(copy.deepcopy(net)),
    }
    runs = {
        name: (lambda model=model: model(x_seq).square().mean().backward())
        for name, model in models.items()
    }
    times = alternate(runs, repeats, x_seq.device, tick)
    ratios = {name: ratio(times[name], times["stock"]) for name in ("tape", "grid")}
    return {"beta": 0.9, "seconds": statistics.median(times["stock"])} | ratios
