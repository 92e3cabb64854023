"""Planes in plain torch: the specification."""

from __future__ import annotations

import torch

from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits


def pack(codes: torch.Tensor, values: int, most: int) -> torch.Tensor | None:
    """See :class:`.ops.planes.PlanesForm`."""
    order = codes.bincount(minlength=values).argsort(descending=True, stable=True).byte()
    rank = torch.empty_like(order).scatter_(0, order.long(), torch.arange(values, dtype=torch.uint8))
    planes, size, left = [order], order.nbytes, rank[codes.int()]
    while left.numel() and size < most:
        above = left.ne(0)
        planes.append(pack_bits(above))
        size += planes[-1].nbytes
        left = left.masked_select(above).sub_(1)
    return torch.cat(planes) if size < most else None


def unpack(planes: torch.Tensor, ranks: torch.Tensor) -> None:
    """See :class:`.ops.planes.PlanesForm`."""
    above, count, at = [], ranks.numel(), 0
    while count:
        end = at + (count + 7) // 8
        above.append(torch.empty(count, dtype=torch.bool))
        unpack_bits(planes[at:end], above[-1])
        at, count = end, int(above[-1].sum())
    more = ranks.new_empty(0)
    for plane in reversed(above):
        more = plane.byte().masked_scatter_(plane, more.add_(1))
    ranks.copy_(more)
