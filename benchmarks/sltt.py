"""``python -m benchmarks.sltt``: SLTT beside back-propagation through time, from T = 10 to T = 1,000.

Peak memory of a training step beyond parameters and inputs, its time, and the cosine between its gradient
and that of back-propagation through time. The peer is SpikingJelly's ``SLTTLIFNode``, which detaches
itself, in the loop that its users write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import AllocationCounter, time_step
from snn_reversible_plugin.training import sltt_backward

from . import store, time_tables

BATCH, LABEL = 16, torch.arange(16) % 10


def network(of: type[nn.Module]) -> nn.Sequential:
    """Two convolutional layers and a hidden one, for a frame [N, 2, 16, 16]."""

    def lif() -> nn.Module:
        return of(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())

    return nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1, bias=False),
        layer.BatchNorm2d(16),
        lif(),
        layer.MaxPool2d(2),
        layer.Conv2d(16, 16, 3, padding=1, bias=False),
        layer.BatchNorm2d(16),
        lif(),
        layer.Flatten(),
        layer.Linear(16 * 64, 64),
        lif(),
        layer.Linear(64, 10),
    )


def loss_fn(output: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, LABEL)


def through_time(model: nn.Module, x_seq: torch.Tensor) -> None:
    torch.stack([loss_fn(model(x)) for x in x_seq]).mean().backward()


def by_hand(model: nn.Module, x_seq: torch.Tensor) -> None:
    for x in x_seq:
        (loss_fn(model(x)) / len(x_seq)).backward()


def sltt(model: nn.Module, x_seq: torch.Tensor) -> None:
    sltt_backward(model, x_seq, loss_fn)


def sltt_k(model: nn.Module, x_seq: torch.Tensor) -> None:
    sltt_backward(model, x_seq, loss_fn, 5, generator=torch.Generator().manual_seed(0))


Prepare = Callable[[], nn.Module]
METHODS: dict[str, tuple[Prepare, Callable[[nn.Module, torch.Tensor], None]]] = {
    "through time, stock": (lambda: network(neuron.LIFNode), through_time),
    "through time, converted": (
        lambda: srp.convert_to_reversible(network(neuron.LIFNode)),
        through_time,
    ),
    "SLTTLIFNode by hand": (lambda: network(neuron.SLTTLIFNode), by_hand),
    "SLTT, stock": (lambda: network(neuron.LIFNode), sltt),
    "SLTT, converted": (lambda: srp.convert_to_reversible(network(neuron.LIFNode)), sltt),
    "SLTT-5, converted": (lambda: srp.convert_to_reversible(network(neuron.LIFNode)), sltt_k),
}


def main(
    steps: Annotated[list[int] | None, typer.Option(help="10, 100 and 1,000 by default")] = None,
    repeats: Annotated[int, typer.Option(help="timed steps, after one to warm up; the fastest counts")] = 2,
) -> None:
    """Measure memory, time and gradient of a training step by every method."""
    found: dict[str, Any] = {}
    console = Console()
    for length in steps or [10, 100, 1000]:
        reference: torch.Tensor | None = None
        for name in METHODS:
            with console.status(f"T = {length}, {name}"):
                run, gradient = _measure(name, length, repeats)
            reference = gradient if reference is None else reference
            cosine = nn.functional.cosine_similarity(reference, gradient, dim=0).item()
            found[f"{name} | {length}"] = run | {"cosine": cosine}
    store.write("sltt", found, **store.machine("cpu"))
    console.print(time_tables.sltt(found).rich(f"A training step, {BATCH} x 2 x 16 x 16 a time step"))


def _measure(name: str, length: int, repeats: int) -> tuple[dict[str, Any], torch.Tensor]:
    prepare, backward = METHODS[name]
    torch.manual_seed(0)
    model = prepare()
    x_seq = torch.rand(1, BATCH, 2, 16, 16).mul_(2).expand(length, -1, -1, -1, -1)

    def step() -> torch.Tensor:
        model.zero_grad()
        functional.reset_net(model)
        backward(model, x_seq)
        return torch.zeros((), requires_grad=True)

    seconds = [time_step(step) for _ in range(repeats + 1)][1:]
    with AllocationCounter() as counter:
        step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"peak": counter.peak, "seconds": min(seconds)}, gradient


if __name__ == "__main__":
    store.settle()
    typer.run(main)
