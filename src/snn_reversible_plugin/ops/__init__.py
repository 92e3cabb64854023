"""The one dispatch point for operations that have a faster form on some device.

Each operation has a device-generic torch form, which is its specification; a faster form is chosen
here by the device of the input and held to the torch form by the same tests.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from snn_reversible_plugin.ops import bits_torch

_on_cpu: ModuleType = bits_torch
if importlib.util.find_spec("numpy") is not None:  # torch works without it
    _on_cpu = importlib.import_module("snn_reversible_plugin.ops.bits_numpy")


def pack_bits(flat: torch.Tensor) -> torch.Tensor:
    """One bit an element of a 1-D tensor of zeros and ones: ``uint8`` of ``ceil(n / 8)`` bytes."""
    form = _on_cpu if flat.device.type == "cpu" else bits_torch
    packed: torch.Tensor = form.pack_bits(flat)
    return packed


def unpack_bits(bits: torch.Tensor, out: torch.Tensor) -> None:
    """Write the bits into the 1-D tensor ``out`` as zeros and ones of its dtype."""
    form = _on_cpu if bits.device.type == "cpu" else bits_torch
    form.unpack_bits(bits, out)
