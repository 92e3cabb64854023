"""Small integers packed: eight zeros and ones in a byte, or up to four bits an element.

The one idea: a spike is a bit, and a sum of a few spikes a few bits. The elements are one string of bits,
the lowest bit of each first: of zeros and ones, element ``8 i + j`` is bit ``j`` of byte ``i``.
"""

from __future__ import annotations

from typing import Protocol

import torch

from snn_reversible_plugin.ops.forms import BITS, form_of


class BitsForm(Protocol):
    """What a form of the operation gives; :mod:`.reference` is the specification."""

    def pack_bits(self, flat: torch.Tensor, bits_each: int = 1) -> torch.Tensor:
        """``uint8`` of ``ceil(n * bits_each / 8)`` bytes: see :func:`pack_bits`."""

    def unpack_bits(self, bits: torch.Tensor, out: torch.Tensor, bits_each: int = 1) -> None:
        """Write the elements into the 1-D tensor ``out``, in its dtype."""


def _form(device: torch.device) -> BitsForm:
    return form_of(BITS, device)  # type: ignore[return-value]


def pack_bits(flat: torch.Tensor, bits_each: int = 1) -> torch.Tensor:
    """The elements of a 1-D tensor, ``bits_each`` bits each: ``uint8`` of ``ceil(n * bits_each / 8)``.

    Args:
        flat: any dtype. With one bit an element, the bit is set where the element is not 0 (as NaN is not).
            With more, elements are integers from 0 to ``2**bits_each - 1`` by construction: nothing looks.
        bits_each: 1 to 4.

    Example:
        >>> import torch
        >>> pack_bits(torch.tensor([1.0, 0.0, 1.0]))
        tensor([5], dtype=torch.uint8)
        >>> pack_bits(torch.tensor([1.0, 3.0, 2.0]), bits_each=2)
        tensor([45], dtype=torch.uint8)
    """
    return _form(flat.device).pack_bits(flat, bits_each)


def unpack_bits(bits: torch.Tensor, out: torch.Tensor, bits_each: int = 1) -> None:
    """Write the elements that :func:`pack_bits` packed into the 1-D tensor ``out``, in its dtype.

    Example:
        >>> import torch
        >>> out = torch.empty(3)
        >>> unpack_bits(torch.tensor([45], dtype=torch.uint8), out, bits_each=2)
        >>> out
        tensor([1., 3., 2.])
    """
    _form(bits.device).unpack_bits(bits, out, bits_each)
