"""What a timeline asks of the equations whose steps it undoes.

The one idea: a :class:`~.neurons.on_grid.timeline.Timeline` knows the order of steps and what was written
down of each; how one is undone is the equations' own. Source: this package's own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Dynamics(Protocol):
    """How a timeline's steps are undone. Equal for all of them; tensors are flat, float32 [n]."""

    @property
    def name(self) -> str:
        """Whose state it is, for errors."""

    @property
    def bits(self) -> int:
        """The grid's."""

    @property
    def resets_at_once(self) -> bool:
        """Whether a step ends with a reset by its own spikes (SpikingJelly)."""

    @property
    def resets_in_charge(self) -> bool:
        """Whether a step's charge resets by the spikes before it (snnTorch)."""

    def unreset(self, state: Tensor, fired: Any, lost: Any) -> Tensor:
        """The charged state of a step that resets at once, from the one after it.

        ``fired``: the spikes of the step as they were written down, ``lost``: what its reset lost.
        """

    def undoes_at_once(self, device: torch.device) -> bool:
        """Whether a reset and the charge before it are undone together there."""

    def back_to_both(self, state: Tensor, current: Tensor, record: Any, lost: Any) -> tuple[Tensor, Tensor]:
        """The charged state of a step that resets at once, and the state before it.

        ``record``: the spikes, and what the reset lost; ``lost``: what the charge lost.
        """

    def back(self, charged: Tensor, current: Tensor, fired: Any, lost: Any) -> Tensor:
        """The state before a step.

        ``fired``: the spikes before the step, None where they don't reset in it; ``lost``: what its charge
        lost.
        """
