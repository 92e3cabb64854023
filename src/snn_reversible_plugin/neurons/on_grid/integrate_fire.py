"""One time step of SpikingJelly's LIF family on the dyadic grid, which a later backward can undo.

The one idea: charge, fire and reset are one autograd function, which saves the charged membrane as a place
on the neuron's :class:`~.neurons.on_grid.timeline.Timeline`, and no tensor. On the grid every charge
reads ``h = decay(v, beta) + snap(gain * x)``: IF with beta = 1, LIF and ParametricLIF with
beta = 1 - 1/tau.
:func:`reference` is the same step written with ordinary operations: the specification.

Source: design section 6; ``spikingjelly.activation_based.neuron`` 2.0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import decay, snap
from snn_reversible_plugin.grid.decays import Step
from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule, fire_reset_vjp
from snn_reversible_plugin.neurons.on_grid.timeline import (
    NewSpikes,
    NewState,
    State,
    Timeline,
    continued,
    rests_on_a_state,
    watched,
)
from snn_reversible_plugin.neurons.rerun import differentiable_once
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops.layouts import flat, is_dense, like
from snn_reversible_plugin.tape.handles import Passing
from snn_reversible_plugin.tape.origins import enter, look_up


@dataclass(frozen=True, eq=False)
class Plan:
    """A neuron's constants. ``rule`` has its threshold and its reset on the grid."""

    step: Step
    rule: Rule
    surrogate: Surrogate
    beta: float
    name: str
    bits: int

    @functools.cached_property
    def stepping(self) -> type[Stepping]:
        """:class:`Stepping` with this plan: an attribute of each node would cost bytes a step."""
        return type("Stepping", (Stepping,), {"plan": self})

    def charged(self, timeline: Timeline, t: int, state: Tensor) -> Tensor:
        """The charged membrane of step t, flat, from the membrane after it."""
        step, to = self.step, self.rule.v_reset
        bits, lost = timeline.bits(t)
        return steps_on(state.device).unreset(state, bits, step.theta, to, step.scale, lost)  # type: ignore

    def gradient(self, h: Tensor, g_s: Tensor | None, g_v: Tensor | None) -> Tensor:
        """That of the charged membrane; not both of the given are None."""
        rule, surrogate, stride = self.rule, self.surrogate, h.stride()
        given = [g for g in (g_s, g_v) if g is not None and g.stride() == stride]
        if len(given) < 2 or (rule.v_reset is None and rule.detach_reset):
            return fire_reset_vjp(h, g_s, g_v, rule, surrogate)
        # The same, with fewer passes over memory.
        g_s, g_v = given
        form, flat_h, flat_g_v = steps_on(h.device), flat(h, stride), flat(g_v, stride)
        if not rule.detach_reset:
            g_s = g_s.clone()
            form.add_through_reset(flat_h, rule.v_threshold, rule.v_reset, flat_g_v, flat(g_s, stride))
        g = surrogate.vjp(g_s, h - rule.v_threshold)
        if rule.v_reset is None:
            return g_v + g
        if g.stride() != stride or g.data_ptr() == g_s.data_ptr():
            g = like(h).copy_(g)
        form.add_past_reset(flat_h, rule.v_threshold, flat_g_v, flat(g, stride))
        return g

    def back(self, timeline: Timeline, t: int, state: Tensor, current: Tensor) -> Tensor:
        """The flat membrane before step t, from the one after it."""
        known, timeline.charged = timeline.charged, None
        h = known[1] if known is not None and known[0] == t else self.charged(timeline, t, state)
        record = timeline.records.record(2 * t - 1)
        return steps_on(state.device).undo(h, current, None, self.step, record)  # type: ignore[no-any-return]


class Charged(State):
    """The charged membrane of step ``t`` of a timeline."""

    __slots__ = ()

    def get(self, last: bool) -> tuple[Tensor, bool]:
        timeline, records = self.timeline, self.timeline.records
        h = timeline.dynamics.charged(timeline, self.t, timeline.state(self.t))  # type: ignore[attr-defined]
        timeline.charged = self.t, h
        return self.verified(h.as_strided(records.size, records.stride), "rebuilding its membrane"), False


class NewCharged(Passing):
    """Leads to a :class:`Charged` of a timeline that is about to take step ``t``."""

    __slots__ = ("t", "timeline")

    def __init__(self, timeline: Timeline, t: int) -> None:
        self.timeline, self.t = timeline, t

    def leads_to(self) -> State:
        return Charged(self.timeline, self.t)


