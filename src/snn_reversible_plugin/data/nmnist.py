"""N-MNIST from a folder: the whole data set or any part of it.

The idea: ``tonic.datasets.NMNIST`` downloads, and refuses a folder of fewer than 10,000 files. This
reader takes what is there, in the layout of the download, and says what is wrong where something
is.

Source: Orchard et al., "Converting static image datasets to spiking neuromorphic datasets using
saccades" (Front. Neurosci. 2015); the file format is read by `tonic.io.read_mnist_file`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tonic.io import read_mnist_file

from snn_reversible_plugin.data.recordings import Events, Recordings

_LAYOUT = "Train/<digit>/<id>.bin and Test/<digit>/<id>.bin, with digits 0 to 9"


class NMNISTFolder(Recordings):
    """The recordings in a folder of N-MNIST's layout, ``Train/<digit>/<id>.bin`` and ``Test/...``.

    Item ``i`` is ``(events, digit)``: a structured array of tonic's event type (``x`` and ``y``
    from 0 to 33, ``t`` in microseconds, about 300 ms in all, ``p`` true for ON) and an int from 0
    to 9. Recordings are in the order of digit, then file name.

    Args:
        folder: the folder that holds ``Train`` and ``Test``.
        train: the training part, or the test part.
        limit: keep only so many recordings, taken evenly from the digits.
        transform, target_transform, transforms: of the events, of the digit, of both, as tonic has
            it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder's layout is another; a file is cut short or is not N-MNIST's (when it
            is read).
        IndexError: an index beyond the part.

    Example:
        >>> from tonic.transforms import ToFrame
        >>> from snn_reversible_plugin.data import NMNISTFolder
        >>> frames = ToFrame(NMNISTFolder.sensor_size, n_time_bins=10)
        >>> data = NMNISTFolder("../shared/data/nmnist", transform=frames)  # doctest: +SKIP
        >>> data[0][0].shape  # doctest: +SKIP
        (10, 2, 34, 34)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        train: bool = True,
        *,
        limit: int | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(train, limit, transform, target_transform, transforms)
        self.folder = Path(folder).expanduser()
        found = _recordings(self.folder, "Train" if train else "Test", limit)
        self.data = [path for path, _ in found]
        self.targets = [digit for _, digit in found]

    def _record(self, index: int) -> Events:
        return _read(self.data[index])

    def __repr__(self) -> str:
        return f"NMNISTFolder({str(self.folder)!r}, train={self.train}, limit={len(self)})"


def _recordings(folder: Path, part: str, limit: int | None) -> list[tuple[Path, int]]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"N-MNIST folder {str(folder)!r} does not exist: give a folder that holds {_LAYOUT}"
        )
    if not (folder / part).is_dir():
        found = sorted(entry.name for entry in folder.iterdir())[:5]
        raise ValueError(
            f"N-MNIST folder {str(folder)!r} has no {part!r} in it, only {found}: "
            f"give the folder that holds {_LAYOUT}"
        )
    queues = []  # of each digit's recordings
    for sub in sorted(entry for entry in (folder / part).iterdir() if entry.is_dir()):
        if sub.name not in NMNISTFolder.classes:
            raise ValueError(f"{str(sub)!r} is not named by a digit: the layout is {_LAYOUT}")
        queues.append([(path, int(sub.name)) for path in sorted(sub.glob("*.bin"))])
    if not any(queues):
        raise ValueError(f"{str(folder / part)!r} holds no recordings: the layout is {_LAYOUT}")
    if limit is not None:
        # Whole rounds over the digits, then as much of one more as is left, so that a small part of
        # the data still has every digit.
        rounds = sorted(
            ((place, item) for queue in queues for place, item in enumerate(queue)),
            key=lambda entry: entry[0],
        )
        return sorted((item for _, item in rounds[:limit]), key=lambda item: (item[1], item[0]))
    return [item for queue in queues for item in queue]


def _read(path: Path) -> Events:
    size = path.stat().st_size
    if size == 0 or size % 5:
        raise ValueError(
            f"{str(path)!r} has {size} bytes: an N-MNIST recording has 5 for each event; copy it again"
        )
    events: Events = read_mnist_file(str(path), dtype=NMNISTFolder.dtype)
    width, height, _ = NMNISTFolder.sensor_size
    if len(events) and (events["x"].max() >= width or events["y"].max() >= height):
        raise ValueError(
            f"{str(path)!r} has an event at x={events['x'].max()}, y={events['y'].max()} on a "
            f"sensor of {width}x{height}: it is not an N-MNIST recording, or it is damaged"
        )
    return events
