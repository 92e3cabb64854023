"""Handles of what is few bits an element: zeros and ones, whole numbers, two values.

The one idea: bits are made when somebody first relies on the handle, who has the tensor at hand; spikes
that nothing saves cost nothing.
"""

from __future__ import annotations

import torch

from snn_reversible_plugin import ops
from snn_reversible_plugin.ops.layouts import is_dense
from snn_reversible_plugin.ops.levels import bits_for
from snn_reversible_plugin.ops.planes import Planes
from snn_reversible_plugin.tape.handles import Handle, storage_once


class Packed(Handle):
    """Zeros and ones, one bit an element.

    Bits are made when somebody first relies on the handle, so that spikes that nothing saves cost
    nothing; whoever relies on it has the tensor at hand.
    """

    treatment = "packed"
    __slots__ = ("bits", "dtype", "size", "stride")

    def __init__(self) -> None:
        self.bits: torch.Tensor | None = None

    def materialize(self, spikes: torch.Tensor) -> None:
        if self.bits is not None:
            return
        spikes = spikes.detach()
        if not is_dense(spikes):
            spikes = spikes.contiguous()
        self.size, self.stride, self.dtype = spikes.size(), spikes.stride(), spikes.dtype
        self.bits = self._pack(spikes.as_strided((spikes.numel(),), (1,)))

    def get(self, last: bool) -> tuple[torch.Tensor, bool]:
        assert self.bits is not None
        spikes = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.bits.device)
        self._unpack(self.bits, spikes.as_strided((spikes.numel(),), (1,)))
        return self.verified(spikes, "unpacking its spikes"), True

    def unpack_range(self, begin: int, flat: torch.Tensor) -> None:
        """Write as many elements as ``flat`` has, in the order of memory from ``begin`` on."""
        assert self.bits is not None
        early = begin % 8  # bytes begin at every eighth element, however many bits one takes
        start = (begin - early) * self.bits_each // 8
        stop = -(-(begin + flat.numel()) * self.bits_each // 8)
        bits = self.bits[start:stop]
        if not early:
            self._unpack(bits, flat)
            return
        longer = flat.new_empty(early + flat.numel())
        self._unpack(bits, longer)
        flat.copy_(longer[early:])

    @property
    def bits_each(self) -> int:
        """Bits that an element takes."""
        return 1

    def _pack(self, flat: torch.Tensor) -> torch.Tensor:
        return ops.pack_bits(flat)

    def _unpack(self, bits: torch.Tensor, flat: torch.Tensor) -> None:
        ops.unpack_bits(bits, flat)

    def stored(self, seen: set[int]) -> int:
        return 0 if self.bits is None else storage_once(self.bits, seen)


class PackedLevels(Packed):
    """Integers from ``low`` to ``high`` in floating point, or NaN: two to four bits an element.

    On a CPU less, where few are large: see :mod:`.ops.planes`.
    """

    __slots__ = ("high", "low", "planes")

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.planes: Planes | None = None

    @property
    def bits_each(self) -> int:
        """Bits that an element takes where each takes as many."""
        return bits_for(self.low, self.high)

    def unpack_range(self, begin: int, flat: torch.Tensor) -> None:
        if self.planes is None:
            super().unpack_range(begin, flat)
        else:
            ops.unpack_planes(self.planes, flat, begin, self.low, self.high)

    def _pack(self, flat: torch.Tensor) -> torch.Tensor:
        if flat.device.type == "cpu":
            self.planes = ops.pack_planes(flat, self.low, self.high)
        if self.planes is not None:
            return self.planes.bits
        return ops.pack_levels(flat, self.low, self.high)

    def _unpack(self, bits: torch.Tensor, flat: torch.Tensor) -> None:
        if self.planes is None:
            ops.unpack_levels(bits, flat, self.low, self.high)
        else:
            ops.unpack_planes(self.planes, flat, 0, self.low, self.high)


class PackedTwo(Packed):
    """Zeros and one other number, ``high``: one bit an element."""

    __slots__ = ("high",)

    def __init__(self, high: float) -> None:
        super().__init__()
        self.high = high

    def _unpack(self, bits: torch.Tensor, flat: torch.Tensor) -> None:
        super()._unpack(bits, flat)
        if self.high != 1:
            flat.mul_(self.high)
        if self.high < 0:  # 0 times it is -0
            flat.add_(0.0)
