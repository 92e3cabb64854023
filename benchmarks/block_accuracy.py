"""``python -m benchmarks.block_accuracy``: what reversible blocks do to accuracy, over seeds and data sets.

Each run trains one network from one seed on one data set and stores its test accuracy, so that the whole
can be stopped and gone on with. Afterwards all that is stored is printed as a table and drawn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model.ms_resnet import MSResNet
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder, event_frames
from snn_reversible_plugin.models import rev_s_resnet24

from . import picture

RESULTS = Path(__file__).parent / "results" / "block-accuracy.json"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "block-accuracy.png"
STEPS, BATCH, UPDATES, FINE_TUNING, RATE = 4, 16, 300, 1, 5e-3
SENSOR = (34, 34, 2)
DATA = {"events": "embedded events", "nmnist": "N-MNIST"}


class HalfSize(nn.Module):
    """Sums events over 2 x 2 pixels, so that a run takes minutes on one core; then the network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        functional.reset_net(self.network)
        small = nn.functional.avg_pool2d(x_seq.flatten(0, 1), 2, divisor_override=1)
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


def parts(data: str, folder: Path) -> tuple[Any, Any]:
    """Recordings to train on and to test on: every fifth of N-MNIST's first joins its few second ones."""
    if data == "events":
        return DigitSaccades(train=True), DigitSaccades(train=False)
    recordings, rest = (NMNISTFolder(folder, train=train) for train in (True, False))
    fifth = range(0, len(recordings), 5)
    others = [index for index in range(len(recordings)) if index % 5]
    return Subset(recordings, others), ConcatDataset([Subset(recordings, fifth), rest])


@cache
def batches(data: str, train: bool, folder: Path, limit: int | None) -> DataLoader[Any]:
    """Frames of a part, made once."""
    recordings = parts(data, folder)[not train]
    if limit is not None:
        recordings = Subset(recordings, range(limit))
    recordings.sensor_size = SENSOR
    return event_frames(recordings, steps=STEPS, batch_size=BATCH, shuffle=train)


