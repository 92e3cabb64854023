"""The frameworks that have an adapter, and when to load it.

An adapter is imported once its framework is: a model with a framework's neurons can't exist before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys

from torch import nn

FRAMEWORKS = ("spikingjelly", "snntorch")
_NEURON_BASES = ("BaseNode", "SimpleBaseNode", "SpikingRNNCellBase", "SpikingNeuron")


def load_adapters() -> None:
    """Import the adapter of each framework that the program has imported."""
    for framework in FRAMEWORKS:
        if framework in sys.modules:
            importlib.import_module(f"snn_reversible_plugin.{framework}")


def register() -> list[str]:
    """Put the reversible neuron types into the namespaces of the installed frameworks.

    Afterwards ``spikingjelly.activation_based.neuron.RevLIFNode`` and ``snntorch.RevLeaky`` (and their
    siblings) exist, for code that looks neuron types up by name.

    Returns:
        The frameworks that were found.

    Raises:
        ImportError: none of them is installed.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> "spikingjelly" in srp.register()
        True
        >>> from spikingjelly.activation_based import neuron
        >>> neuron.RevLIFNode(tau=2.0, step_mode="m").tau
        2.0
    """
    found = [name for name in FRAMEWORKS if importlib.util.find_spec(name) is not None]
    if not found:
        raise ImportError(
            "neither SpikingJelly nor snnTorch is installed; "
            "pip install snn-reversible-plugin[spikingjelly] or [snntorch]"
        )
    for framework in found:
        importlib.import_module(f"snn_reversible_plugin.{framework}").register()
    return found


def is_spiking(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron of a known framework, by its base class."""
    return _is_neuron_type(type(module))  # type: ignore[arg-type]


@functools.cache
def _is_neuron_type(stock_type: type[nn.Module]) -> bool:
    return any(
        cls.__module__.partition(".")[0] in FRAMEWORKS and cls.__name__ in _NEURON_BASES
        for cls in stock_type.__mro__
    )
