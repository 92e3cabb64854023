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
from rich.table import Table
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import timeline
from snn_reversible_plugin.memory import count_step, time_step


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
    before, _ = tracemalloc.get_traced_memory()
    loss = net(x_seq).sum()
    gc.collect()
    objects = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    loss.backward()
    return tensors, objects


def rebuilt(console: Console, lengths: list[int]) -> None:
    table = Table(title="Membranes rebuilt from the last one")
    for heading in ("reset", "beta", "steps", "grid: bits that differ", "float inversion: largest error"):
        table.add_column(heading, justify="right")
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
                row = ("soft" if soft else "hard", f"{beta}", f"{steps}", f"{differ}", f"{error:.3g}")
                table.add_row(*row)
                del line, seen, spk, mem
    console.print(table)


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


def bytes_held(console: Console, steps: int, batch: int, width: int) -> None:
    table = Table(title=f"Bytes held for each neuron and step (T={steps}, batch {batch}, width {width})")
    for heading in (
        "",
        "reset",
        "beta",
        "firing",
        "stock",
        "grid",
        "spikes",
        "rest of records",
        "objects",
        "less",
    ):
        table.add_column(heading, justify="right")
    for name, make in LOOPS.items():
        for soft, beta in ((True, 0.5), (True, 0.9), (False, 0.5), (False, 0.9)):
            torch.manual_seed(0)
            x_seq = torch.rand(steps, batch, width)
            net, rate = tuned(make(beta, soft, width), x_seq[:40], 0.1)
            twin = srp.convert_to_reversible(copy.deepcopy(net))
            n = 2 * steps * batch * width
            stock_tensors, stock_objects = held(net, x_seq)
            tensors, objects = held(twin, x_seq)
            out, lines = timelines_of(lambda twin=twin, x_seq=x_seq: twin(x_seq))
            records = sum(line.records.nbytes for line in lines)
            spikes = 2 * (steps + 1) * -(-batch * width // 8)
            total, stock = tensors + objects, stock_tensors + stock_objects
            table.add_row(
                name, "soft" if soft else "hard", f"{beta}", f"{rate:.1%}", f"{stock / n:.2f}",
                f"{total / n:.4f}", f"{spikes / n:.4f}", f"{(records - spikes) / n:.4f}",
                f"{objects / n:.4f}", f"{stock / total:.1f}x",
            )  # fmt: skip
            del out, lines
    console.print(table)


def step_time(console: Console, steps: int, batch: int, width: int, repeats: int) -> None:
    table = Table(title=f"Time of a training step (T={steps}, batch {batch}, width {width}), median")
    for heading in ("", "reset", "beta", "stock", "grid", "ratio"):
        table.add_column(heading, justify="right")
    for name, make in LOOPS.items():
        for soft, beta in ((True, 0.9), (False, 0.9)):
            torch.manual_seed(0)
            x_seq = torch.rand(steps, batch, width)
            net, _ = tuned(make(beta, soft, width), x_seq, 0.1)
            twin = srp.convert_to_reversible(copy.deepcopy(net))
            times: list[list[float]] = [[], []]
            for repeat in range(repeats + 1):
                for one, found in zip((net, twin), times, strict=True):
                    seconds = time_step(lambda one=one, x_seq=x_seq: one(x_seq).square().mean())
                    if repeat:
                        found.append(seconds)
            stock, grid = (statistics.median(found) for found in times)
            table.add_row(
                name, "soft" if soft else "hard", f"{beta}", f"{stock:.3f} s", f"{grid:.3f} s",
                f"{grid / stock:.2f}x",
            )  # fmt: skip
    console.print(table)


def main(
    only: Annotated[str | None, typer.Option(help="rebuilt, bytes or time; all by default")] = None,
    steps: Annotated[int, typer.Option(help="time steps of the loop whose bytes are counted")] = 1000,
    batch: int = 128,
    width: int = 512,
    timed_steps: int = 50,
    repeats: int = 5,
) -> None:
    """Print the tables."""
    console = Console(width=120)
    if only in (None, "rebuilt"):
        rebuilt(console, [1000, 5000])
    if only in (None, "bytes"):
        bytes_held(console, steps, batch, width)
    if only in (None, "time"):
        step_time(console, timed_steps, batch, width, repeats)


if __name__ == "__main__":
    typer.run(main)
