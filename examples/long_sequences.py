"""Thousands of time steps under a limit on memory, where ordinary training fails.

    python examples/long_sequences.py --limit-mb 100                      # reversible
    python examples/long_sequences.py --limit-mb 100 --method stock       # runs out of memory
    python examples/long_sequences.py --limit-mb 100 --method sltt        # no gradient through time
    python examples/long_sequences.py --limit-mb 100 --method sltt --k 32
    python examples/long_sequences.py --task saccades --network feed-forward
    python examples/long_sequences.py --task nmnist --network feed-forward --folder ../shared/data/nmnist

``pixels`` shows the digits of scikit-learn one pixel after the other, each for T / 64 steps, on a wire for
its row and one for its column; ``saccades`` and ``nmnist`` show an event camera's recordings of about
300 ms, a frame a millisecond. The networks are snnTorch's; the limit is the process's own (Linux).
SLTT and SLTT-K (Meng et al., ICCV 2023) are approximations: all else here is the exact gradient.
"""

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import snntorch as snn
import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from snntorch import surrogate, utils
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder, event_frames
from snn_reversible_plugin.training import sltt_backward

STEPS = {"pixels": 1024, "saccades": 315, "nmnist": 300}
METHODS = ("stock", "reversible", "sltt")
# A narrow surrogate: over a thousand steps gradients explode easily.
SURROGATE = surrogate.fast_sigmoid(slope=100)


class Inputs(nn.Flatten):
    """Pixels, or counts of events that are stored as bytes, as the numbers that a linear layer takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


def linear(inputs: int, hidden: int, std: float) -> nn.Linear:
    """With weights so large that the neurons behind it fire from the start."""
    layer = nn.Linear(inputs, hidden, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


def leaks(hidden: int) -> torch.Tensor:
    """Decays of membranes that remember from 2 to 100 steps, in no order."""
    return 1 - torch.logspace(-0.3, -2, hidden)[torch.randperm(hidden)]


def recurrent(inputs: int, hidden: int) -> nn.Sequential:
    """For one step: a layer of neurons that are connected to each other, weakly at the start."""
    neurons = snn.RLeaky(beta=leaks(hidden), linear_features=hidden, spike_grad=SURROGATE, init_hidden=True)
    nn.init.normal_(neurons.recurrent.weight, std=0.02 / hidden**0.5)
    nn.init.zeros_(neurons.recurrent.bias)
    return nn.Sequential(Inputs(), linear(inputs, hidden, std=0.5), neurons, nn.Linear(hidden, 10))


def feed_forward(inputs: int, hidden: int) -> nn.Sequential:
    """For one step: two layers of neurons."""
    first, second = (
        snn.Leaky(beta=leaks(hidden), spike_grad=SURROGATE, init_hidden=True) for _ in range(2)
    )
    between = linear(hidden, hidden, std=hidden**-0.5)
    return nn.Sequential(
        Inputs(), linear(inputs, hidden, std=0.5), first, between, second, nn.Linear(hidden, 10)
    )


NETWORKS = {"recurrent": recurrent, "feed-forward": feed_forward}
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches(task: str, steps: int, batch: int, limit: int | None, folder: Path) -> tuple[Batches, Batches]:
    """Training and test batches: frames ``[T, N, ...]`` as they are stored, and digits ``[N]``."""
    if task == "pixels":
        images, digits = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().div(16)  # [1797, 64]
        y = torch.from_numpy(digits)
        parts = (slice(0, 1437), slice(1437, None))
        return tuple(
            list(zip(x[p][:limit].split(batch), y[p][:limit].split(batch), strict=True)) for p in parts
        )
    if task == "nmnist":
        parts = NMNISTFolder(folder, limit=limit), NMNISTFolder(folder, train=False, limit=limit)
    else:
        parts = DigitSaccades(size=16, limit=limit), DigitSaccades(train=False, size=16, limit=limit)
    # Half the sensor's resolution. Few events in a millisecond: a byte holds their number. Shuffled, for
    # N-MNIST's files lie in the order of their digits. Loaded by another process, or the memory that
    # loading frees would be there to use beyond the limit.
    return tuple(
        [
            (F.avg_pool3d(x, (1, 2, 2), divisor_override=1).to(torch.uint8), y)
            for x, y in event_frames(part, steps=steps, batch_size=batch, shuffle=True, num_workers=1)
        ]
        for part in parts
    )


def sequence(task: str, frames: torch.Tensor, steps: int) -> torch.Tensor:
    """Frames as the network sees them, ``[T, N, ...]``."""
    if task != "pixels":
        return frames
    pixel = torch.arange(steps) * 64 // steps
    wires = torch.cat([F.one_hot(pixel // 8, 8), F.one_hot(pixel % 8, 8)], dim=1)
    return frames.T[pixel].unsqueeze(2) * wires.unsqueeze(1)


def limit_memory(megabytes: int) -> None:
    """From here on the process may hold so many megabytes more than it does now."""
    status = Path("/proc/self/status").read_text()
    held = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + megabytes * 2**20,) * 2)


def scores_of(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    """The mean output ``[N, 10]`` of an ordinary loop over time."""
    utils.reset(model)
    total: torch.Tensor | float = 0.0
    for x in x_seq:
        total = total + model(x)
    return total / len(x_seq)


def loss_of(scores: torch.Tensor, digit: torch.Tensor) -> torch.Tensor:
    """Spikes are rare and their mean over time small: ten times that tells digits apart."""
    return F.cross_entropy(10 * scores, digit)


def train_step(
    model: nn.Module, x_seq: torch.Tensor, digit: torch.Tensor, method: str, k: int | None
) -> float:
    """Gradients of one batch, and its loss."""
    if method == "sltt":
        utils.reset(model)
        return sltt_backward(model, x_seq, lambda out: loss_of(out, digit), k, loss_on="mean").loss.item()
    loss = loss_of(scores_of(model, x_seq), digit)
    loss.backward()
    return loss.item()


def accuracy(model: nn.Module, seen: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The part of the sequences that the network tells right."""
    right = count = 0
    with torch.no_grad():
        for x_seq, digit in seen:
            right += (scores_of(model, x_seq).argmax(1) == digit).sum().item()
            count += len(digit)
    return right / count


