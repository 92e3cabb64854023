"""IFNode, LIFNode and ParametricLIFNode, stepped one time step at a time, on the dyadic grid.

The one idea: a mixin in front of the analytic neuron types whose single step is one on the grid. In
multi-step mode they are what they were.

Source: ``spikingjelly.activation_based.neuron`` 2.0.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid.decays import NONE, Step, decay_of
from snn_reversible_plugin.modules.swap import SwappedClass, parts_of
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.integrate_fire import Plan, reference, step
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd, is_heaviside
from snn_reversible_plugin.spikingjelly.types import ROWS, dynamics_of


def why_not(module: Any, kind: Any) -> str | None:
    """Why a neuron with the dynamics ``kind``, as it is set now, has no step on the grid, or None."""
    if module._step_mode != "s":
        return "it runs all time steps in one call"
    if kind not in ROWS or not ROWS[kind].on_grid:
        return "its equations are not written for the grid"
    if not is_heaviside(module.surrogate_function or _SIGMOID):
        return "its surrogate is not one of SpikingJelly's own spiking ones"
    if (
        not isinstance(module.v_threshold, float)
        or not (module.v_reset is None or isinstance(module.v_reset, float))
        or module._neuron_precision is not None
        or (kind is neuron.LIFNode and not isinstance(module.tau, float))
        or module.store_v_seq
        or len(module._memories) != 1
    ):
        return "it has settings that are not written for the grid"
    return None


class OnGrid(SwappedClass):
    """In front of an analytic neuron: its single steps are reversible in time.

    An attribute ``grid_bits`` of the neuron sets the grid's binary digits behind the point, 16 by default.
    """

    @property
    def arithmetic(self: Any) -> str:
        """Which guarantee holds, with the settings of now."""
        return "stock" if why_not(self, _kind(self)) else "grid"

    @property
    def treatment(self: Any) -> str:
        """What the backward does, for reports."""
        return "reversed in time" if self.arithmetic == "grid" else super().treatment  # type: ignore[misc]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """One time step, or all of them in multi-step mode."""
        if (
            len(args) != 1
            or kwargs
            or type(args[0]) not in (Tensor, nn.Parameter)
            or not tape.runs_eagerly()
            or why_not(self, _kind(self)) is not None
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _forward(self, args[0])


def _kind(module: Any) -> Any:
    for cls in type(module).__mro__:
        parts = parts_of(cls)
        if parts is not None and parts.mixin is OnGrid:
            return dynamics_of(parts.base)
    return dynamics_of(type(module))


def _forward(module: Any, x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.dtype is torch.float64:
        raise TypeError(
            f"{switches.name_of(module)}: a step on the grid takes float32 or half precision, not "
            f'{x.dtype}; convert with arithmetic="stock" for others'
        )
    v = module._memories["v"]
    if not isinstance(v, Tensor) or v.shape != x.shape:
        start = v if isinstance(v, float) else (module.v_reset or 0.0)
        v = torch.full_like(x, start, dtype=torch.float32)
    kind = _kind(module)
    beta, rest = None, module.v_reset or 0.0
    if kind is neuron.ParametricLIFNode:
        q = module.w.float().sigmoid()
        beta = 1 - q
        if module.decay_input:
            x = (x + rest if rest else x) * q
        elif rest:
            x = x + rest * q
    elif kind is neuron.LIFNode and rest:
        x = x + (rest if module.decay_input else rest / module.tau)
    plan = _plan(module, kind, beta)
    if switches.by_autograd():
        fire = module.surrogate_function or _SIGMOID
        decayed = plan.beta if beta is None else beta
        s, v = reference(x, v, decayed, plan.rule, fire, plan.step.gain, plan.bits)
    else:
        s, v = step(plan, x, v, beta)
    module._memories["v"] = v
    return s


_SIGMOID = surrogate.Sigmoid()
_plans: weakref.WeakKeyDictionary[Any, tuple[Any, Plan]] = weakref.WeakKeyDictionary()


def _plan(module: Any, kind: Any, beta: Tensor | None) -> Plan:
    """A neuron's plan, made again when a parameter or a setting changed."""
    w = module.w if kind is neuron.ParametricLIFNode else None
    tau = module.tau if kind is neuron.LIFNode else None
    function = module.surrogate_function or _SIGMOID
    bits = switches.bits_of(module)
    settings = (
        module.v_threshold, module.v_reset, bool(module.detach_reset), tau,
        tau is not None and bool(module.decay_input), function, getattr(function, "alpha", None),
        None if w is None else (id(w), w._version), bits,
    )  # fmt: skip
    known = _plans.get(module)
    if known is not None and known[0] == settings:
        return known[1]
    name = f"{switches.name_of(module)}.v"
    factor, gain = 1.0, None
    if beta is not None:
        factor = float(beta.detach())
    elif tau is not None:
        factor = _single(1 - 1 / tau)
        gain = _single(1 / tau) if module.decay_input else None
    theta = _on_grid(module.v_threshold, bits)
    to = None if module.v_reset is None else _on_grid(module.v_reset, bits)
    rule = Rule(None, False, theta, to, bool(module.detach_reset))
    scale = 2.0**bits
    decay = decay_of(factor, factor, factor, name)
    plan = Plan(
        Step(decay, theta * scale, NONE, scale, gain),
        rule,
        as_autograd(function),
        factor,
        name,
        bits,
    )
    _plans[module] = settings, plan
    return plan


def _single(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _on_grid(value: float, bits: int) -> float:
    return round(value * 2**bits) / 2**bits
