"""IFNode, LIFNode and ParametricLIFNode, stepped one time step at a time, on the dyadic grid.

The one idea: a node is on the grid with the constants that its equations come to there; in multi-step mode
and with what isn't written for the grid it is what it was.

Source: the neurons of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12, whose equations are the same.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import snap_number
from snn_reversible_plugin.modules.kinds import is_multi_step
from snn_reversible_plugin.modules.swap import ON_GRID
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.integrate_fire import (
    IntegrateFire,
    first_membrane,
    integrate_fire,
)
from snn_reversible_plugin.neurons.on_grid.neuron import OffGrid, OnGrid, constants_of, value_of
from snn_reversible_plugin.neurons.on_grid.step import step
from snn_reversible_plugin.neurons.stretch import is_free
from snn_reversible_plugin.neurons.surrogates import Surrogate, of_users
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.spikingjelly.calls import leave, stepped_neurons
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd, hooks_of, is_heaviside, surrogate_of
from snn_reversible_plugin.spikingjelly.types import (
    equations_of,
    replaced_methods,
    row_of,
    states_beside_v,
    stores_v_seq,
)
from snn_reversible_plugin.spikingjelly.written_out import equations_here, of_sample, why_not_same
from snn_reversible_plugin.tape.final_membrane import OfFirstStep
from snn_reversible_plugin.tape.origins import look_up


def why_not(module: Any) -> str | None:
    """Why a neuron, as it is set now, has no step on the grid, or None."""
    if is_multi_step(module):
        return "it runs all time steps in one call"
    if not row_of(module).on_grid and why_not_same(module):
        return "its equations are not written for the grid"
    function = surrogate_of(module)
    if not is_heaviside(function) and isinstance(reason := of_users(function), str):
        return reason
    if not _is_finite(module.v_threshold):
        return f"its threshold is {module.v_threshold}"
    if (
        not (module.v_reset is None or _is_finite(module.v_reset))
        or getattr(module, "_neuron_precision", None) is not None
        or (_equations(module)[0] == "LIF" and not _is_finite(module.tau))
        or stores_v_seq(module)
        or states_beside_v(module)
    ):
        return "it has settings that are not written for the grid"
    return switches.why_too_coarse(module, *_scale(module))


def _scale(node: Any) -> tuple[float, float]:
    return node.v_threshold, node.v_reset or 0.0


def _equations(node: Any) -> tuple[Any, bool]:
    """Which of the three's equations a node has, and whether its input decays."""
    if (equations := equations_of(node)) is not None:
        return equations, bool(getattr(node, "decay_input", False))
    same = of_sample(node)
    return (None, False) if isinstance(same, str) else (same.equations, same.decay_input)


def _equations_here(node: Any, x: Tensor, v: Any) -> tuple[Any, bool]:
    """The same for a call.

    Raises:
        OffGrid: they are not those that its constants were made of.
    """
    if (equations := equations_of(node)) is not None:
        return equations, bool(getattr(node, "decay_input", False))
    here = equations_here(node, x, v)
    if isinstance(here, str):
        raise OffGrid(f"Of this call {here}.")
    if here[:2] != _equations(node):
        raise OffGrid("Of this call another step than of a small input is proved.")
    return here.equations, here.decay_input


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _settings(node: Any) -> tuple[Any, ...]:
    """What a node's constants follow from, but a learned decay's value; the last: if it has one."""
    function, (equations, decay_input) = surrogate_of(node), _equations(node)
    leak = (equations, node.tau if equations == "LIF" else None, decay_input)
    return (
        node.v_threshold, node.v_reset, bool(node.detach_reset), leak, function,
        getattr(function, "alpha", None), switches.bits_of(node), equations == "PLIF",
    )  # fmt: skip


# NOTE [Settings that are found once]
#
# A loop asks at each step what is the same at each: it takes a tenth of a tiny network's step. So what was
# found is kept with the objects that it was read from, and holds as long as these are the very same ones.
# The objects are held, so that none of them can be another with the same id; numbers, names and the
# surrogate, no tensor. Of hooks' dictionaries the same one may have got a hook: they must be empty.


class _Found(NamedTuple):
    """Settings, and what they were found from."""

    settings: Any
    names: tuple[str, ...]
    read: tuple[Any, ...]
    ids: tuple[int, ...]
    tables: list[Any]

    def holds(self, node: Any) -> bool:
        """Whether a node is set as it was."""
        return not any(self.tables) and tuple(map(id, _read(node, self.names))) == self.ids


_found: weakref.WeakKeyDictionary[Any, _Found] = weakref.WeakKeyDictionary()
_FUNCTION = "surrogate_function"
_READ = "step_mode", "v_threshold", "v_reset", "detach_reset"
_OF_SOME = "_neuron_precision", "store_v_seq"  # not in all releases
_OF_EQUATIONS = {"IF": (), "LIF": ("tau", "decay_input"), "PLIF": ("decay_input",)}


