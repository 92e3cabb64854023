"""Accuracy on the N-MNIST subset, by way of training.

One SpikingJelly network, stepped by a loop, trained from the same seeds: stock, in grid arithmetic, with
coupled neurons, by SLTT and by SLTT-K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import event_frames
from snn_reversible_plugin.spikingjelly import CoupledLIF
from snn_reversible_plugin.training import sltt_backward

from .. import pictures, recordings
from ..experiment import Entries, Entry, Options, Tick, Work
from ..tables import learning
from ..training import Backward, Scores, accuracy, through_time, train

STEPS, BATCH, EPOCHS, RATE = 20, 20, 10, 3e-3
K = 5


def lif() -> nn.Module:
    return neuron.LIFNode(v_reset=None, detach_reset=True, surrogate_function=surrogate.ATan())


def network(make: Callable[[], nn.Module]) -> nn.Sequential:
    """For one frame [N, 2, 34, 34]: scores [N, 10]."""
    return nn.Sequential(
        layer.Conv2d(2, 12, 5, stride=2, padding=2, bias=False), layer.BatchNorm2d(12), make(),  # 17
        layer.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), layer.BatchNorm2d(24), make(),  # 9
        layer.Flatten(), layer.Linear(24 * 9 * 9, 64), make(), layer.Linear(64, 10),
    )  # fmt: skip


def scores_of(model: nn.Module, x_seq: Tensor) -> Tensor:
    functional.reset_net(model)
    total: Tensor | float = 0.0
    for x in x_seq:
        total = total + model(x)
    return total / len(x_seq)


def sltt(k: int | None, drawn: torch.Generator) -> Backward:
    def backward(model: nn.Module, x_seq: Tensor, digit: Tensor) -> float:
        functional.reset_net(model)
        loss_fn = lambda scores: nn.functional.cross_entropy(scores, digit)  # noqa: E731
        output = sltt_backward(model, x_seq, loss_fn, k, generator=drawn).output
        return loss_fn(output).item()  # of the mean output, as it is for the others

    return backward


# Of each method: its neurons, what becomes of the model, and the backward, given random numbers.
METHODS: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module], Callable[..., Backward]]] = {
    "stock": (lif, lambda model: model, lambda _: through_time(scores_of)),
    "grid": (
        lif, partial(srp.convert_to_reversible, arithmetic="grid"), lambda _: through_time(scores_of)
    ),
    "coupled": (CoupledLIF, srp.convert_to_reversible, lambda _: through_time(scores_of)),
    "SLTT": (lif, srp.convert_to_reversible, partial(sltt, None)),
    f"SLTT-{K}": (lif, srp.convert_to_reversible, partial(sltt, K)),
}  # fmt: skip


@cache
def frames(folder: Path, limit: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All there are to train on with their digits, and all to test on."""
    found: list[Tensor] = []
    for part in recordings.parts("nmnist", folder, limit):
        loaded = list(event_frames(part, steps=STEPS, batch_size=100))
        found += [torch.cat([x for x, _ in loaded], dim=1), torch.cat([y for _, y in loaded])]
    return tuple(found)  # type: ignore[return-value]


def works(options: Options) -> Iterator[Work]:
    for seed in range(1 if options.quick else options.seeds):
        if options.folder.is_dir():
            epochs = 1 if options.quick else EPOCHS
            yield Work(f"nmnist, seed {seed}", tuple(METHODS), {"seed": seed, "epochs": epochs})


def measure(method: str, options: Options, tick: Tick, seed: int, epochs: int) -> Entry:
    """Train by one method from one seed."""
    neurons, prepare, backward = METHODS[method]
    torch.manual_seed(seed)
    model = prepare(network(neurons)).to(options.device)
    drawn = torch.Generator().manual_seed(seed)
    return trained(model, backward(drawn), scores_of, options, tick, (drawn, epochs))


def trained(
    model: nn.Module,
    backward: Backward,
    scores: Scores,
    options: Options,
    tick: Tick,
    order: tuple[torch.Generator, int],
) -> Entry:
    """Train on the recordings in an order that a generator draws, for so many epochs, and test."""
    drawn, epochs = order
    batch = 4 if options.quick else BATCH
    x, y, *test = frames(options.folder, 16 if options.quick else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    whole = len(y) // batch * batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (whole // batch))

    def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(y), generator=drawn)[:whole].view(-1, batch):
            yield x[:, chosen], y[chosen]

    losses = train(model, (shuffled() for _ in range(epochs)), backward, optimizer, schedule, tick)
    parts = {"training": (x, y), "test": test}
    right = {
        f"{name}_accuracy": accuracy(model, zip(a.split(BATCH, 1), b.split(BATCH), strict=True), scores)
        for name, (a, b) in parts.items()
    }
    return right | {"updates": len(losses), "losses": losses}


def draw(entries: Entries, folder: Path, device: str) -> list[Path]:
    losses = {name: [run["losses"] for run in learning.runs_of(entries, name)] for name in METHODS}
    return [
        pictures.draw_losses(
            {"N-MNIST": losses}, pictures.path_of(folder, "time-losses", device), dashed=["grid"]
        )
    ]
