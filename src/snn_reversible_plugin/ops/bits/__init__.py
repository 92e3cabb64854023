"""One bit an element, packed: eight zeros and ones in a byte.

The one idea: a spike is a bit. Bit order is little: element ``8 i + j`` is bit ``j`` of byte ``i``.
"""

from __future__ import annotations

from typing import Protocol

import torch

from snn_reversible_plugin.ops.forms import BITS, form_of


class BitsForm(Protocol):
    """What a form of the operation gives; :mod:`.reference` is the specification."""

    def pack_bits(self, flat: torch.Tensor) -> torch.Tensor:
        """One bit an element of a 1-D tensor, set where it is not 0: ``uint8`` of ``ceil(n / 8)`` bytes."""

    def unpack_bits(self, bits: torch.Tensor, out: torch.Tensor) -> None:
        """Write the bits into the 1-D tensor ``out`` as zeros and ones of its dtype."""


def _form(device: torch.device) -> BitsForm:
    return form_of(BITS, device)  # type: ignore[return-value]


def pack_bits(flat: torch.Tensor) -> torch.Tensor:
    """One bit an element of a 1-D tensor of zeros and ones: ``uint8`` of ``ceil(n / 8)`` bytes.

    Example:
        >>> import torch
        >>> pack_bits(torch.tensor([1.0, 0.0, 1.0]))
        tensor([5], dtype=torch.uint8)
    """
    return _form(flat.device).pack_bits(flat)


def unpack_bits(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Write the bits into the 1-D tensor ``out`` as zeros and ones of its dtype."""
    _form(bits.device).unpack_bits(bits, out)