def _read(node: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    own, cls = node.__dict__, type(node)
    # Where nn.Module looks last, a tenth of the time; it also knows what to say where there is none.
    function = None if _FUNCTION in own or hasattr(cls, _FUNCTION) else own["_modules"].get(_FUNCTION)
    if function is None:
        function = node.surrogate_function
    return (
        cls, getattr(cls, "grid_bits", None), own.get("grid_bits"), own.get(ON_GRID.attribute), function,
        *map(own.get, _OF_SOME), type(function), *map(getattr, repeat(node), names),
        *node._memories, *vars(function).values(),
    )  # fmt: skip


def _find(node: Any, settings: Any) -> None:
    """Keep what was found of a node, where all that it was found from can be told apart by identity."""
    _found.pop(node, None)
    function = node.surrogate_function
    names = _OF_EQUATIONS.get(equations_of(node))
    if names is None or not (isinstance(function, nn.Module) and is_heaviside(function)):
        return
    names = (*_READ, *names, *[name for name in _OF_SOME if hasattr(node, name)])
    if not all(hasattr(node, name) for name in names):
        return
    read = _read(node, names)
    if not any(isinstance(one, Tensor) for one in read):
        _found[node] = _Found(settings, names, read, tuple(map(id, read)), hooks_of(function))


class NodeOnGrid(OnGrid):
    """In front of an analytic node: its single steps are reversible in time."""

    def grid_settings(self: Any) -> Any:
        """All that the node's constants follow from."""
        found = _found.get(self)
        if found is not None and found.holds(self):
            settings = found.settings
        else:
            settings = why_not(self) or _settings(self)
            _find(self, settings)
        if isinstance(settings, str) or not settings[-1]:
            return settings
        return (*settings, value_of(self.w))

    def fix_grid(self: Any) -> None:
        """By its threshold and its value of reset; a learned decay is that of its membrane."""
        decays = {"v": 1 - self.w.detach().sigmoid()} if hasattr(self, "w") else {}
        if decays and self.w.requires_grad:
            decays["v"].requires_grad_()
        switches.fix(self, _scale(self), decays)

    def states_on_grid(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The membrane."""
        return (self._memories["v"],)

    def step_on_grid(self: Any, settings: Any, *args: Any, **kwargs: Any) -> Any:
        """One step; stock deals with other arguments than one plain tensor."""
        if len(args) != 1 or kwargs or type(args[0]) not in (Tensor, nn.Parameter):
            return NotImplemented
        (x,) = args
        if x.dtype is not torch.float32:
            # Stock gives spikes and membranes the input's dtype.
            raise OffGrid(f"A step on the grid takes float32, not {x.dtype}.")
        v, fresh = self._memories["v"], None
        if replaced := replaced_methods(self):
            raise OffGrid(f"The instance has a {min(replaced)} of its own.")
        equations = _equations_here(self, x, v)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            start = v if isinstance(v, float) else (self.v_reset or 0.0)
            v, fresh = torch.full_like(x, start, dtype=torch.float32), start
        current, parameters = _current(self, x, *equations)
        constants = constants_of(self, "v", settings, _constants, self, parameters)
        first = None if fresh is None else _promise(self, constants, fresh, current)
        stepped = step(constants, current, v, parameters, first=first)
        if first is None or stepped.timeline is None:
            self._memories["v"] = stepped.state
        else:
            leave(self, first, stepped.state)
        return stepped.spikes


def _promise(node: Any, constants: IntegrateFire, start: float, current: Tensor) -> OfFirstStep | None:
    """The promise of the membrane after a fresh neuron's first step, where nobody is known to read it."""
    learns = current.requires_grad and not switches.by_autograd()
    if node in stepped_neurons or not (learns and tape.is_recording() and tape.may_promise()):
        return None
    if not is_free(look_up(current)):
        return None
    run = partial(first_membrane, constants, snap_number(start, constants.bits))
    return OfFirstStep(partial(stepped_neurons.add, node), run, tape.handle_of(current))


def _current(node: Any, x: Tensor, equations: str, decay_input: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is added to the decayed membrane, up to the constants' gain; and the decay, if it is learned."""
    rest = node.v_reset or 0.0
    if equations == "PLIF":
        q = node.w.float().sigmoid()
        if decay_input:
            x = (x + rest if rest else x) * q
        elif rest:
            x = x + rest * q
        return x, (1 - q,)
    if equations == "LIF" and rest:
        x = x + (rest if decay_input else rest / node.tau)
    return x, ()


def _constants(node: Any, parameters: tuple[Tensor, ...]) -> IntegrateFire:
    """Made of a node as it is set now."""
    beta: Any = 1.0
    (equations, decay_input), gain, held = _equations(node), None, parameters
    if parameters:
        beta, held = parameters[0].detach(), (node.w,)
        smallest = switches.smallest_decay(node, "v")
        beta = float(beta) if may_look(beta.device) else (beta, smallest)
    elif equations == "LIF":
        beta = _single(1 - 1 / node.tau)
        gain = _single(1 / node.tau) if decay_input else None
    function = surrogate_of(node)
    return integrate_fire(
        f"{switches.name_of(node)}.v",
        switches.bits_of(node),
        beta,
        gain,
        Rule(None, False, node.v_threshold, node.v_reset, bool(node.detach_reset)),
        replace(_surrogate_of(function), fire=function),
        held,
    )


def _surrogate_of(function: Any) -> Surrogate:
    known = as_autograd(function) if is_heaviside(function) else of_users(function)
    assert isinstance(known, Surrogate)
    return known


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32, device="cpu"))