class Stepping(torch.autograd.Function):
    """``plan.stepping.apply([charged, lost, fired, reaches], v, x, beta)`` -> spikes, the membrane after.

    ``charged``: what stands for the charged membrane on the tape; ``lost`` and ``fired`` collect what has
    to be written down. All three are None where nothing is recorded. ``reaches`` collects the largest
    magnitudes. ``beta``: None where it is a constant.
    """

    @staticmethod
    def forward(ctx: Any, sinks: list[Any], v: Tensor, x: Tensor, beta: Tensor | None) -> Any:  # type: ignore[override]
        plan: Plan = ctx._forward_cls.plan
        ctx.set_materialize_grads(False)
        charged, lost, fired, reaches = sinks
        stride, form, rule = v.stride(), steps_on(v.device), plan.rule
        record = lost is not None
        h, s, after = like(v), like(v), like(v)
        flat_h, flat_s = flat(h, stride), flat(s, stride)
        fires = rule.v_threshold, True, flat_s
        digits, reach, bits = form.charge(
            flat(v, stride), flat(x, stride), None, plan.step, record, flat_h, fires
        )
        reaches.append(reach)
        theta, scale = plan.step.theta, plan.step.scale
        resets, reach = form.reset(flat_h, flat_s, theta, rule.v_reset, scale, record, flat(after, stride))
        reaches.append(reach)
        if record:
            lost += digits
            fired += [bits, *resets]
        if charged is not None:
            enter(h, charged)
        # Asking for needs_input_grad here would cost bytes a step.
        ctx.save_for_backward(h, beta, v if beta is not None and beta.requires_grad else None)
        if x.dtype is not torch.float32:
            ctx.dtype = x.dtype
        return s, after

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_s: Tensor | None, g_v: Tensor | None) -> Any:
        plan: Plan = ctx._forward_cls.plan
        h, beta, v = ctx.saved_tensors
        if g_s is None and g_v is None:
            return None, None, None, None
        _, of_v, of_x, of_beta = ctx.needs_input_grad
        g = plan.gradient(h, g_s, g_v)
        by_v = by_x = by_beta = None
        if of_v:
            by_v = g * (plan.beta if beta is None else beta)
        if of_x:
            by_x = g.to(getattr(ctx, "dtype", torch.float32))
            if plan.step.gain is not None:
                by_x = by_x * plan.step.gain
        if of_beta:
            by_beta = (g * v).sum_to_size(beta.shape).to(beta.dtype)
        return None, by_v, by_x, by_beta


def step(plan: Plan, x: Tensor, v: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spikes and the membrane after one step on the grid, on a timeline where a tape records.

    Raises:
        OverflowError: the membrane left the range in which the grid is exact.
    """
    needs = x.requires_grad or v.requires_grad or (beta is not None and beta.requires_grad)
    recorded = needs and tape.is_recording()
    timeline = continued(v, plan) if recorded else None
    handle = None
    if recorded:
        handle = tape.keep(x) if rests_on_a_state(look_up(x)) else tape.pack(x)
    with tape.paused():
        if timeline is None:
            v = snap(v, plan.bits)
            if not is_dense(v):
                v = v.contiguous()
            tape.mark_opaque(v)
        if recorded and timeline is None:
            timeline = Timeline(plan, v, plan.name)
            timeline.fired([])
        reaches: list[Any] = []
        sinks: list[Any] = [None, None, None, reaches]
        if timeline is not None:
            t = timeline.length + 1  # one object for all handles
            sinks = [NewCharged(timeline, t), [], [], reaches]
        s, after = plan.stepping.apply(sinks, v, x, beta)
        # A potential out of range may be back after the reset, but what came before it is lost.
        charged, reset = (watched(reach, plan.name, plan.bits) for reach in reaches)
        reach = None if charged is None or reset is None else torch.maximum(charged, reset)
        if timeline is None:
            tape.mark_opaque(after)
            tape.mark_spikes(s)
        else:
            assert handle is not None
            timeline.step(handle, tape.keep(after), reach, sinks[1])
            timeline.fired(sinks[2])
            enter(after, NewState(timeline, t))
            enter(s, NewSpikes(timeline, t))
    return s, after


def reference(
    x: Tensor,
    v: Tensor,
    beta: Tensor | float,
    rule: Rule,
    fire: Any,
    gain: float | None = None,
    bits: int = 16,
) -> tuple[Tensor, Tensor]:
    """:func:`step` written with operations that autograd differentiates; ``rule`` as in a plan."""
    h = decay(snap(v, bits), beta, bits) + snap(x if gain is None else x.float() * gain, bits)
    s = fire(h - rule.v_threshold)
    reset = s.detach() if rule.detach_reset else s
    if rule.v_reset is None:
        v = h - reset * rule.v_threshold
    else:
        v = reset * rule.v_reset + (1.0 - reset) * h
    # As of stock's operators, what comes through the reset is no part of the gradient of the spikes.
    return s.view_as(s), v
