"""The frameworks that have an adapter: which modules are theirs, which are neurons, where states are.

The one idea: a framework is one object, and whoever needs to know asks it. Nothing of a framework is
imported for that: a class is recognized by where it comes from. An adapter is imported once its framework
is: a model with a framework's neurons can't exist before.

Source: ``spikingjelly.activation_based.base`` and ``.neuron`` 2.0; ``snntorch/_neurons`` 1.0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from typing import Any

from torch import Tensor, nn

Table = dict[str, Any]


class Framework:
    """What is known of a framework's modules.

    Attributes:
        name: of its package, of its adapter and of the extra that installs it.
        neuron_bases: names of the classes that its spiking neurons derive from.
        takes_states: a neuron may be called with its states, and returns them.
        has_step_modes: a neuron can be told to run all time steps in one call.
        records: attributes in which a neuron writes down past steps; no step reads them.
        own_states: the attribute with the table in which a module keeps its states and nothing else.
    """

    name: str
    neuron_bases: frozenset[str]
    takes_states = False
    has_step_modes = False
    records: tuple[str, ...] = ()
    own_states: str = ""

    def is_spiking(self, cls: type) -> bool:
        """Whether instances of a class are spiking neurons, by its base class."""
        return any(is_from(base, self.name) and base.__name__ in self.neuron_bases for base in cls.__mro__)

    def is_neuron(self, cls: type) -> bool:
        """Whether they have a neuron's dynamics, be they spiking neurons or not."""
        return self.is_spiking(cls)

    def states_of(self, module: nn.Module) -> Table | None:
        """The table in which a module keeps its states, constants perhaps among them; None without any."""
        raise NotImplementedError

    def reset(self, module: nn.Module) -> None:
        """Make a module that has states fresh."""
        raise NotImplementedError

    def is_multi_step(self, module: nn.Module) -> bool:
        """Whether a module, as it is set now, takes all time steps in one call."""
        return False

    def is_never_stepped(self, module: nn.Module) -> bool:
        """Whether a module's result at one time step needs the inputs of others."""
        return False

    def spikes_of(self, output: Any) -> Tensor:
        """The spikes in what a neuron returns."""
        return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]


class _SpikingJelly(Framework):
    """Stateful modules derive from ``MemoryModule``, which keeps its states in a table of its own."""

    name = "spikingjelly"
    neuron_bases = frozenset({"BaseNode", "SimpleBaseNode", "SpikingRNNCellBase"})
    has_step_modes = True
    records = ("v_seq", "state_seqs")
    own_states = "_memories"

    def is_neuron(self, cls: type) -> bool:
        # Some are not derived from one of the base neurons.
        home = "activation_based.neuron."
        return self.is_spiking(cls) or any(
            is_from(base, self.name) and base.__module__.partition(".")[2].startswith(home)
            for base in cls.__mro__
        )

    def states_of(self, module: nn.Module) -> Table | None:
        memories = module.__dict__.get(self.own_states)
        return memories if isinstance(memories, dict) else None

    def reset(self, module: nn.Module) -> None:
        module.reset()  # type: ignore[operator]

    def is_multi_step(self, module: nn.Module) -> bool:
        return getattr(module, "step_mode", "s") == "m"

    def is_never_stepped(self, module: nn.Module) -> bool:
        modes = getattr(module, "supported_step_mode", lambda: ())()
        container = isinstance(module, nn.Sequential) or "ThresholdDependent" in type(module).__name__
        return tuple(modes) == ("m",) and not container


class _SnnTorch(Framework):
    """Neurons keep their states among their buffers, beside their constants."""

    name = "snntorch"
    neuron_bases = frozenset({"SpikingNeuron"})
    takes_states = True
    states = ("mem", "syn", "syn_exc", "syn_inh", "spk")

    def states_of(self, module: nn.Module) -> Table | None:
        return module._buffers if self.is_spiking(type(module)) else None

    def reset(self, module: nn.Module) -> None:
        for name in self.states:
            if isinstance(state := module._buffers.get(name), Tensor):
                module._buffers[name] = state.new_zeros(())


FRAMEWORKS: tuple[Framework, ...] = (_SpikingJelly(), _SnnTorch())
RECORDS = frozenset(name for framework in FRAMEWORKS for name in framework.records)


def is_from(cls: type, framework: str) -> bool:
    """Whether a class is a framework's own: the one place that knows where they come from."""
    return cls.__module__.partition(".")[0] == framework


def framework_of(module: nn.Module) -> Framework | None:
    """The framework that a module's class is from or derives from, the nearest; None for any other."""
    return _framework_of(type(module))  # type: ignore[arg-type]


@functools.cache
def _framework_of(cls: type) -> Framework | None:
    found = (framework for base in cls.__mro__ for framework in FRAMEWORKS if is_from(base, framework.name))
    return next(found, None)


def is_spiking(module: nn.Module) -> bool:
    """Whether a module is a spiking neuron of a known framework, by its base class."""
    return _is_spiking(type(module))  # type: ignore[arg-type]


@functools.cache
def _is_spiking(cls: type) -> bool:
    return any(framework.is_spiking(cls) for framework in FRAMEWORKS)


def is_neuron(module: nn.Module) -> bool:
    """Whether a module is a neuron of a known framework, spiking or not."""
    framework = framework_of(module)
    return framework is not None and framework.is_neuron(type(module))


def is_multi_step(module: nn.Module) -> bool:
    """Whether a module of a known framework, as it is set now, takes all time steps in one call."""
    framework = framework_of(module)
    return framework is not None and framework.is_multi_step(module)


def spikes_of(neuron: nn.Module, output: Any) -> Tensor:
    """The spikes in what a spiking neuron returned."""
    framework = framework_of(neuron)
    assert framework is not None, f"{type(neuron).__name__} is no neuron of a known framework"
    return framework.spikes_of(output)


def load_adapters() -> None:
    """Import the adapter of each framework that the program has imported."""
    for framework in FRAMEWORKS:
        if framework.name in sys.modules and framework.name not in _unusable:
            try:
                importlib.import_module(f"snn_reversible_plugin.{framework.name}")
            except (ImportError, AttributeError) as error:
                # One framework's trouble is none of the other's.
                _unusable.add(framework.name)
                version = getattr(sys.modules[framework.name], "__version__", "of unknown version")
                warnings.warn(
                    f"{framework.name} {version}: its neurons stay stock, because this release lacks what "
                    f"their reversible types are made of ({error}). The tape records them all the same.",
                    stacklevel=3,
                )


_unusable: set[str] = set()


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
    found = [one.name for one in FRAMEWORKS if importlib.util.find_spec(one.name) is not None]
    if not found:
        raise ImportError(
            "neither SpikingJelly nor snnTorch is installed; "
            "pip install snn-reversible-plugin[spikingjelly] or [snntorch]"
        )
    for framework in found:
        importlib.import_module(f"snn_reversible_plugin.{framework}").register()
    return found
