"""What a user's class writes itself of a neuron, and all that this reads.

The one idea: of a class that writes the charge, the fire, the reset or the whole step itself, and nothing
else of what it derives from, something can be proved (:mod:`.written_out`), if that code reads numbers, the
membrane, ``w`` and the surrogate, and sets the membrane.

Source: ``BaseNode`` and ``SimpleBaseNode`` of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from snn_reversible_plugin.neurons.own.code import MISSING, Unprovable, in_class
from snn_reversible_plugin.neurons.own.reads import Reads, behind, entry
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


# What a neuron has in tables, which a class would come before.
_IN_TABLES = ("v", "surrogate_function", "w")
# What its step is called by, and calls.
_CALLED = (*PHASES, "single_step_functional_forward", "multi_step_functional_forward",
           "single_step_forward", "multi_step_forward", "forward")  # fmt: skip


def find_claim(cls: type) -> Claim | None:
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
    if not own:  # sequences that are steps, which are the release's
        return None
    if step in own and name == base.__name__:
        own -= phases  # those that it calls are looked through with it
        phases = {step}
    elif claim.equations is None and "neuronal_charge" not in own:
        return None
    return claim._replace(own=tuple(sorted(own))) if own <= phases else None


claim_of: Callable[[Any], Claim | None] = functools.cache(find_claim)


def own_sequences(cls: type, copy: Copy) -> bool:
    """Whether, in 2.0, a class's sequences are its steps, and no operator of what it derives from."""
    name = "multi_step_functional_forward"
    return in_class(cls, name) is in_class(copy.base.MemoryModule, name)


class StepReads(Reads):
    """What the step of a neuron reads beside its current and its membrane."""

    def __init__(self, module: Any, copy: Copy) -> None:
        cls: Any = behind(type(module))
        claim = find_claim(cls)  # anew: a class may have got more since
        if claim is None:
            raise Unprovable("more than its step is its own")
        self._looks, self._seen = [], set()
        self._neuron, self.claim, self.is_scripted = weakref.ref(module), claim, copy.is_scripted
        for name in _IN_TABLES:
            if in_class(cls, name) is not MISSING:
                raise Unprovable(f"its class has a {name}")
            self.in_class_alone(module, name, MISSING)
        for name in _CALLED:
            self.look_in_class(module, name, in_class(cls, name))
        for name in claim.own:
            self._method(module, cls, name)
        memories = entry(module, "_memories")
        self.look(lambda: tuple(memories()), tuple(module._memories))
        self.finish()

    def is_state(self, module: nn.Module, name: str) -> bool:
        return name == "v" and module is self._neuron()

    def attribute(self, module: nn.Module, cls: type[nn.Module], name: str) -> Any:
        if module is not self._neuron():  # a part of it
            return super().attribute(module, cls, name)
        tables = module.__dict__
        if name == "surrogate_function" and name in tables["_modules"]:
            # Any one, for another stands in its place; how it is set now is its own proof's part.
            return tables["_modules"][name]
        if name == "w" and isinstance(tables["_parameters"].get(name), nn.Parameter):
            return MISSING
        if name in (*PHASES, "v_float_to_tensor") and name not in written_by(cls, self.claim.base):
            self._stocks(module, cls, name)
            return MISSING
        if name in tables["_memories"] and in_class(cls, name) is MISSING:
            self.look_in_class(module, name, MISSING)
            return self.read(entry(module, name, "_memories"), f"self.{name}")
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
