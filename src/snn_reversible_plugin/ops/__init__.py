"""Operations on flat tensors, and who computes them."""

from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits
from snn_reversible_plugin.ops.levels import pack_levels, unpack_levels
from snn_reversible_plugin.ops.planes import pack_planes, unpack_planes

__all__ = ["pack_bits", "pack_levels", "pack_planes", "unpack_bits", "unpack_levels", "unpack_planes"]
