"""The one dispatch point for operations that have a faster form on some device.

Each operation has a device-generic torch form, which is its specification; a faster form is chosen
here by the device of the input and held to the torch form by the same tests.
"""

from __future__ import annotations

import torch

from snn_reversible_plugin.ops import bits_numpy, bits_torch


def pack_bits(flat: torch.Tensor) -> torch.Tensor:
    """One bit an element of a 1-D tensor of zeros and ones: ``uint8`` of ``ceil(n / 8)`` bytes."""
    form = bits_numpy if flat.device.type == "cpu" else bits_torch
    return form.pack_bits(flat)


def unpack_bits(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Write the bits into the 1-D tensor ``out`` as zeros and ones of its dtype."""
    form = bits_numpy if bits.device.type == "cpu" else bits_torch
    form.unpack_bits(bits, out)
