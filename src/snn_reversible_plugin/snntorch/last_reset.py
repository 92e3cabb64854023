"""The attribute ``reset`` of a snnTorch neuron: the spikes that its last step reset.

The one idea: stock leaves them there as float32, 4 bytes a neuron that hardly anybody reads, and they are
zeros and ones; so bits are left, and spikes are made of them when somebody asks.

Source: ``forward`` of the classes in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.modules.swap import LAST_RESET
from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits


class LastReset:
    """Mixin of the neurons that have it."""

    @property
    def reset(self: Any) -> Tensor:
        """The spikes that the last step reset, as stock has them; as bits until somebody asks."""
        bits = LAST_RESET.of(self)
        if bits is not None:
            return bits.spikes()  # type: ignore[no-any-return]
        if "reset" not in self.__dict__:
            raise AttributeError("reset")
        return self.__dict__["reset"]  # type: ignore[no-any-return]

    @reset.setter
    def reset(self: Any, spikes: Tensor) -> None:
        LAST_RESET.clear(self)
        self.__dict__["reset"] = spikes


class _InOrder(NamedTuple):
    """Spikes as bits, in the order of the elements."""

    bits: Tensor
    size: torch.Size

    def spikes(self) -> Tensor:
        out = torch.empty(self.size, device=self.bits.device)
        unpack_bits(self.bits, out.view(-1))
        return out


def leave_reset(neuron: Any, spikes: Tensor, as_bits: bool) -> None:
    """Leave on a neuron the spikes that its step has reset."""
    if as_bits and spikes.is_contiguous():
        leave_bits(neuron, _InOrder(pack_bits(spikes.view(-1)), spikes.size()))
    else:
        neuron.reset = spikes


def leave_bits(neuron: Any, bits: Any) -> None:
    """Leave what gives these spikes when it is asked: ``bits.spikes()``."""
    LAST_RESET.set(neuron, bits)
    neuron.__dict__.pop("reset", None)
