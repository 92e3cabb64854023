"""Operations on flat tensors, and who computes them."""

from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits

__all__ = ["pack_bits", "unpack_bits"]
