"""Small numbers in bytes: digits below a radix, as many in a byte as fit.

The one idea: which of a few values it was is a digit, and several digits of a radix that is no power of two
still share a byte. Source: MacKay et al., "Reversible Recurrent Neural Networks", NeurIPS 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snn_reversible_plugin.grid.decays import digits_a_byte
from snn_reversible_plugin.ops.bits import pack_bits, unpack_bits


def pack_digits(digits: Tensor, radix: int) -> Tensor:
    """Digits below ``radix``, at most 256, as bytes; none at all for radix 1.

    Args:
        digits: whole numbers, [n], of any type.
        radix: one more than the largest possible digit.

    Example:
        >>> import torch
        >>> pack_digits(torch.tensor([2, 0, 1, 2, 2, 1]), radix=3)
        tensor([227,   1], dtype=torch.uint8)
    """
    if radix == 1:
        return digits.new_empty(0, dtype=torch.uint8)
    if radix == 2:
        return pack_bits(digits)
    each = digits_a_byte(radix)
    rows = torch.nn.functional.pad(digits.to(torch.uint8), (0, -len(digits) % each)).view(-1, each)
    total = rows[:, each - 1].clone()
    for place in reversed(range(each - 1)):
        total.mul_(radix).add_(rows[:, place])
    return total


def unpack_digits(record: Tensor, radix: int, count: int) -> Tensor:
    """The first ``count`` digits that :func:`pack_digits` packed, as ``uint8``.

    Example:
        >>> import torch
        >>> unpack_digits(torch.tensor([227, 1], dtype=torch.uint8), radix=3, count=6)
        tensor([2, 0, 1, 2, 2, 1], dtype=torch.uint8)
    """
    if radix == 1:
        return record.new_zeros(count)
    if radix == 2:
        digits = record.new_empty(count)
        unpack_bits(record, digits)
        return digits
    each = digits_a_byte(radix)
    if each == 1:
        return record
    places = []
    rest = record
    for _ in range(each):
        places.append(rest.remainder(radix))
        rest = rest.div(radix, rounding_mode="floor")
    return torch.stack(places, 1).view(-1)[:count]
