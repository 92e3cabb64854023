"""Small integers packed by planes, where some are more frequent: less than a fixed number of bits each.

The one idea: a bit says whether an element is another than the most frequent value; of those that are, and
of no others, the next says whether it is another than the second; and so on. A spike count that is 0 for
two thirds of the neurons takes 1.4 bits and not 3. How many bytes that makes depends on the values, which a
device would have to be waited for: this is for the CPU.

Source: unary (thermometer) codes, as in Golomb, "Run-length encodings", IEEE Trans. Inf. Theory 12, 1966.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from snn_reversible_plugin.ops.forms import PLANES, form_of
from snn_reversible_plugin.ops.levels import bits_for, codes_of, values_of

CHUNK = 1 << 16  # elements that are found without unpacking those before; a multiple of eight


class PlanesForm(Protocol):
    """What a form of the operation gives; :mod:`.reference` is the specification."""

    def pack(self, codes: torch.Tensor, values: int, most: int) -> torch.Tensor | None:
        """The values' order, the most frequent first, a byte each, and the planes; None where all that is
        ``most`` bytes or more. ``codes`` are ``uint8`` below ``values``.
        """

    def unpack(self, planes: torch.Tensor, ranks: torch.Tensor) -> None:
        """Write into ``ranks``, ``uint8``, each value's place in the order; ``planes`` are without it."""


class Planes(NamedTuple):
    """Packed elements: of each chunk the order of its values, then its planes.

    ``starts``: of each chunk in ``bits``. ``numel``: of how many elements.
    """

    bits: torch.Tensor
    starts: tuple[int, ...]
    numel: int


def _form(device: torch.device) -> PlanesForm:
    return form_of(PLANES, device)  # type: ignore[return-value]


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
    form, left = _form(flat.device), (flat.numel() * bits_for(low, high) + 7) // 8
    values, chunks, starts = len(values_of(low, high, flat.dtype, flat.device)), [], []
    size = 0
    for part in flat.split(CHUNK):
        chunk = form.pack(codes_of(part, low, high), values, left - size)
        if chunk is None:
            return None
        starts.append(size)
        chunks.append(chunk)
        size += chunk.nbytes
    return Planes(torch.cat(chunks), tuple(starts), flat.numel())


def unpack_planes(packed: Planes, out: torch.Tensor, begin: int, low: int, high: int) -> None:
    """Write as many elements as the 1-D tensor ``out`` has into it, from ``begin`` on."""
    form, values = _form(out.device), values_of(low, high, out.dtype, out.device)
    end = begin + out.numel()
    for chunk in range(begin // CHUNK, -(-end // CHUNK)):
        first, planes = chunk * CHUNK, packed.bits[packed.starts[chunk] :]
        ranks = torch.empty(min(CHUNK, packed.numel - first), dtype=torch.uint8)
        form.unpack(planes[len(values) :], ranks)
        start, stop = max(begin, first), min(end, first + len(ranks))
        ordered, places = values[planes[: len(values)].int()], ranks[start - first : stop - first].int()
        torch.index_select(ordered, 0, places, out=out[start - begin : stop - begin])
