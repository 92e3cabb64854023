"""What reversible blocks do to accuracy, over seeds and data sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model.ms_resnet import MSResNet
from torch import nn
from torch.utils.data import DataLoader

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import event_frames
from snn_reversible_plugin.models import rev_s_resnet24

from .. import pictures, recordings
from ..experiment import Entries, Entry, Options, Tick, Work
from ..recordings import DATA
from ..tables import learning
from ..training import accuracy, through_time, train

STEPS, BATCH, UPDATES, FINE_TUNING, RATE = 4, 16, 300, 1, 5e-3


class Shrunk(nn.Module):
    """Sums events over by x by pixels, so that a run takes minutes on one core; then the network."""

    def __init__(self, network: nn.Module, by: int = 2) -> None:
        super().__init__()
        self.network, self.by = network, by

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        functional.reset_net(self.network)
        small = nn.functional.avg_pool2d(x_seq.flatten(0, 1), self.by, divisor_override=1)
        return self.network(small.unflatten(0, x_seq.shape[:2]))  # type: ignore[no-any-return]


def reversible() -> nn.Module:
    """RevSResNet24 on the grid, rebuilt in the backward."""
    return srp.convert_to_reversible(rev_s_resnet24())


def run_plainly() -> nn.Module:
    """The same blocks, unreversed: must learn the same to the bit."""
    return _unreversed(rev_s_resnet24())


def in_floats() -> nn.Module:
    """The same blocks, unreversed, streams in ordinary floating point: what the grid costs."""
    return _unreversed(rev_s_resnet24(bits=None))


def ms_resnet20() -> nn.Module:
    """The paper's counterpart: MS-ResNet20, 3 x 3 ordinary residual blocks, about as many parameters."""
    return MSResNet(
        T=STEPS, in_channels=2, num_classes=10, layers=(3, 3, 3), base_channels=16, stem_kernel_size=3,
        stem_stride=1, spiking_neuron=neuron.IFNode, detach_reset=True,
        surrogate_function=surrogate.ATan(),
    )  # fmt: skip


def wrapped(model: nn.Module) -> nn.Module:
    """A trained stock network whose residual blocks became reversible ones."""
    srp.wrap_residual_blocks(model)
    return model


def _unreversed(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, srp.RevSSequence):
            module.reversible = False
    return model


# How each network is made, and what is done to it before it is fine-tuned.
ARMS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module] | None]] = {
    "RevSResNet24": (reversible, None),
    "RevSResNet24, run plainly": (run_plainly, None),
    "RevSResNet24, plainly in floats": (in_floats, None),
    "MS-ResNet20": (ms_resnet20, None),
    "MS-ResNet20, converted": (lambda: srp.convert_to_reversible(ms_resnet20()), None),
    "MS-ResNet20, converted to the grid": (
        lambda: srp.convert_to_reversible(ms_resnet20(), arithmetic="grid"),
        None,
    ),
    "MS-ResNet20, trained on": (ms_resnet20, lambda model: model),
    "MS-ResNet20, wrapped and trained on": (ms_resnet20, wrapped),
}
# Runs whose losses have to be equal.
EQUALS = {"RevSResNet24": "RevSResNet24, run plainly", "MS-ResNet20, converted": "MS-ResNet20"}


@cache
def batches(data: str, folder: Path, limit: int | None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Frames to train on and to test on, made once."""
    first, second = (
        event_frames(part, steps=STEPS, batch_size=BATCH, shuffle=training)
        for part, training in zip(recordings.parts(data, folder, limit), (True, False), strict=True)
    )
    return first, second


def scores_of(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    return model(x_seq)  # type: ignore[no-any-return]


def learn(model: nn.Module, loader: DataLoader[Any], epochs: int, tick: Tick) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * len(loader))
    return train(model, [loader] * epochs, through_time(scores_of), optimizer, schedule, tick)


def works(options: Options) -> Iterator[Work]:
    for seed in range(1 if options.quick else options.seeds):
        for data in DATA:
            if data == "events" or options.folder.is_dir():
                yield Work(f"{data}, seed {seed}", tuple(ARMS), {"data": data, "seed": seed})


def measure(arm: str, options: Options, tick: Tick, data: str, seed: int) -> Entry:
    """Train one network."""
    make, before_fine_tuning = ARMS[arm]
    torch.manual_seed(seed)
    model = Shrunk(make()).to(options.device)
    loader, test = batches(data, options.folder, 16 if options.quick else None)
    epochs = 1 if options.quick else round(UPDATES / len(loader))
    loader.generator.manual_seed(seed)
    start = time.perf_counter()
    losses = learn(model, loader, epochs, tick)
    if before_fine_tuning is not None:
        model.network = before_fine_tuning(model.network)
        losses += learn(model, loader, FINE_TUNING, tick)
    return {
        "accuracy": accuracy(model, test, scores_of),
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "settings": {
            "epochs": epochs, "steps": STEPS, "batch": BATCH, "lr": RATE,
            "train": len(loader.dataset), "test": len(test.dataset),  # type: ignore[arg-type]
        },
    }  # fmt: skip


def draw(entries: Entries, folder: Path, device: str) -> list[Path]:
    """One point a run, and the losses of runs from the start."""
    runs = {
        title: {arm: learning.runs_of(entries, arm, data) for arm in ARMS} for data, title in DATA.items()
    }
    accuracies = {
        title: {arm: [100 * one["accuracy"] for one in found] for arm, found in arms.items()}
        for title, arms in runs.items()
    }
    losses = {
        title: {
            arm: [one["losses"] for one in arms[arm]] for arm, (_, tuned) in ARMS.items() if tuned is None
        }
        for title, arms in runs.items()
    }
    return [
        pictures.draw_spread(
            accuracies, "test accuracy, %", pictures.path_of(folder, "block-accuracy", device)
        ),
        pictures.draw_losses(losses, pictures.path_of(folder, "block-losses", device), dashed=EQUALS),
    ]
