"""The attribute ``reset`` of a snnTorch neuron: the spikes that its last step reset.

The one idea: stock leaves them there as float32, 4 bytes a neuron that hardly anybody reads, and they are
zeros and ones; so less is left, and spikes are made of it when somebody asks.

Source: ``forward`` of the classes in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from snn_reversible_plugin.modules.swap import LAST_RESET


class LastReset:
    """Mixin of the neurons that have it."""

    @property
    def reset(self: Any) -> Tensor:
        """The spikes that the last step reset, as stock has them; as less until somebody asks."""
        left = LAST_RESET.of(self)
        if left is not None:
            return left.spikes()  # type: ignore[no-any-return]
        if "reset" not in self.__dict__:
            raise AttributeError("reset")
        return self.__dict__["reset"]  # type: ignore[no-any-return]

    @reset.setter
    def reset(self: Any, spikes: Tensor) -> None:
        LAST_RESET.clear(self)
        self.__dict__["reset"] = spikes


class _Flags(NamedTuple):
    """Spikes as a byte each: bits would take longer in every step, for one step's that stand at a time."""

    flags: Tensor

    def spikes(self) -> Tensor:
        return self.flags.float()


def leave_reset(neuron: Any, spikes: Tensor, as_flags: bool) -> None:
    """Leave on a neuron the spikes that its step has reset."""
    if as_flags:
        leave_less(neuron, _Flags(spikes.bool()))
    else:
        neuron.reset = spikes


def leave_less(neuron: Any, left: Any) -> None:
    """Leave what gives these spikes when it is asked: ``left.spikes()``."""
    LAST_RESET.set(neuron, left)
    neuron.__dict__.pop("reset", None)
