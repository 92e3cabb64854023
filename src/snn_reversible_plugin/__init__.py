"""Reversible training for spiking neural networks: stock models, a small part of the memory."""

from typing import Any

from snn_reversible_plugin.blocks import RevSBlock, RevSColumns, RevSSequence
from snn_reversible_plugin.blocks.surgery import SurgeryReport, unwrap_residual_blocks, wrap_residual_blocks
from snn_reversible_plugin.compiler import compile
from snn_reversible_plugin.convert import convert_to_reversible, restore, reversible, stock
from snn_reversible_plugin.grid import look_at_graphs
from snn_reversible_plugin.modules.kinds import register
from snn_reversible_plugin.modules.registry import register_reversible
from snn_reversible_plugin.ops.freed_memory import keep_freed_memory
from snn_reversible_plugin.reports.fit import largest_batch
from snn_reversible_plugin.reports.flips import counting_flips
from snn_reversible_plugin.reports.memory_report import MemoryReport, memory_report
from snn_reversible_plugin.reports.verification import Verification, verify
from snn_reversible_plugin.training import step_in_backward

__all__ = [
    "MemoryReport",
    "RevSBlock",
    "RevSColumns",
    "RevSSequence",
    "SurgeryReport",
    "Verification",
    "compile",
    "convert_to_reversible",
    "counting_flips",
    "keep_freed_memory",
    "largest_batch",
    "look_at_graphs",
    "memory_report",
    "register",
    "register_reversible",
    "restore",
    "reversible",
    "step_in_backward",
    "stock",
    "unwrap_residual_blocks",
    "verify",
    "wrap_residual_blocks",
]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("snn-reversible-plugin")
    except metadata.PackageNotFoundError:
        raise AttributeError("the package is not installed, so that it has no version") from None
