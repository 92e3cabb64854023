"""From event recordings to the batches that a spiking network trains on.

The idea: frames are made once, by tonic's ``ToFrame``, and kept by tonic's caches; what is added is
the order of the axes that multi-step networks expect, time first, and a cache folder that cannot
hand out the frames of other settings.

Source: tonic's ``ToFrame``, ``MemoryCachedDataset``, ``DiskCachedDataset`` and ``PadTensors``.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import tonic
import torch
from torch.utils.data import DataLoader


def event_frames(
    dataset: Any,
    *,
    steps: int = 10,
    batch_size: int = 32,
    shuffle: bool = False,
    drop_last: bool = False,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> "DataLoader[Any]":
    """Batches of event frames, ``(x_seq, target)``.

    ``x_seq`` is float32 ``[T, N, 2, H, W]``: the number of events of each polarity (OFF, then ON)
    that each pixel fired in each of the ``T = steps`` equal parts of its recording. ``target`` is
    int64 ``[N]``.

    Args:
        dataset: a tonic data set of events with a ``sensor_size``, such as `DigitSaccades`,
            `NMNISTFolder` or ``tonic.datasets.DVSGesture(...)``. It is not changed; a transform of
            its own runs before the frames are made, once, because frames are cached.
        steps: number of frames in a recording, T.
        batch_size: recordings in a batch, N.
        shuffle: a new order in each epoch, drawn from ``seed``.
        drop_last: leave out a last batch that is not full.
        cache: folder on disk for the frames, which each setting shares with no other; None keeps
            them in memory.
        seed: of the order.
        num_workers: processes that load, as for a `DataLoader`. Each has a memory cache of its own,
            so with more than 0 give a folder.

    Raises:
        ValueError: ``steps`` or ``batch_size`` below 1.
        TypeError: the data set has no ``sensor_size``.

    Example:
        >>> from snn_reversible_plugin.data import DigitSaccades, event_frames
        >>> batches = event_frames(DigitSaccades(limit=8), steps=5, batch_size=4)
        >>> x_seq, digit = next(iter(batches))
        >>> x_seq.shape, digit.shape
        (torch.Size([5, 4, 2, 34, 34]), torch.Size([4]))
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")
    if not hasattr(dataset, "sensor_size"):
        raise TypeError(
            f"{type(dataset).__name__} has no sensor_size: give a tonic data set of events, or set "
            "its sensor_size to (width, height, polarities)"
        )
    framed = _Framed(dataset, steps)
    cached: Any
    if cache is None:
        cached = tonic.MemoryCachedDataset(framed)
    else:
        # tonic's cache looks at the index alone, so all else that shapes a frame names the folder.
        names = ("train", "transform", "target_transform", "transforms")
        settings = [repr(dataset), len(dataset), steps]
        settings += [repr(getattr(dataset, name, None)) for name in names]
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        cached = tonic.DiskCachedDataset(framed, str(Path(cache) / digest))
    return DataLoader(
        cached,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
        # Pads nothing, all having T frames, but stacks along the axis after time, as float32.
        collate_fn=tonic.collation.PadTensors(batch_first=False),
    )


class _Framed:
    """A data set of events as one of frames, int16 ``[T, 2, H, W]``."""

    def __init__(self, dataset: Any, steps: int) -> None:
        self.dataset, self.steps = dataset, steps
        self.to_frame = tonic.transforms.ToFrame(dataset.sensor_size, n_time_bins=steps)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        events, target = self.dataset[index]
        if len(events) == 0:  # ToFrame looks for the first event
            shape = (self.steps, *self.dataset.sensor_size[::-1])
            return np.zeros(shape, dtype=np.int16), target
        return self.to_frame(events), target
