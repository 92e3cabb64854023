"""What is known of SpikingJelly's neurons: a row a type, and which type's dynamics an instance has.

The one idea: a neuron is known by the SpikingJelly class whose dynamics it has, which a user's subclass may
have too. A row holds in every release that has a type of its name. Source: the neurons of SpikingJelly 2.0,
0.0.0.0.14 and 0.0.0.0.12, read one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from snn_reversible_plugin.modules.kinds import spikingjelly_root
from snn_reversible_plugin.modules.registry import Row, rows_of
from snn_reversible_plugin.spikingjelly.copies import Copy

_BATCH_NORM = "its forward updates batch-norm statistics"
_NOISE = "its forward moves on in a sequence of noise"
_DSR = "its own backward needs its input only, which the tape stores anyway"

# Equations are called as SpikingJelly calls their operators.
_NAMED = (
    Row("IFNode", equations="IF", fires=True, pointwise=True, on_grid=True),
    Row("LIFNode", equations="LIF", fires=True, pointwise=True, on_grid=True),
    Row("ParametricLIFNode", equations="PLIF", fires=True, on_grid=True),
    Row("MultiStepIFNode", equations="IF", fires=True),
    Row("MultiStepLIFNode", equations="LIF", fires=True),
    Row("MultiStepParametricLIFNode", equations="PLIF", fires=True),
    Row("MultiStepEIFNode", fires=True),
    Row("BaseNode", family=True),
    Row("SimpleBaseNode", family=True),
    Row("SimpleIFNode", fires=True),
    Row("SimpleLIFNode", fires=True),
    Row("QIFNode", fires=True, pointwise=True),
    Row("EIFNode", fires=True, pointwise=True, exponential=True),
    Row("IzhikevichNode", fires=True, pointwise=True),
    Row("RAFNode", fires=True, pointwise=True),
    Row("CUBALIFNode", fires=True, pointwise=True),
    Row("HalfThresholdIFNode", fires=True, pointwise=True),
    Row("TernaryIFNode", graded=True, pointwise=True),
    Row("TernaryLIFNode", graded=True, pointwise=True),
    Row("ILIFNode", graded=True, pointwise=True),
    Row("KLIFNode", fires=True),
    Row("GatedLIFNode", fires=True, family=True),
    Row("ComplementaryLIFNode", fires=True),
    Row("ActivationAwareIFNode", fires=True, family=True),
    Row("SLTTLIFNode", fires=True),
    Row("OTTTLIFNode", fires=True),
    Row("PSN", fires=True, family=True),
    Row("MaskedPSN", fires=True, family=True),
    Row("SlidingPSN", fires=True, family=True),
    Row("FewSpikeNode", graded=True, family=True),
    Row("HGNode", graded=True),
    Row("OutlierAwareThresholdNode", graded=True),
    Row("FlexSN", family=True),
    Row("MPBNBaseNode", stays=_BATCH_NORM),
    Row("NoisyBaseNode", stays=_NOISE),
    Row("NoisyNonSpikingBaseNode", stays=_NOISE),
    Row("ILCBaseNode", stays="its forward writes into its input"),
    Row("STBIFNode", stays="it is for inference and has no gradient"),
    Row("DSRIFNode", stays=_DSR),
    Row("DSRLIFNode", stays=_DSR),
    Row("NonSpikingBaseNode", stays="its equation is linear, so autograd keeps nothing of it"),
)
ROWS: dict[type[nn.Module], Row] = {}
_UNKNOWN = Row("")

# What a subclass may define over a neuron and still have that neuron's dynamics.
_HARMLESS = {
    "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__firstlineno__",
    "__static_attributes__", "__dict__", "__weakref__", "__repr__", "__str__", "__annotate_func__",
    "__annotations_cache__", "__reduce_ex__", "__reduce__", "extra_repr", "reset",
}  # fmt: skip
# What a step reads of a neuron, and an instance has.
_SETTINGS = {"v", "v_threshold", "v_reset", "detach_reset", "tau", "decay_input", "w", "surrogate_function",
             "training"}  # fmt: skip
# Through these a neuron is called; a functional forward has no side effects by SpikingJelly's contract.
_ENTRIES = {"__call__", "forward", "functional_forward", "single_step_forward", "multi_step_forward"}


def add_rows(copy: Copy) -> dict[type[nn.Module], Row]:
    """The rows of a copy's types, which are known from now on."""
    rows = rows_of(copy.neuron, _NAMED)
    ROWS.update(rows)
    return rows


