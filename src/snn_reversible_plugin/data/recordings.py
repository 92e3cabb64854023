"""What the data sets of this package have in common: recordings by index, with tonic's three
transforms.

The idea: a data set says how many recordings it has and how one is had; indexing, bounds and
transforms are the same for all and are here.

Source: the order of the transforms is that of tonic's own data sets.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from tonic.dataset import Dataset
from tonic.io import events_struct

Events = npt.NDArray[np.void]


class Recordings(Dataset):
    """A tonic data set of the ten digits: item ``i`` is ``(events, digit)``.

    A subclass fills ``data`` and ``targets``, one entry for each recording, and overrides
    `_record`.
    """

    sensor_size: tuple[int, int, int] = (34, 34, 2)
    dtype = events_struct
    ordering = dtype.names
    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __init__(
        self,
        train: bool,
        limit: int | None,
        transform: Callable[..., Any] | None,
        target_transform: Callable[..., Any] | None,
        transforms: Callable[..., Any] | None,
    ) -> None:
        # tonic's folder for downloads is not used: nothing here downloads.
        super().__init__("", transform, target_transform, transforms)
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}: give the number of recordings to keep, 1 or more")
        self.train = train

    def _record(self, index: int) -> Events:
        """The events of recording ``index``, from 0 to ``len(self) - 1``."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} recordings")
        index %= len(self)
        events: Any = self._record(index)
        target: Any = self.targets[index]
        if self.transform is not None:
            events = self.transform(events)
        if self.target_transform is not None:
            target = self.target_transform(target)
        if self.transforms is not None:
            events, target = self.transforms(events, target)
        return events, target
