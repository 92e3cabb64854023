"""What the converter puts in place of SpikingJelly's neurons, of each copy in the process.

The one idea: neurons with the equations of ``IFNode``, ``LIFNode`` or ``ParametricLIFNode`` have a backward
of their own (:mod:`.analytic`), every other neuron whose forward can be run twice is replayed
(:mod:`.replayed`), and what can't be stays stock, for the reason in its row (:mod:`.types`).
"""

from __future__ import annotations

import functools
import importlib

from torch import nn

from snn_reversible_plugin.modules.registry import (
    StaysStock,
    register_on_grid,
    register_reversible,
    stays_stock,
)
from snn_reversible_plugin.modules.swap import swapped_class
from snn_reversible_plugin.spikingjelly import on_grid
from snn_reversible_plugin.spikingjelly.analytic import Analytic, Reversible
from snn_reversible_plugin.spikingjelly.claims import claim_of
from snn_reversible_plugin.spikingjelly.copies import copy_at, copy_of, installed
from snn_reversible_plugin.spikingjelly.exports import teach_exporter
from snn_reversible_plugin.spikingjelly.replayed import Replayed
from snn_reversible_plugin.spikingjelly.types import add_rows, equations_of, own_entries
from snn_reversible_plugin.spikingjelly.written_out import why_not_same


def _choose(module: nn.Module) -> type[nn.Module]:
    if isinstance(module, Analytic):
        return type(module)  # type: ignore[return-value]
    known = equations_of(module) is not None
    why = "" if known else why_not_same(module)
    if not known and not why:
        return swapped_class(Reversible, type(module))
    if own := own_entries(type(module)):
        copy = copy_of(type(module))
        functions = copy is not None and copy.has_operators
        remedy = "single_step_functional_forward" if functions else "neuronal_charge and neuronal_reset"
        raise StaysStock(
            f"it has a {min(own)} of its own, which may do more than its equations; write them as "
            f"{remedy} to have it replayed{f' ({why})' if claim_of(type(module)) else ''}"
        )
    if any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules()):
        raise StaysStock("its forward updates batch-norm statistics")
    return swapped_class(Reversible if known else Replayed, type(module))


def _on_grid(module: nn.Module) -> type[nn.Module]:
    reason = on_grid.why_not(module)
    if reason is not None:
        raise StaysStock(reason)
    return swapped_class(on_grid.NodeOnGrid, type(module))


@functools.cache
def load(root: str) -> None:
    """Let the converter know the neurons of the copy of SpikingJelly in this package.

    Raises:
        ImportError: it is a release below 0.0.0.0.12.
    """
    for cls, row in add_rows(copy_at(root)).items():
        if row.stays:
            register_reversible(cls, subclasses=True)(stays_stock(row.stays))
        elif row.family or row.equations:
            register_reversible(cls, subclasses=True)(_choose)
        if row.on_grid or row.name in ("BaseNode", "SimpleBaseNode"):
            register_on_grid(cls)(_on_grid)
    teach_exporter(root)
    if root.partition(".")[0] == "spikingjelly" and installed() is copy_at(root):
        # Types of their own, which users may name.
        importlib.import_module("snn_reversible_plugin.spikingjelly.neurons")
