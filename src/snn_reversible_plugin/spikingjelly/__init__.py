"""SpikingJelly: reversible neuron types, and what the converter puts in place of stock ones.

The one idea: the adapter knows neurons, not releases: :mod:`.copies` tells what a copy of SpikingJelly
computes, :mod:`.adapter` what stands in for its neurons. Types that users name derive from those of the
installed copy.

Source: the neurons of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from snn_reversible_plugin.modules.kinds import FRAMEWORKS
from snn_reversible_plugin.spikingjelly.adapter import load
from snn_reversible_plugin.spikingjelly.copies import installed

if TYPE_CHECKING:
    from snn_reversible_plugin.spikingjelly.coupled import CoupledLIF
    from snn_reversible_plugin.spikingjelly.neurons import RevIFNode, RevLIFNode, RevParametricLIFNode

__all__ = ["CoupledLIF", "RevIFNode", "RevLIFNode", "RevParametricLIFNode", "register"]

_HOMES = {"CoupledLIF": "coupled"} | dict.fromkeys(
    ("RevIFNode", "RevLIFNode", "RevParametricLIFNode"), "neurons"
)

try:
    load(installed().root)
except ImportError:
    # A program may have copies of its own and no installed one: those have no types to name.
    if not any(framework.copies() for framework in FRAMEWORKS if framework.name == "spikingjelly"):
        raise


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def register() -> None:
    """Put ``RevIFNode``, ``RevLIFNode``, ``RevParametricLIFNode``, and for 2.0 ``CoupledLIF``, into
    SpikingJelly's neuron module.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> from snn_reversible_plugin import spikingjelly as adapter
        >>> adapter.register()
        >>> neuron.RevLIFNode is adapter.RevLIFNode
        True
    """
    for name, home in _HOMES.items():
        if home == "neurons" or installed().has_operators:
            setattr(installed().neuron, name, __getattr__(name))
