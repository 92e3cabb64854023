"""Small integers packed by planes, where some are more frequent: less than a fixed number of bits each.

The one idea: a bit says whether an element is another than the most frequent value; of those that are, and
of no others, the next says whether it is another than the second; and so on. A spike count that is 0 for
two thirds of the neurons takes 1.4 bits and not 3. How many bytes that makes depends on the values, which a
device would have to be waited for: this is for the CPU.

Source: unary (thermometer) codes, as in Golomb, "Run-length encodings", IEEE Trans. Inf. Theory 12, 1966.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits
from snn_reversible_plugin.ops.levels import bits_for, codes_of, values_of

CHUNK = 1 << 16  # elements that are found without unpacking those before; a multiple of eight


class Planes(NamedTuple):
    """Packed elements: of each chunk the order of its values, then its planes.

    ``starts``: of each chunk in ``bits``. ``numel``: of how many elements.
    """

    bits: torch.Tensor
    starts: tuple[int, ...]
    numel: int


def pack_planes(flat: torch.Tensor, low: int, high: int) -> Planes | None:
    """The elements of a 1-D floating-point tensor; None where a fixed number of bits each is no more.

    Args:
        flat: integers from low to high, -0.0 or NaN, by construction, as in :func:`.levels.pack_levels`.
        low, high: with at most thirteen integers from one to the other.

    Example:
        >>> counts = torch.tensor([0.0, 0, 3, 0, 1, 0, 0, 0])
        >>> packed, back = pack_planes(torch.cat([counts] * 8), 0, 4), torch.empty(64)
        >>> packed.bits.nbytes, unpack_planes(packed, back, 0, low=0, high=4), back[:8].equal(counts)
        (19, None, True)
    """
    budget = (flat.numel() * bits_for(low, high) + 7) // 8
    if not budget:
        return None
    starts, planes, size = [], [], 0
    for part in flat.split(CHUNK):
        starts.append(size)
        left = codes_of(part, low, high)
        order = left.bincount(minlength=high - low + 4).argsort(descending=True, stable=True).byte()
        planes.append(order)
        size += order.nbytes
        left = _inverse(order)[left.int()]
        while left.numel():
            above = left.ne(0)
            planes.append(pack_bits(above))
            size += planes[-1].nbytes
            if size >= budget:
                return None
            left = left[above].sub_(1)
    return Planes(torch.cat(planes), tuple(starts), flat.numel())


def unpack_planes(packed: Planes, out: torch.Tensor, begin: int, low: int, high: int) -> None:
    """Write as many elements as the 1-D tensor ``out`` has into it, from ``begin`` on."""
    values, end = values_of(low, high, out.dtype, out.device), begin + out.numel()
    for chunk in range(begin // CHUNK, -(-end // CHUNK)):
        first = chunk * CHUNK
        codes = _codes(packed, chunk, min(CHUNK, packed.numel - first), len(values))
        start, stop = max(begin, first), min(end, first + len(codes))
        codes = codes[start - first : stop - first].int()
        torch.index_select(values, 0, codes, out=out[start - begin : stop - begin])


def _inverse(order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(order).scatter_(0, order.long(), torch.arange(len(order), dtype=torch.uint8))


def _codes(packed: Planes, chunk: int, count: int, size: int) -> torch.Tensor:
    start, end = packed.starts[chunk], packed.starts[chunk] + size
    codes = torch.empty(count, dtype=torch.uint8)
    at = _read(packed.bits, end, codes)
    above = codes.nonzero()[:, 0]
    while above.numel():
        more = torch.empty(above.numel(), dtype=torch.uint8)
        at = _read(packed.bits, at, more)
        codes[above] += more
        above = above[more.bool()]
    return packed.bits[start:end][codes.int()]


def _read(bits: torch.Tensor, at: int, out: torch.Tensor) -> int:
    """Fill a tensor with a plane, and say where the next begins."""
    end = at + (out.numel() + 7) // 8
    unpack_bits(bits[at:end], out)
    return end
