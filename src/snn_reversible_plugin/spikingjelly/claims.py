"""What a user's class writes itself of a neuron, and all that this reads.

The one idea: of a class that writes the charge, the fire, the reset or the whole step itself, and nothing else
of what it derives from, something can be proved (:mod:`.written_out`), if that code reads numbers, the
membrane, ``w`` and the surrogate, and sets the membrane.

Source: ``BaseNode`` and ``SimpleBaseNode`` of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

from torch import nn

from snn_reversible_plugin.neurons.own.code import MISSING, Unprovable, in_class
from snn_reversible_plugin.neurons.own.reads import Reads, behind
from snn_reversible_plugin.spikingjelly.copies import Copy, copy_of
from snn_reversible_plugin.spikingjelly.types import origin_of, overridden

PHASES = ("neuronal_charge", "neuronal_fire", "neuronal_reset")


class Claim(NamedTuple):
    """What a class writes itself.

    Attributes:
        own: its charge, fire and reset, those that it has; or its step alone.
        base: the class that it derives from.
        equations: those of ``base``; None where it has none, or some that are not written here.
    """

    own: tuple[str, ...]
    base: Any
    equations: str | None

    @property
    def is_step(self) -> bool:
        """Whether the whole step is the class's own."""
        return self.own[0] not in PHASES

    @property
    def is_simple(self) -> bool:
        """Whether the class derives from 2.0's ``SimpleBaseNode``."""
        return self.base.__name__.startswith("Simple")

    def writes(self, phase: str) -> bool:
        """Whether a part of the step is the class's own."""
        return self.is_step or phase in self.own


_BASES = {"BaseNode": None, "SimpleBaseNode": None, "SimpleIFNode": "IF", "SimpleLIFNode": None,
          "IFNode": "IF", "LIFNode": "LIF", "ParametricLIFNode": "PLIF"}  # fmt: skip


@functools.cache
def claim_of(cls: type) -> Claim | None:
    """What a user's class writes itself; None where nothing could be proved of it, whatever it writes."""
    base, copy = origin_of(cls), copy_of(cls)
    own = overridden(cls)
    if base is None or copy is None or not own:
        return None
    name = base.__name__.removeprefix("MultiStep")
    if name not in _BASES:
        return None
    claim = Claim(("",), base, _BASES[name])
    if copy.has_operators and not claim.is_simple:  # all else is its own business
        step, phases = "single_step_functional_forward", set()
        if own_sequences(cls, copy):
            own.discard("multi_step_functional_forward")
    else:
        step, phases = "single_step_forward" if copy.has_step_modes else "forward", {*PHASES}
    if step in own and name == base.__name__:
        own -= phases  # those that it calls are looked through with it
        phases = {step}
    elif claim.equations is None and "neuronal_charge" not in own:
        return None
    return claim._replace(own=tuple(sorted(own))) if own <= phases else None


def own_sequences(cls: type, copy: Copy) -> bool:
    """Whether, in 2.0, a class's sequences are its steps, and no operator of what it derives from."""
    name = "multi_step_functional_forward"
    return in_class(cls, name) is in_class(copy.base.MemoryModule, name)


class StepReads(Reads):
    """What the step of a neuron reads beside its current and its membrane."""

    states = frozenset({"v"})

    def __init__(self, module: Any, claim: Claim, copy: Copy) -> None:
        self._looks, self._seen = [], set()
        self.claim, self.is_scripted = claim, copy.is_scripted
        cls = behind(type(module))
        for name in claim.own:
            self._method(module, cls, name)
        ref, tables = weakref.ref(module), module.__dict__
        self.look(lambda: tuple(tables["_memories"]), tuple(module._memories))
        self.look(lambda: own_sequences(behind(type(ref())), copy), own_sequences(cls, copy))
        self.finish()

    def attribute(self, module: nn.Module, cls: type[nn.Module], name: str) -> Any:
        tables = module.__dict__
        if name == "surrogate_function" and name in tables["_modules"]:
            # Any one, for another stands in its place; how it is set now is its own proof's part.
            return tables["_modules"][name]
        if name == "w" and isinstance(tables["_parameters"].get(name), nn.Parameter):
            return MISSING
        if name in (*PHASES, "v_float_to_tensor") and name not in written_by(cls, self.claim.base):
            self._stocks(module, cls, name)
            return MISSING
        if name in tables["_memories"]:
            return self.read(lambda: tables["_memories"].get(name, MISSING), f"self.{name}")
        return super().attribute(module, cls, name)

    def _stocks(self, module: nn.Module, cls: type, name: str) -> None:
        if name == "neuronal_charge" and self.claim.equations is None:
            raise Unprovable(f"it calls {self.claim.base.__name__}'s {name}")
        if name in ("neuronal_charge", "neuronal_reset") and self.is_scripted:
            raise Unprovable(f"its step calls {name}, which is scripted")
        self.in_class_alone(module, name, in_class(cls, name))


def written_by(cls: type, base: type) -> set[str]:
    """The names that a class, and those between it and one that it derives from, define."""
    return {name for one in cls.__mro__[: cls.__mro__.index(base)] for name in vars(one)}
