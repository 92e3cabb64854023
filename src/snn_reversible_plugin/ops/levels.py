"""Small integers in floating point, packed: two to four bits an element, with NaN and -0.0 as they are.

The one idea: of the codes that a few bits have, the first stand for the integers, and three for what else
rounding can give: -0.0, and NaN of either sign. So what comes back is equal, but for a NaN's payload, and
nothing looks whether such values are there.
"""

from __future__ import annotations

import functools
import math

import torch

from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits
from snn_reversible_plugin.ops.devices import may_look

MOST_BITS = 4
_CHUNK = {"cpu": 1 << 18}  # elements; a multiple of eight
_LARGE_CHUNK = 1 << 24
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_for(low: int, high: int) -> int:
    """How many bits an element takes that is an integer from low to high, -0.0 or NaN.

    Example:
        >>> bits_for(0, 4), bits_for(0, 8)
        (3, 4)
    """
    return (high - low + 3).bit_length()


def pack_levels(flat: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The elements of a 1-D floating-point tensor, in ``bits_for(low, high)`` bits each.

    Args:
        flat: integers from low to high, -0.0 or NaN, by construction: nothing looks.
        low, high: with at most thirteen integers from one to the other.

    Example:
        >>> import torch
        >>> packed, back = pack_levels(torch.tensor([0.0, 3.0, -0.0]), 0, 4), torch.empty(3)
        >>> unpack_levels(packed, back, 0, 4)
        >>> packed.nbytes, back
        (2, tensor([0., 3., -0.]))
    """
    each, size = bits_for(low, high), flat.numel()
    bits = torch.empty((size * each + 7) // 8, dtype=torch.uint8, device=flat.device)
    for start, stop in _chunks(flat):
        codes = codes_of(flat[start:stop], low, high)
        bits[start * each // 8 : (stop * each + 7) // 8] = pack_bits(codes, each)
    return bits


def codes_of(part: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Which of :func:`values_of` each element is, as ``uint8``."""
    if not may_look(part.device):
        return _codes_of_any(part, low, high)
    as_integers = part.contiguous().view(_INTEGERS[part.element_size()])
    minus_zero = as_integers.eq(torch.iinfo(as_integers.dtype).min)  # the sign, and nothing else
    codes = (part - low).to(torch.uint8).clamp_(max=high - low).masked_fill_(minus_zero, high - low + 1)
    values = values_of(low, high, part.dtype, part.device).view(as_integers.dtype)
    if torch.equal(values.index_select(0, codes.int()), as_integers):
        return codes
    return _codes_of_any(part, low, high)  # a NaN is among them


def _codes_of_any(part: torch.Tensor, low: int, high: int) -> torch.Tensor:
    negative, nan = part.signbit(), part.isnan()
    codes = (part - low).nan_to_num_(nan=0.0).to(torch.uint8)
    codes.masked_fill_(part.eq(0).logical_and_(negative), high - low + 1)
    codes.masked_fill_(nan, high - low + 2)
    return codes.add_(nan.logical_and_(negative))


def unpack_levels(bits: torch.Tensor, out: torch.Tensor, low: int, high: int) -> None:
    """Write the elements that :func:`pack_levels` packed into the 1-D tensor ``out``."""
    each, values = bits_for(low, high), values_of(low, high, out.dtype, out.device)
    for start, stop in _chunks(out):
        codes = torch.empty(stop - start, dtype=torch.int32, device=out.device)
        unpack_bits(bits[start * each // 8 : (stop * each + 7) // 8], codes, each)
        torch.index_select(values, 0, codes, out=out[start:stop])


def _chunks(flat: torch.Tensor) -> list[tuple[int, int]]:
    size, step = flat.numel(), _CHUNK.get(flat.device.type, _LARGE_CHUNK)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@functools.lru_cache(maxsize=64)
def values_of(low: int, high: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each code stands for."""
    nan = math.copysign(math.nan, 1)
    values = torch.tensor([*range(low, high + 1), -0.0, nan, nan], dtype=dtype)
    values[-1].copysign_(torch.tensor(-1.0, dtype=dtype))
    return values.to(device)
