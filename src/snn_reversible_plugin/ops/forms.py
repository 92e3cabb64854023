"""Who computes an operation on which device: one table of forms.

The one idea: every operation has a reference, written in plain torch for any device, and may have faster
forms. A form is one file and one line here; the first whose device fits and whose imports work is taken.
Files stand beside their references, and are named and not imported: this floor knows no other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

BITS, PLANES, GRID_STEP = "bits", "planes", "grid step"
SHORT_SEQUENCE, SEQUENCE = "short sequence", "sequence"


class Form(NamedTuple):
    """One way to compute an operation.

    ``device`` is a type of device, or "any"; ``needs`` lists what must be installed, as it is imported.
    """

    operation: str
    device: str
    needs: tuple[str, ...]
    module: str


FORMS = (
    Form(BITS, "cuda", ("triton",), "ops.bits.on_triton"),
    Form(BITS, "cpu", ("numpy",), "ops.bits.on_numpy"),
    Form(BITS, "any", (), "ops.bits.reference"),
    Form(PLANES, "cpu", ("numpy", "numba"), "ops.planes.on_numba"),
    Form(PLANES, "any", (), "ops.planes.reference"),
    Form(GRID_STEP, "cuda", ("triton",), "grid.step.on_triton"),
    Form(GRID_STEP, "cpu", ("numpy", "numba"), "grid.step.on_numba"),
    Form(GRID_STEP, "cpu", ("numpy",), "grid.step.on_numpy"),
    Form(GRID_STEP, "any", (), "grid.step.reference"),
    Form(SHORT_SEQUENCE, "cpu", ("numpy", "numba"), "neurons.integrate_fire.kernels"),
    Form(SEQUENCE, "cuda", ("triton",), "neurons.integrate_fire.on_triton"),
)


@functools.cache  # asked several times a step
def form_of(operation: str, device: torch.device) -> ModuleType | None:
    """The module that computes an operation on a device; None where it has no form there.

    It is imported here: numba at the first step that it is wanted for.

    Example:
        >>> import torch
        >>> form_of(BITS, torch.device("meta")).__name__
        'snn_reversible_plugin.ops.bits.reference'
    """
    return _first(operation, device.type)


def _first(operation: str, device: str) -> ModuleType | None:
    return next(forms_of(operation, device), None)


def forms_of(operation: str, device: str) -> Iterator[ModuleType]:
    """All forms of an operation that work here for a type of device, the preferred one first."""
    for form in FORMS:
        if form.operation != operation or form.device not in (device, "any"):
            continue
        if not all(importlib.util.find_spec(name) for name in form.needs):
            continue
        try:
            yield importlib.import_module(f"snn_reversible_plugin.{form.module}")
        except ImportError:  # installed, and not made for the numpy that is
            continue