def main(
    task: str = "pixels",
    network: str = "recurrent",
    method: str = "reversible",
    k: int | None = None,
    steps: int | None = None,
    limit_mb: int | None = None,
    epochs: int = 5,
    batch: int = 96,
    hidden: int = 128,
    lr: float = 2e-2,
    limit: int | None = None,
    folder: Path = Path("../shared/data/nmnist"),
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Train by METHOD (stock, reversible, sltt) under a limit on memory."""
    for given, known in ((task, STEPS), (network, NETWORKS), (method, METHODS)):
        if given not in known:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(known)}")
    torch.manual_seed(seed)
    steps = steps or STEPS[task]
    training, test = batches(task, steps, batch, limit, folder)
    inputs = sequence(task, training[0][0], steps)[0, 0].numel()
    model = NETWORKS[network](inputs, hidden).to(device)
    if method == "reversible":
        for module in model:
            module.grid_bits = 12  # slow membranes grow: exact up to 4,096, in steps of 1 / 4,096
        model = srp.convert_to_reversible(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(training))
    if limit_mb is not None:
        frames, digit = training[0]  # what is loaded or compiled at the first step counts as loaded
        train_step(model, sequence(task, frames, steps)[:2].to(device), digit.to(device), method, None)
        limit_memory(limit_mb)

    losses: list[float] = []
    started = time.perf_counter()
    for epoch in range(epochs):
        for frames, digit in tqdm(training, desc=f"epoch {epoch + 1} of {epochs}"):
            optimizer.zero_grad()
            x_seq = sequence(task, frames, steps).to(device)
            losses.append(train_step(model, x_seq, digit.to(device), method, k))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    seconds = (time.perf_counter() - started) / max(len(losses), 1)
    shown = ((sequence(task, frames, steps).to(device), digit.to(device)) for frames, digit in test)
    told = accuracy(model, shown)
    print(f"test accuracy {told:.1%}, {seconds:.1f} s a step")
    return {"losses": losses, "accuracy": told, "seconds": seconds}


if __name__ == "__main__":
    typer.run(main)
