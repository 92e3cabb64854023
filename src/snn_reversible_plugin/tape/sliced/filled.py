"""A tensor that is put together from slices.

The one idea: how a kernel lays out what it gives shows in the first slice. Source: this package's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snn_reversible_plugin.tape.sliced.rows import Part


class Filled:
    """A result that is filled a slice at a time, laid out as its slices are.

    Args:
        size: of all.
        spare: memory that may be taken for it.
    """

    def __init__(self, size: torch.Size | tuple[int, ...], spare: Tensor | None = None) -> None:
        self._size = torch.Size(size)
        self.value: Tensor | None = None
        self._spare = spare if spare is not None and spare.shape == self._size else None

    def put(self, part: Part, rows: Tensor) -> None:
        """Write a slice."""
        if self.value is None:
            layout = torch.contiguous_format
            if rows.dim() == 4 and not rows.is_contiguous():
                layout = torch.channels_last
            spare = self._spare
            if (
                spare is not None
                and spare.dtype is rows.dtype
                and spare.is_contiguous(memory_format=layout)
            ):
                self.value = spare
            else:
                self.value = torch.empty(
                    self._size, dtype=rows.dtype, device=rows.device, memory_format=layout
                )
        part.put(rows, self.value)
