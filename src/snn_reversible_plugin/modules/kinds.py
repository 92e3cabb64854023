"""The frameworks that have an adapter: which modules are theirs, which are neurons, where states are.

The one idea: a framework is one object, and whoever needs to know asks it. Nothing of a framework is
imported for that: a class is recognized by where it comes from, also if it is from a copy that somebody has
put into another package. An adapter is imported once its framework is: a model with a framework's neurons
can't exist before.

Source: ``base`` and ``neuron`` of SpikingJelly 0.0.0.0.12, 0.0.0.0.14 and 2.0; ``snntorch/_neurons`` 1.0.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
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
        states_in: the attribute with the table in which a module keeps its states.
        with_constants: that table holds more than states.
        states: their names there; empty for any.
        reset_by: the method of a module that makes it fresh.
    """

    name: str
    neuron_bases: frozenset[str]
    takes_states = False
    has_step_modes = False
    records: tuple[str, ...] = ()
    states_in: str = ""
    with_constants = False
    states: tuple[str, ...] = ()
    reset_by: str = "reset"

    def owns(self, cls: type) -> bool:
        """Whether a class is the framework's own, by the module that it is from."""
        return cls.__module__.partition(".")[0] == self.name

    def copies(self) -> list[str]:
        """The packages under which the program has imported it."""
        return [self.name] if self.name in sys.modules else []

    def load(self, copy: str) -> None:
        """Make the adapter know the neurons of one of the copies."""
        importlib.import_module(f"snn_reversible_plugin.{self.name}")

    def is_spiking(self, cls: type) -> bool:
        """Whether instances of a class are spiking neurons, by its base class."""
        return any(self.owns(base) and base.__name__ in self.neuron_bases for base in cls.__mro__)

    def is_neuron(self, cls: type) -> bool:
        """Whether they have a neuron's dynamics, be they spiking neurons or not."""
        return self.is_spiking(cls)

    def states_of(self, module: nn.Module) -> Table | None:
        """The table in which a module keeps its states, constants perhaps among them; None without any."""
        raise NotImplementedError

    def reset(self, module: nn.Module) -> None:
        """Make a module that has states fresh."""
        raise NotImplementedError

    def resets_itself(self, cls: type) -> bool:
        """Whether what makes a neuron type fresh is the framework's, and no override."""
        return getattr(getattr(cls, self.reset_by, None), "__module__", "").startswith(self.name)

    def scratch_of(self, cls: type) -> tuple[str, ...]:
        """Attributes that a step of a neuron type writes before it reads them."""
        return ()

    def is_multi_step(self, module: nn.Module) -> bool:
        """Whether a module, as it is set now, takes all time steps in one call."""
        return False

    def is_never_stepped(self, module: nn.Module) -> bool:
        """Whether a module's result at one time step needs the inputs of others."""
        return False

    def spikes_of(self, output: Any) -> Tensor:
        """The spikes in what a neuron returns."""
        return output if isinstance(output, Tensor) else output[0]  # type: ignore[no-any-return]


_HOMES = ("activation_based", "clock_driven")  # where SpikingJelly's releases have their neurons


def spikingjelly_root(cls: type) -> str:
    """The package of a copy of SpikingJelly that a class is from, up to its home; empty for any other.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> from snn_reversible_plugin.modules.kinds import spikingjelly_root
        >>> spikingjelly_root(neuron.LIFNode)
        'spikingjelly.activation_based'
    """
    parts = cls.__module__.split(".")
    for home in _HOMES:
        if home in parts:
            root = ".".join(parts[: parts.index(home) + 1])
            if hasattr(sys.modules.get(f"{root}.base"), "MemoryModule"):
                return root
    return ""