def equations_of(module: nn.Module) -> Any:
    """Whose operator a neuron's dynamics are those of: "IF", "LIF", "PLIF", or None."""
    row = ROWS.get(_dynamics.get(type(module)))  # type: ignore[arg-type]  # asked in each step of a loop
    return (row_of(module) if row is None else row).equations


def row_of(module: nn.Module) -> Row:
    """What is known of a neuron's dynamics; a row without a name where nothing is."""
    return ROWS.get(dynamics_of(type(module)), _UNKNOWN)


# What older releases keep among the states, and no step changes.
_NO_STATES = {"v", "v_threshold", "v_reset", "v_seq"}


def states_beside_v(module: Any) -> list[str]:
    """The names of what a neuron's steps may change beside its membrane."""
    return sorted(module._memories.keys() - _NO_STATES)


def stores_v_seq(module: Any) -> bool:
    """Whether a neuron, as it is set now, keeps the membranes of all steps, as 0.0.0.0.12 does."""
    return bool(getattr(module, "store_v_seq", "v_seq" in module._memories))


def dynamics_of(cls: type) -> Any:
    """The SpikingJelly class whose dynamics an instance has; None if a subclass overrides any."""
    if cls not in _dynamics:
        _dynamics[cls] = _dynamics_of(cls)
    return _dynamics[cls]


_dynamics: dict[type, type | None] = {}


def _dynamics_of(cls: type) -> type | None:
    return None if overridden(cls) else origin_of(cls)


def origin_of(cls: type) -> type | None:
    """The SpikingJelly class that a class is or derives from; None for any other."""
    return _origin_of(cls)[0]


def overridden(cls: type) -> set[str]:
    """What a user's classes define anew of the dynamics of the SpikingJelly class that they derive from."""
    base, own = _origin_of(cls)
    if base is None:
        return set()
    return (own & (set(dir(base)) - _HARMLESS)) | {name for name in own & _SETTINGS if _computes(cls, name)}


def _computes(cls: type, name: str) -> bool:
    """Whether an attribute is a property of a user's: another value at each step, for all that is known."""
    found = next((base for base in cls.__mro__ if name in vars(base)), cls)
    is_torchs = found.__module__.startswith("torch.")  # a parametrization, which computes it the same way
    return hasattr(type(vars(found).get(name)), "__set__") and not is_torchs


def replaced_methods(module: nn.Module) -> set[str]:
    """The methods that an instance has in place of its class's: what they do is not known, and to whom."""
    return _methods_of(type(module)) & module.__dict__.keys()


def _find_methods(cls: type) -> set[str]:
    """But for those that say nothing of its steps; a ``forward`` of an instance's own runs before ours."""
    origin = origin_of(cls)
    methods = {name for name in dir(origin) if callable(getattr(origin, name))}
    return methods - _HARMLESS - set(dir(nn.Module))


_methods_of: Callable[[Any], set[str]] = functools.cache(_find_methods)


def own_entries(cls: type) -> set[str]:
    """The ways to call a neuron that a user's classes define anew."""
    return _ENTRIES & _origin_of(cls)[1]


def _origin_of(cls: type) -> tuple[type | None, set[str]]:
    """The SpikingJelly class that a class is or derives from, and what a user's classes define over it."""
    own: set[str] = set()
    for base in cls.__mro__:
        if spikingjelly_root(base):
            return base, own
        if base.__module__.partition(".")[0] != __name__.partition(".")[0]:
            own |= vars(base).keys()
    return None, own
