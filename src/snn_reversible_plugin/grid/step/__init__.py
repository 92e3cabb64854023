"""One neuron's step on the grid and back, and who computes it: see :mod:`.reference`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from snn_reversible_plugin.grid.decays import Step
from snn_reversible_plugin.ops.forms import GRID_STEP, form_of


class Record(NamedTuple):
    """That a step has to be written down.

    ``reach``: how far the steps before reached, where that is accumulated on a device; it goes on there.
    """

    reach: torch.Tensor | None = None


class Undo(NamedTuple):
    """How a step that reset at once is undone: its input, and all that it wrote down, flat.

    ``bits`` are its spikes, ``planes`` what its reset lost, ``digits`` what its charge did. ``current`` and
    ``before``, the place for the state before the step, are None where only the reset is to be undone.
    """

    step: Step
    bits: Any
    planes: Any
    digits: Any
    current: torch.Tensor | None
    before: torch.Tensor | None


steps_on: Callable[[torch.device], Any] = functools.partial(form_of, GRID_STEP)
"""The form that computes steps on a device."""


def as_pieces(chunk: torch.Tensor) -> Any:
    """Bytes as :func:`steps_on` of their device reads and writes them, sharing memory."""
    return steps_on(chunk.device).as_pieces(chunk)
