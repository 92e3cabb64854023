"""``python -m benchmarks.time_accuracy``: accuracy on the N-MNIST subset, by way of training.

One SpikingJelly network, stepped by a loop, trained from the same seeds: stock, in grid arithmetic, with
coupled neurons, by SLTT and by SLTT-K. Every fifth recording of the training part is kept for the test,
beside the test part. Results are stored after each run, and runs that are stored are not run again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import NMNISTFolder, event_frames
from snn_reversible_plugin.spikingjelly import CoupledLIF
from snn_reversible_plugin.training import sltt_backward

from . import picture, store

RESULTS = Path(__file__).parent / "results" / "time-accuracy.json"
PICTURE = picture.IMAGES / "time-losses.png"
STEPS, BATCH, EPOCHS, RATE = 20, 20, 10, 3e-3
K = 5

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Neuron = Callable[[int], nn.Module]


def lif(_channels: int) -> nn.Module:
    return neuron.LIFNode(v_reset=None, detach_reset=True, surrogate_function=surrogate.ATan())


def coupled(_channels: int) -> nn.Module:
    return CoupledLIF()


def network(make: Neuron) -> nn.Sequential:
    """For one frame [N, 2, 34, 34]: scores [N, 10]."""
    return nn.Sequential(
        layer.Conv2d(2, 12, 5, stride=2, padding=2, bias=False),  # 17
        layer.BatchNorm2d(12),
        make(12),
        layer.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),  # 9
        layer.BatchNorm2d(24),
        make(24),
        layer.Flatten(),
        layer.Linear(24 * 9 * 9, 64),
        make(64),
        layer.Linear(64, 10),
    )


def _grid(model: nn.Module) -> nn.Module:
    return srp.convert_to_reversible(model, arithmetic="grid")


def scores_of(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    functional.reset_net(model)
    total: torch.Tensor | float = 0.0
    for x in x_seq:
        total = total + model(x)
    return total / len(x_seq)


def through_time(model: nn.Module, x_seq: torch.Tensor, label: torch.Tensor, _drawn: Any) -> float:
    loss = nn.functional.cross_entropy(scores_of(model, x_seq), label)
    loss.backward()
    return loss.item()


def sltt(k: int | None) -> Callable[..., float]:
    def backward(model: nn.Module, x_seq: torch.Tensor, label: torch.Tensor, drawn: Any) -> float:
        functional.reset_net(model)
        loss_fn = lambda scores: nn.functional.cross_entropy(scores, label)  # noqa: E731
        output = sltt_backward(model, x_seq, loss_fn, k, generator=drawn).output
        return loss_fn(output).item()  # of the mean output, as it is for the others

    return backward


# Of each method: its neurons, what becomes of the model, and the backward.
METHODS: dict[str, tuple[Neuron, Callable[[nn.Module], nn.Module], Callable[..., float]]] = {
    "stock": (lif, lambda model: model, through_time),
    "grid": (lif, _grid, through_time),
    "coupled": (coupled, srp.convert_to_reversible, through_time),
    "SLTT": (lif, srp.convert_to_reversible, sltt(None)),
    f"SLTT-{K}": (lif, srp.convert_to_reversible, sltt(K)),
}


def main(
    method: Annotated[list[str] | None, typer.Option(help="methods to run; all by default")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each method")] = 3,
    epochs: int = EPOCHS,
    folder: Annotated[Path, typer.Option(help="N-MNIST's")] = Path("../shared/data/nmnist"),
    again: Annotated[bool, typer.Option(help="run what is stored already too")] = False,
) -> None:
    """Train by every method from every seed, and print the accuracies as a markdown table."""
    torch.set_num_threads(1)
    if unknown := set(method or ()) - set(METHODS):
        raise typer.BadParameter(f"unknown: {sorted(unknown)}; there are {[*METHODS]}")
    console = Console(stderr=True)
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    training, test = _data(folder)
    for seed in range(seeds):
        for name in method or METHODS:
            key = f"{name} | seed {seed} | {epochs} epochs"
            if key in stored and not again:
                continue
            with console.status(key):
                stored[key] = _run(name, seed, epochs, training, test)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored, epochs))
    console.print(f"written: {RESULTS} {draw(stored, epochs)}")


def _data(folder: Path) -> tuple[Batches, Batches]:
    def frames(train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        loaded = list(event_frames(NMNISTFolder(folder, train=train), steps=STEPS, batch_size=100))
        return torch.cat([x for x, _ in loaded], dim=1), torch.cat([y for _, y in loaded])

    (x, y), (x_test, y_test) = frames(True), frames(False)
    fifth = torch.arange(len(y)) % 5 == 0
    test = (torch.cat([x[:, fifth], x_test], dim=1), torch.cat([y[fifth], y_test]))
    return [(x[:, ~fifth], y[~fifth])], list(
        zip(test[0].split(BATCH, 1), test[1].split(BATCH), strict=True)
    )


def _run(name: str, seed: int, epochs: int, training: Batches, test: Batches) -> dict[str, Any]:
    make, prepare, backward = METHODS[name]
    torch.manual_seed(seed)
    model = prepare(network(make))
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    ((x, y),) = training
    updates = epochs * (len(y) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    losses = []
    for _ in range(epochs):
        for chosen in torch.randperm(len(y), generator=drawn)[: len(y) // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            losses.append(backward(model, x[:, chosen], y[chosen], drawn))
            optimizer.step()
            schedule.step()
    model.eval()
    seen = list(zip(x.split(BATCH, 1), y.split(BATCH), strict=True))
    return {
        "training_accuracy": _accuracy(model, seen),
        "test_accuracy": _accuracy(model, test),
        "updates": updates,
        "losses": losses,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("torch", "spikingjelly")},
    }


def _accuracy(model: nn.Module, batches: Batches) -> float:
    with torch.no_grad():
        right = sum((scores_of(model, x).argmax(1) == y).sum().item() for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def table(stored: dict[str, Any], epochs: int = EPOCHS) -> str:
    lines = [
        "| trained by | seeds | training accuracy | test accuracy |",
        "|---|---:|---:|---:|",
    ]
    for name in METHODS:
        runs = _of(stored, name, epochs)
        if not runs:
            lines.append(f"| {name} | 0 | | |")
            continue
        lines.append(
            f"| {name} | {len(runs)} | {_spread(runs, 'training_accuracy')} | "
            f"{_spread(runs, 'test_accuracy')} |"
        )
    return "\n".join(lines)


def draw(stored: dict[str, Any], epochs: int) -> Path:
    """The losses of the runs that stored them."""
    losses = {
        name: [run["losses"] for run in _of(stored, name, epochs) if "losses" in run] for name in METHODS
    }
    return picture.draw_losses({"N-MNIST": losses}, PICTURE, dashed=["grid"])


def _of(stored: dict[str, Any], name: str, epochs: int) -> list[dict[str, Any]]:
    return [
        run
        for key, run in stored.items()
        if key.startswith(f"{name} |") and key.endswith(f"| {epochs} epochs")
    ]


def _spread(runs: list[dict[str, Any]], of: str) -> str:
    values = [100 * run[of] for run in runs]
    mean = f"{statistics.mean(values):.1f} %"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    store.settle()
    typer.run(main)