class _SpikingJelly(Framework):
    """Stateful modules derive from ``MemoryModule``, which keeps its states in a table of its own."""

    name = "spikingjelly"
    neuron_bases = frozenset({"BaseNode", "SimpleBaseNode", "SpikingRNNCellBase"})
    has_step_modes = True
    records = ("v_seq", "state_seqs")
    states_in = "_memories"

    def owns(self, cls: type) -> bool:
        return super().owns(cls) or bool(spikingjelly_root(cls))

    def copies(self) -> list[str]:
        ends = tuple(f".{home}.neuron" for home in _HOMES)
        found = (name.removesuffix(".neuron") for name in list(sys.modules) if name.endswith(ends))
        return [root for root in found if hasattr(sys.modules.get(f"{root}.base"), "MemoryModule")]

    def load(self, copy: str) -> None:
        importlib.import_module(f"snn_reversible_plugin.{self.name}.adapter").load(copy)

    def is_neuron(self, cls: type) -> bool:
        # Some are not derived from one of the base neurons.
        return self.is_spiking(cls) or any(
            issubclass(base, nn.Module) and base.__module__.startswith(f"{root}.neuron")
            for base in cls.__mro__
            if (root := spikingjelly_root(base))
        )

    def states_of(self, module: nn.Module) -> Table | None:
        memories = module.__dict__.get(self.states_in)
        return memories if isinstance(memories, dict) else None

    def reset(self, module: nn.Module) -> None:
        module.reset()  # type: ignore[operator]

    def is_multi_step(self, module: nn.Module) -> bool:
        mode = getattr(module, "step_mode", None)
        if mode is not None:
            return bool(mode == "m")
        # In 0.0.0.0.12 it is a type.
        return any(
            base.__name__.startswith("MultiStep") for base in type(module).__mro__ if self.owns(base)
        )

    def is_never_stepped(self, module: nn.Module) -> bool:
        modes = getattr(module, "supported_step_mode", lambda: ())()
        container = isinstance(module, nn.Sequential) or "ThresholdDependent" in type(module).__name__
        return tuple(modes) == ("m",) and not container


class _SnnTorch(Framework):
    """Neurons keep their states among their buffers, beside their constants."""

    name = "snntorch"
    neuron_bases = frozenset({"SpikingNeuron"})
    takes_states = True
    states_in = "_buffers"
    with_constants = True
    states = ("mem", "syn", "syn_exc", "syn_inh", "spk")
    reset_by = "reset_mem"

    def states_of(self, module: nn.Module) -> Table | None:
        return module._buffers if self.is_spiking(type(module)) else None

    def scratch_of(self, cls: type) -> tuple[str, ...]:
        if not self.is_spiking(cls):
            return ()
        homes = (getattr(cls, name).__module__.partition(".")[0] for name in ("forward", "mem_reset"))
        return ("reset",) if {*homes} <= {self.name, __name__.partition(".")[0]} else ()

    def reset(self, module: nn.Module) -> None:
        if forget := getattr(module._buffers, "forget", None):  # what is promised need not be computed
            forget()
        for name in self.states:
            if isinstance(state := module._buffers.get(name), Tensor):
                module._buffers[name] = state.new_zeros(())
        module.__dict__.pop("reset", None)  # spikes that reset it, which its next step makes anew


FRAMEWORKS: tuple[Framework, ...] = (_SpikingJelly(), _SnnTorch())
RECORDS = frozenset(name for framework in FRAMEWORKS for name in framework.records)


def framework_of(module: nn.Module) -> Framework | None:
    """The framework that a module's class is from or derives from, the nearest; None for any other."""
    return _framework_of(type(module))  # type: ignore[arg-type]


@functools.cache
def _framework_of(cls: type) -> Framework | None:
    found = (framework for base in cls.__mro__ for framework in FRAMEWORKS if framework.owns(base))
    return next(found, None)


def scratch_of(module: nn.Module) -> tuple[str, ...]:
    """Attributes that each step of a module writes before it reads them: no state, and in no second run."""
    return _scratch_of(type(module))  # type: ignore[arg-type]


@functools.cache
def _scratch_of(cls: type) -> tuple[str, ...]:
    framework = _framework_of(cls)
    return () if framework is None else framework.scratch_of(cls)


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


def own_neuron_types(model: nn.Module) -> str:
    """For a message: the types of a model that are called as neurons are, in brackets; empty without any.

    A repository's own, or copied with the base classes of a framework.

    Example:
        >>> class OnlineIFNode(nn.Module): ...
        >>> own_neuron_types(nn.Sequential(nn.Linear(2, 2), OnlineIFNode()))
        ' (OnlineIFNode)'
    """
    types = {type(module): None for module in model.modules()}
    names = [cls.__name__ for cls in types if any(_NEURON.search(base.__name__) for base in cls.__mro__)]
    return f" ({', '.join(names)})" if names else ""


_NEURON = re.compile(r"IF(?![a-z])|Neuron|Node$")


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
    """Let each framework's adapter know the copies of it that the program has imported."""
    for framework in FRAMEWORKS:
        for copy in framework.copies():
            if copy in _unusable:
                continue
            try:
                framework.load(copy)
            except Exception as error:
                # One framework's trouble is none of the other's.
                _unusable.add(copy)
                version = getattr(sys.modules.get(framework.name), "__version__", "")
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
            "pip install 'snn-reversible-plugin[spikingjelly]', or [snntorch]"
        )
    for framework in found:
        importlib.import_module(f"snn_reversible_plugin.{framework}").register()
    return found
