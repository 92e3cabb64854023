"""What networks learn from: simulated recordings of digits, and N-MNIST where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder

DATA = {"events": "embedded events", "nmnist": "N-MNIST"}
SENSOR = (34, 34, 2)
SPEECH = Path(__file__).with_name("spoken_digits.npz")  # tools/spoken_digits.py makes it


def parts(data: str, folder: Path, limit: int | None) -> tuple[Any, Any]:
    """Recordings to train on and to test on: every fifth of N-MNIST's first joins its few second ones."""
    if data == "events":
        found: tuple[Any, Any] = DigitSaccades(train=True), DigitSaccades(train=False)
    else:
        recordings, rest = (NMNISTFolder(folder, train=train) for train in (True, False))
        fifth = range(0, len(recordings), 5)
        others = [index for index in range(len(recordings)) if index % 5]
        found = Subset(recordings, others), ConcatDataset([Subset(recordings, fifth), rest])
    if limit is not None:
        found = tuple(Subset(part, range(min(limit, len(part)))) for part in found)
    for part in found:
        part.sensor_size = SENSOR
    return found


def spoken_digits(shape: tuple[int, ...], device: str | torch.device = "cpu") -> torch.Tensor:
    """Synthetic speech as spikes, ``[T, N, units]``: a second of it in T steps.

    A unit listens to one band, and fires each time another of its portions of energy is full; the units of
    a band have portions of their own. Recordings are taken in their order, again from the first.
    """
    steps, batch, units = shape
    with np.load(SPEECH) as stored:
        energy = torch.from_numpy(stored["energy"])  # [recordings, 100, bands]
    energy = energy[torch.arange(batch) % len(energy)].float() / 255
    energy = torch.nn.functional.interpolate(energy.mT, size=steps, mode="linear", align_corners=True)
    bands = torch.arange(units) * energy.shape[1] // units
    portions = 1 + torch.arange(units) % 7
    # 100 portions a second at most, whatever the number of steps.
    filled = energy[:, bands].mul(100 / steps).cumsum(-1) / portions[:, None]
    fired = filled.floor().diff(dim=-1, prepend=torch.zeros(batch, units, 1)).clamp_(0, 1)
    return fired.permute(2, 0, 1).contiguous().to(device)


def sequential_digits(shape: tuple[int, ...], device: str | torch.device = "cpu") -> torch.Tensor:
    """scikit-learn's handwritten digits, a pixel a step, ``[T, N, 1]``."""
    from sklearn.datasets import load_digits

    steps, batch, _ = shape
    side = round(steps**0.5)
    images = torch.from_numpy(load_digits().images).float().div(16)[torch.arange(batch) % 1797]
    images = torch.nn.functional.interpolate(images[:, None], size=(side, -(-steps // side)))
    return images.flatten(1)[:, :steps].T.unsqueeze(2).contiguous().to(device)
