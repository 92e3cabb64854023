"""Training a reversible network on event recordings, so that it can be stopped and gone on with.

    python examples/reversible_networks.py --network former --epochs 5
    python examples/reversible_networks.py --data nmnist --folder ../shared/data/nmnist

Run it again with the same settings after it was stopped, and it goes on from its checkpoint, with the
very numbers that it would have had otherwise: parameters, running statistics, the optimizer's and the
schedule's state, random numbers, and the order of the recordings are all in it.
"""

import os
from collections.abc import Callable
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder, event_frames
from snn_reversible_plugin.models import rev_s_former, rev_s_resnet24


class Network(StrEnum):
    """RevSResNet24 with 260,362 parameters, or a RevSFormer-1-48."""

    resnet24 = "resnet24"
    former = "former"


class Data(StrEnum):
    """Simulated recordings that come with the package, or a folder of N-MNIST."""

    digits = "digits"
    nmnist = "nmnist"


def make_model(network: Network, neuron: str | None) -> nn.Module:
    """A network for ``[T, N, 2, 34, 34]``; everything around its reversible chains is converted."""
    if network is Network.resnet24:
        model: nn.Module = rev_s_resnet24(neuron=neuron or "if")
    else:
        model = rev_s_former(1, 48, T=None, in_channels=2, patch=8, neuron=neuron or "lif")
    return srp.convert_to_reversible(model)


class Training:
    """All that a run goes on from: ``state_dict`` and ``load_state_dict`` are a checkpoint of it."""

    def __init__(self, model: nn.Module, batches: "DataLoader[Any]", epochs: int, lr: float) -> None:
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * len(batches))
        self.epoch, self.position = 0, 0  # the next batch
        self.order = batches.generator.get_state()  # of the random numbers, when the epoch began
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": (self.epoch, self.position, self.losses, self.accuracies),
            "order": self.order,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.position, self.losses, self.accuracies = state["progress"]
        self.order = state["order"]
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def step(self, x_seq: torch.Tensor, target: torch.Tensor) -> None:
        """One batch."""
        loss = nn.functional.cross_entropy(self.model(x_seq), target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.position += 1

    def rest_of_the_epoch(self, device: str, after_step: Callable[[], None]) -> None:
        """From the next batch to the last one."""
        self.model.train()
        self.batches.generator.set_state(self.order)
        batches = islice(self.batches, self.position, None)
        total = len(self.batches)
        bar = tqdm(batches, f"epoch {self.epoch + 1}", total, initial=self.position)
        for x_seq, target in bar:
            self.step(x_seq.to(device), target.to(device))
            bar.set_postfix(loss=f"{self.losses[-1]:.4f}")
            after_step()
        self.epoch, self.position = self.epoch + 1, 0
        self.order = self.batches.generator.get_state()


@torch.no_grad()
def accuracy(model: nn.Module, batches: "DataLoader[Any]", device: str) -> float:
    """The part of the recordings whose digit the model tells."""
    model.eval()
    right = sum(int((model(x_seq.to(device)).argmax(1).cpu() == t).sum()) for x_seq, t in batches)
    return right / len(batches.dataset)  # type: ignore[arg-type]


def draw(training: Training, path: Path) -> None:
    """The learning curve: the loss of every batch, the test accuracy after every epoch."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    loss = figure.subplots()
    loss.plot(range(1, len(training.losses) + 1), training.losses, color="tab:blue", linewidth=0.8)
    loss.set_xlabel("training step")
    loss.set_ylabel("loss", color="tab:blue")
    test = loss.twinx()
    ends = [(i + 1) * len(training.batches) for i in range(len(training.accuracies))]
    test.plot(ends, training.accuracies, "o-", color="tab:orange")
    test.set_ylim(0, 1)
    test.set_ylabel("test accuracy", color="tab:orange")
    figure.savefig(path, dpi=120)


def main(
    network: Network = Network.resnet24,
    data: Data = Data.digits,
    folder: Path = Path("../shared/data/nmnist"),
    epochs: int = 5,
    steps: int = 5,
    batch: int = 16,
    lr: float = 5e-3,
    neuron: str | None = None,
    limit: int | None = None,
    checkpoint: Path = Path("reversible_network.pt"),
    save_every: int = 50,
    curve: Path = Path("learning_curve.png"),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
    stop_after: int | None = None,
) -> Training:
    """Train, or go on training; --stop-after ends the run after so many steps, as a power cut would."""
    torch.manual_seed(seed)
    settings = {
        "network": str(network), "data": str(data), "epochs": epochs, "steps": steps, "batch": batch,
        "lr": lr, "neuron": neuron, "limit": limit, "seed": seed,
    }  # fmt: skip

    def recordings(train: bool) -> "DataLoader[Any]":
        if data is Data.digits:
            dataset: Any = DigitSaccades(train=train, limit=limit)
        else:
            dataset = NMNISTFolder(folder, train=train, limit=limit)
        return event_frames(dataset, steps=steps, batch_size=batch, shuffle=train, seed=seed)

    test = recordings(train=False)
    training = Training(make_model(network, neuron).to(device), recordings(train=True), epochs, lr)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu")
        if saved["settings"] != settings:
            raise typer.BadParameter(
                f"{checkpoint} is of a run with other settings, {saved['settings']}: "
                "give those, or another --checkpoint"
            )
        training.load_state_dict(saved["training"])
        print(f"going on from epoch {training.epoch + 1}, batch {training.position + 1}")

    def save() -> None:  # whole or not at all
        part = checkpoint.with_suffix(".part")
        torch.save({"settings": settings, "training": training.state_dict()}, part)
        os.replace(part, checkpoint)

    def after_step() -> None:
        if len(training.losses) % save_every == 0:
            save()
        if stop_after is not None and len(training.losses) >= stop_after:
            raise typer.Exit

    while training.epoch < epochs:
        training.rest_of_the_epoch(device, after_step)
        training.accuracies.append(accuracy(training.model, test, device))
        print(f"test accuracy {training.accuracies[-1]:.1%}")
        save()
        draw(training, curve)
    return training


if __name__ == "__main__":
    typer.run(main)