def train(model: nn.Module, loader: DataLoader[Any], epochs: int, what: str) -> list[float]:
    """The loss of each batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * len(loader))
    losses = []
    with tqdm(desc=what, total=epochs * len(loader)) as bar:
        for _ in range(epochs):
            for x_seq, target in loader:
                loss = nn.functional.cross_entropy(model(x_seq), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """The part of the recordings whose digit the model tells."""
    model.eval()
    right = sum(int((model(x_seq).argmax(1) == target).sum()) for x_seq, target in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]


def run(
    arm: str, data: str, seed: int, folder: Path, epochs: int | None, limit: int | None
) -> dict[str, Any]:
    """Train one network."""
    make, before_fine_tuning = ARMS[arm]
    torch.manual_seed(seed)
    model = HalfSize(make())
    loader, test = (batches(data, train, folder, limit) for train in (True, False))
    epochs = epochs or round(UPDATES / len(loader))
    loader.generator.manual_seed(seed)
    start, what = time.perf_counter(), f"{DATA[data]}, {arm}, seed {seed}"
    losses = train(model, loader, epochs, what)
    if before_fine_tuning is not None:
        model.network = before_fine_tuning(model.network)
        losses += train(model, loader, FINE_TUNING, f"{what}, fine-tuning")
    return {
        "accuracy": accuracy(model, test),
        "losses": losses,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "settings": {
            "epochs": epochs, "steps": STEPS, "batch": BATCH, "lr": RATE,
            "train": len(loader.dataset), "test": len(test.dataset),  # type: ignore[arg-type]
        },
    }  # fmt: skip


def table(stored: dict[str, dict[str, Any]]) -> str:
    """Markdown: test accuracy, mean and standard deviation over the seeds, a row a network."""
    lines = [f"| network | parameters | {' | '.join(DATA.values())} |", "|---|---:|" + "---:|" * len(DATA)]
    for arm in ARMS:
        cells = []
        for data in DATA:
            found = [100 * entry["accuracy"] for entry in _of(stored, data, arm)]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread} % ({len(found)})" if found else "")
        entries = [entry for data in DATA for entry in _of(stored, data, arm)]
        if entries:
            lines.append(f"| {arm} | {entries[0]['parameters']:,} | {' | '.join(cells)} |")
    for arm, plain in EQUALS.items():
        pairs = [
            (entry["losses"], stored[other]["losses"])
            for key, entry in stored.items()
            if f" | {arm} | " in key and (other := key.replace(f"| {arm} |", f"| {plain} |")) in stored
        ]
        if pairs:
            equal = sum(ours == theirs for ours, theirs in pairs)
            runs = f"{equal} of {len(pairs)} runs"
            lines += ["", f"{arm}: losses equal to those of {plain}, bit for bit, in {runs}."]
    return "\n".join(lines)


def draw(stored: dict[str, dict[str, Any]]) -> Path:
    """One point a run."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for index, (data, title) in enumerate(DATA.items()):
        axes = figure.add_subplot(1, len(DATA), index + 1)
        for place, arm in enumerate(reversed(ARMS)):
            found = [100 * entry["accuracy"] for entry in _of(stored, data, arm)]
            axes.plot(found, [place] * len(found), "o", alpha=0.6, color=f"C{place}")
        axes.set_yticks(range(len(ARMS)), reversed(ARMS) if index == 0 else [""] * len(ARMS), fontsize=8)
        axes.set_xlabel("test accuracy, %", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(0.15)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    return PICTURE


def draw_losses(stored: dict[str, dict[str, Any]]) -> Path:
    """The losses of runs from the start."""
    panels = {
        title: {
            arm: [entry["losses"] for entry in _of(stored, data, arm)]
            for arm, (_, before_fine_tuning) in ARMS.items()
            if before_fine_tuning is None
        }
        for data, title in DATA.items()
    }
    return picture.draw_losses(panels, PICTURE.with_name("block-losses.png"), dashed=EQUALS)


def _of(stored: dict[str, dict[str, Any]], data: str, arm: str) -> list[dict[str, Any]]:
    return [entry for key, entry in stored.items() if key.startswith(f"{data} | {arm} | ")]


def _load() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # type: ignore[no-any-return]


def main(
    folder: Annotated[Path, typer.Option(help="of N-MNIST")] = Path("../shared/data/nmnist"),
    seeds: Annotated[int, typer.Option(help="how many")] = 3,
    only: Annotated[list[str] | None, typer.Option(help="networks, by their names in the table")] = None,
    data: Annotated[list[str] | None, typer.Option(help="events, nmnist; both by default")] = None,
    epochs: Annotated[int | None, typer.Option(help="by default as many as 300 updates take")] = None,
    limit: Annotated[int | None, typer.Option(help="recordings of a part; for a quick look")] = None,
    save: Annotated[bool, typer.Option(help="store the results and draw the picture")] = True,
) -> None:
    """Train what is not stored yet, and print the table."""
    torch.set_num_threads(1)
    unknown = (set(only or ()) - set(ARMS)) | (set(data or ()) - set(DATA))
    if unknown:
        raise typer.BadParameter(f"unknown: {sorted(unknown)}; there are {list(ARMS)} and {list(DATA)}")
    stored = _load() if save else {}
    for seed in range(seeds):
        for name in data or DATA:
            for arm in only or ARMS:
                key = f"{name} | {arm} | {seed}"
                if key in stored:
                    continue
                result = run(arm, name, seed, folder, epochs, limit)
                stored = {**(_load() if save else stored), key: result}  # another process may run too
                if save:
                    RESULTS.parent.mkdir(exist_ok=True)
                    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    Console(width=120).print(table(stored), markup=False, highlight=False)
    if save:
        typer.echo(f"written: {RESULTS} {draw(stored)} {draw_losses(stored)}", err=True)


if __name__ == "__main__":
    typer.run(main)
