"""What networks learn from: simulated recordings of digits, and N-MNIST where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder

DATA = {"events": "embedded events", "nmnist": "N-MNIST"}
SENSOR = (34, 34, 2)


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
