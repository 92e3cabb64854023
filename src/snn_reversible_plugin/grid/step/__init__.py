"""One neuron's step on the grid and back, and who computes it: see :mod:`.reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from snn_reversible_plugin.ops.forms import GRID_STEP, form_of


class Record(NamedTuple):
    """That a step has to be written down.

    ``reach``: how far the steps before reached, where that is accumulated on a device; it goes on there.
    """

    reach: torch.Tensor | None = None


def steps_on(device: torch.device) -> Any:
    """The form that computes steps on this device."""
    return form_of(GRID_STEP, device)


def as_pieces(chunk: torch.Tensor) -> Any:
    """Bytes as :func:`steps_on` of their device reads and writes them, sharing memory."""
    return steps_on(chunk.device).as_pieces(chunk)
