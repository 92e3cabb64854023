"""Training networks that are built to be reversible, so that a run can be stopped and gone on with.

    python examples/reversible_networks.py --network former --epochs 5
    python examples/reversible_networks.py --network coupled
    python examples/reversible_networks.py --folder ../shared/data/nmnist     # the files of N-MNIST

Run it again with the same settings after it was stopped, and it goes on from its checkpoint, with the
very numbers that it would have had otherwise: parameters, running statistics, the optimizer's and the
schedule's state, random numbers, and the order of the recordings are all in it.
"""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from matplotlib.figure import Figure
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder, event_frames
from snn_reversible_plugin.models import rev_s_former, rev_s_resnet24
from snn_reversible_plugin.spikingjelly import CoupledLIF


class Coupled(nn.Sequential):
    """Reversible nodes (Lei et al., 2023) where a LIFNode would stand.

    Their states are rebuilt in the backward, bit for bit. What a node says to the next layer is not binary,
    so nothing that needs spikes of 0 and 1 should follow it.
    """

    def __init__(self, channels: int = 16) -> None:
        layers: list[nn.Module] = []
        for before in (2, channels):
            conv = layer.Conv2d(before, channels, 3, padding=1, bias=False)
            layers += [conv, layer.BatchNorm2d(channels), CoupledLIF(), layer.AvgPool2d(2)]  # 17, then 8
        hidden = layer.Linear(channels * 8 * 8, 64, bias=False)
        super().__init__(*layers, layer.Flatten(), hidden, CoupledLIF(learn_tau=True), layer.Linear(64, 10))
        functional.set_step_mode(self, "m")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        functional.reset_net(self)
        return super().forward(x_seq).mean(0)


# For event frames [T, N, 2, 34, 34]: scores [N, 10].
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet24": rev_s_resnet24,
    "resnet24-leaky": lambda: rev_s_resnet24(neuron="leaky"),
    "former": lambda: rev_s_former(1, 48, T=None, in_channels=2, patch=8),
    "coupled": Coupled,
}


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
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return parts | {
            "progress": (self.epoch, self.position, self.losses, self.accuracies),
            "order": self.order,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.position, self.losses, self.accuracies = state["progress"]
        self.order = state["order"]
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def rest_of_the_epoch(self, device: str, after_step: Callable[[], None]) -> None:
        """From the next batch to the last one."""
        self.model.train()
        self.batches.generator.set_state(self.order)
        batches = islice(self.batches, self.position, None)
        for x_seq, digit in tqdm(
            batches, f"epoch {self.epoch + 1}", len(self.batches), initial=self.position
        ):
            loss = nn.functional.cross_entropy(self.model(x_seq.to(device)), digit.to(device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
            self.position += 1
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
    axes = figure.subplots()
    axes.plot(range(1, len(training.losses) + 1), training.losses, linewidth=0.8, label="loss")
    ends = [(i + 1) * len(training.batches) for i in range(len(training.accuracies))]
    axes.plot(ends, training.accuracies, "o-", label="test accuracy")
    axes.set_xlabel("training step")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(
    network: str = "resnet24",
    folder: Path | None = None,
    epochs: int = 5,
    steps: int = 5,
    batch: int = 16,
    lr: float = 5e-3,
    limit: int | None = None,
    checkpoint: Path = Path("reversible_network.pt"),
    save_every: int = 50,
    curve: Path = Path("learning_curve.png"),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
    stop_after: int | None = None,
) -> Training:
    """Train, or go on training; --stop-after ends the run after so many steps, as a power cut would."""
    if network not in NETWORKS:
        raise typer.BadParameter(f"{network!r} is none of {', '.join(NETWORKS)}")
    torch.manual_seed(seed)
    settings = {
        "network": network, "folder": str(folder), "epochs": epochs, "steps": steps, "batch": batch,
        "lr": lr, "limit": limit, "seed": seed,
    }  # fmt: skip

    def frames(train: bool) -> "DataLoader[Any]":
        if folder is None:
            recordings: Any = DigitSaccades(train=train, limit=limit)
        else:
            recordings = NMNISTFolder(folder, train=train, limit=limit)
        return event_frames(recordings, steps=steps, batch_size=batch, shuffle=train, seed=seed)

    test = frames(train=False)
    model = srp.convert_to_reversible(NETWORKS[network]().to(device))  # for what stands around the blocks
    training = Training(model, frames(train=True), epochs, lr)
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
        print(f"loss {training.losses[-1]:.4f}, test accuracy {training.accuracies[-1]:.1%}")
        save()
        draw(training, curve)
    return training


if __name__ == "__main__":
    typer.run(main)
