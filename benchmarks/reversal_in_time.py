"""``python -m benchmarks.reversal_in_time``: what neurons on the grid rebuild, hold and cost.

Three tables: membranes rebuilt over thousands of steps, beside plain float inversion; bytes held for each
neuron and time step of a Linear-LIF-Linear-LIF-Linear loop, by cause, Python's objects counted, stock in
the same run; and the time of a training step as a ratio to stock's, alternating.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tracemalloc
from collections.abc import Callable
from typing import Annotated, Any

import snntorch
import torch
import typer
from rich.console import Console
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.neurons.on_grid import timeline
from snn_reversible_plugin.reports.measure import count_step, time_step

from . import readme, store, time_tables

NAME = "reversal-in-time"
Row = dict[str, Any]


class SnnTorchLoop(nn.Module):
    """Two layers of snnTorch's Leaky in a loop over time."""

    def __init__(self, beta: float, soft: bool, width: int) -> None:
        super().__init__()
        settings: dict[str, Any] = {"beta": beta, "reset_mechanism": "subtract" if soft else "zero"}
        self.fc1, self.lif1 = nn.Linear(width, width), snntorch.Leaky(**settings)
        self.fc2, self.lif2 = nn.Linear(width, width), snntorch.Leaky(**settings)
        self.fc3 = nn.Linear(width, 10)

    def forward(self, x_seq: Tensor) -> Tensor:
        mem1, mem2, total = self.lif1.reset_mem(), self.lif2.reset_mem(), torch.zeros(())
        for x in x_seq:
            spk, mem1 = self.lif1(self.fc1(x), mem1)
            spk, mem2 = self.lif2(self.fc2(spk), mem2)
            total = total + self.fc3(spk)
        return total


class SpikingJellyLoop(nn.Module):
    """The same of SpikingJelly's LIFNode, stepped one time step at a time."""

    def __init__(self, beta: float, soft: bool, width: int) -> None:
        super().__init__()

        def lif() -> nn.Module:
            reset = None if soft else 0.0
            return neuron.LIFNode(
                tau=1 / (1 - beta), decay_input=False, v_reset=reset, surrogate_function=surrogate.ATan()
            )

        self.fc1, self.lif1 = nn.Linear(width, width), lif()
        self.fc2, self.lif2 = nn.Linear(width, width), lif()
        self.fc3 = nn.Linear(width, 10)

    def forward(self, x_seq: Tensor) -> Tensor:
        functional.reset_net(self)
        total = torch.zeros(())
        for x in x_seq:
            total = total + self.fc3(self.lif2(self.fc2(self.lif1(self.fc1(x)))))
        return total


LOOPS: dict[str, Callable[[float, bool, int], nn.Module]] = {
    "snnTorch": SnnTorchLoop,
    "SpikingJelly": SpikingJellyLoop,
}


def tuned(net: nn.Module, x_seq: Tensor, rate: float) -> tuple[nn.Module, float]:
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


def timelines_of(run: Callable[[], Any]) -> tuple[Any, list[timeline.Timeline]]:
    """What a forward returns, and the timelines that it made."""
    out = run()
    return out, [one for one in gc.get_objects() if type(one) is timeline.Timeline]


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


def rebuilt(lengths: list[int]) -> list[Row]:
    """Bits that differ in membranes rebuilt from the last one, and how far plain float inversion gets."""
    found: list[Row] = []
    for soft in (True, False):
        for beta in (0.3, 0.5, 0.9, 0.99):
            for steps in lengths:
                torch.manual_seed(0)
                net = nn.Linear(8, 64)
                lif = snntorch.Leaky(beta, reset_mechanism="subtract" if soft else "zero")
                root = nn.ModuleList([net, lif])
                srp.convert_to_reversible(root)
                x, seen = torch.randn(4, 8) * (2 - 1.8 * beta), []
                with srp.reversible(root):
                    mem = lif.reset_mem()
                    for _ in range(steps):
                        spk, mem = lif(net(x), mem)
                        seen.append((mem, spk))
                (line,) = (one for one in gc.get_objects() if type(one) is timeline.Timeline)
                differ = sum(
                    int((line.state(t).view_as(mem) != mem).sum())
                    for t, (mem, _) in reversed(list(enumerate(seen, 1)))
                )
                error = _float_inversion(net(x).detach(), steps, beta, soft)
                found.append(
                    {"soft": soft, "beta": beta, "steps": steps, "differ": differ, "float_error": error}
                )
                del line, seen, spk, mem
    return found


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


