"""The one dispatch point for operations that have a faster form on some device.

Each operation has a device-generic torch form, which is its specification; a faster form is chosen
here by the device of the input and held to the torch form by the same tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from snn_reversible_plugin.ops import bits_torch, steps_torch

_on_cpu: ModuleType = bits_torch
_HAS_NUMPY = importlib.util.find_spec("numpy") is not None  # torch works without it
if _HAS_NUMPY:
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


def steps_on(device: torch.device) -> Any:
    """The module that computes steps on the grid: see :mod:`.steps_torch`."""
    return _steps_on_cpu() if device.type == "cpu" else steps_torch


@functools.cache
def _steps_on_cpu() -> ModuleType:
    """Compiled where numba is installed, which is imported here: at the first step on the grid."""
    for form in ("numba", "numpy") if _HAS_NUMPY else ():
        try:
            return importlib.import_module(f"snn_reversible_plugin.ops.steps_{form}")
        except ImportError:  # not there, or not made for this numpy
            continue
    return steps_torch


@functools.cache
def sequences_on_cpu() -> ModuleType | None:
    """The compiled form of :mod:`snn_reversible_plugin.sweeps`; None without numba."""
    try:
        return importlib.import_module("snn_reversible_plugin.ops.sequences_numba")
    except ImportError:
        return None


def as_pieces(chunk: torch.Tensor) -> Any:
    """Bytes as :func:`steps_on` reads and writes them, sharing memory."""
    return chunk.numpy() if _HAS_NUMPY and chunk.device.type == "cpu" else chunk