def bytes_held(steps: int, batch: int, width: int) -> list[Row]:
    """Bytes for each neuron and step, by cause."""
    found: list[Row] = []
    for name, make in LOOPS.items():
        for soft, beta in ((True, 0.5), (True, 0.9), (False, 0.5), (False, 0.9)):
            torch.manual_seed(0)
            x_seq = torch.rand(steps, batch, width)
            net, rate = tuned(make(beta, soft, width), x_seq[:40], 0.1)
            twin = srp.convert_to_reversible(copy.deepcopy(net))
            n = 2 * steps * batch * width
            stock = sum(held(net, x_seq))
            tensors, objects = held(twin, x_seq)
            out, lines = timelines_of(lambda twin=twin, x_seq=x_seq: twin(x_seq))
            records = sum(line.records.nbytes for line in lines)
            spikes = 2 * (steps + 1) * -(-batch * width // 8)
            del out, lines
            found.append(
                {
                    "loop": name, "soft": soft, "beta": beta, "firing": rate, "stock": stock / n,
                    "grid": (tensors + objects) / n, "spikes": spikes / n,
                    "remainders": (records - spikes) / n, "objects": objects / n,
                    "less": stock / (tensors + objects),
                }
            )  # fmt: skip
    return found


def step_time(steps: int, batch: int, width: int, repeats: int) -> list[Row]:
    """A training step on the grid against stock's, alternating."""
    found: list[Row] = []
    for name, make in LOOPS.items():
        for soft in (True, False):
            torch.manual_seed(0)
            x_seq = torch.rand(steps, batch, width)
            net, _ = tuned(make(0.9, soft, width), x_seq, 0.1)
            models = {
                "stock": net,
                "tape": srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock"),
                "grid": srp.convert_to_reversible(copy.deepcopy(net)),
            }
            times: dict[str, list[float]] = {name: [] for name in models}
            for repeat in range(repeats + 1):
                for one, model in models.items():
                    seconds = time_step(lambda model=model, x_seq=x_seq: model(x_seq).square().mean())
                    if repeat:
                        times[one].append(seconds)
            ratios = {
                one: statistics.median(a / b for a, b in zip(times[one], times["stock"], strict=True))
                for one in ("tape", "grid")
            }
            found.append(
                {
                    "loop": name,
                    "soft": soft,
                    "beta": 0.9,
                    "seconds": statistics.median(times["stock"]),
                    **ratios,
                }
            )  # fmt: skip
    return found


def main(
    only: Annotated[str | None, typer.Option(help="rebuilt, bytes or time; all by default")] = None,
    steps: Annotated[int, typer.Option(help="time steps of the loop whose bytes are counted")] = 1000,
    batch: int = 128,
    width: int = 512,
    timed_steps: int = 50,
    repeats: int = 7,
    save: Annotated[bool, typer.Option(help="write benchmarks/results/reversal-in-time.json")] = True,
) -> None:
    """Measure, store and print the tables."""
    console = Console(width=120)
    parts: dict[str, Callable[[], list[Row]]] = {
        "rebuilt": lambda: rebuilt([1000, 5000]),
        "bytes": lambda: bytes_held(steps, batch, width),
        "time": lambda: step_time(timed_steps, batch, width, repeats),
    }
    if only is not None and only not in parts:
        raise typer.BadParameter(f"unknown: {only}; there are {[*parts]}")
    found = readme.load_all().get(NAME, {})
    for name in [only] if only else parts:
        with console.status(name):
            found[name] = parts[name]()
        console.print(time_tables.REVERSAL[name](found[name]).rich(name))
    if save:
        store.write(
            NAME, found, shape=[steps, batch, width], timed_steps=timed_steps, **store.machine("cpu")
        )


if __name__ == "__main__":
    store.settle()
    typer.run(main)
