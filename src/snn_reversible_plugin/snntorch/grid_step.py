"""One time step of a snnTorch neuron on the dyadic grid, which a later backward can undo.

The one idea: as in :mod:`.step` a step is two autograd functions, charge and fire; but what they save is
a place on the neuron's :class:`~snn_reversible_plugin.timeline.Timeline`, and no state. :func:`reference`
is the same step written with ordinary operations on the grid: the specification of values and gradients.

Source: design section 6; ``forward`` of ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import gridding, ops, tape
from snn_reversible_plugin.entries import enter, look_up
from snn_reversible_plugin.grid import decay, snap
from snn_reversible_plugin.handles import is_dense
from snn_reversible_plugin.ops.decays import AFTER, BEFORE, NONE, SUBTRACT, Step, decay_of
from snn_reversible_plugin.snntorch.charges import through_clamp
from snn_reversible_plugin.snntorch.surrogates import Derivative
from snn_reversible_plugin.timeline import (
    NewSpikes,
    NewState,
    Timeline,
    continued,
    flat,
    like,
    rests_on_a_state,
    watched,
)


@dataclass(frozen=True, eq=False)
class Plan:
    """A neuron's constants, as long as its parameters are what they are.

    ``theta``: the threshold on the grid, as a tensor of the parameter's shape; ``flat_theta``: a number, or
    float32 [n].
    """

    step: Step
    derivative: Derivative
    theta: Tensor
    flat_theta: Any
    name: str
    versions: tuple[Any, ...]
    bits: int

    @functools.cached_property
    def charging(self) -> type[Charging]:
        """:class:`Charging` with this plan: an attribute of each node would cost bytes a step."""
        return type("Charging", (Charging,), {"plan": self})

    @functools.cached_property
    def firing(self) -> type[Firing]:
        """:class:`Firing` with this plan."""
        return type("Firing", (Firing,), {"plan": self})

    def back(self, timeline: Timeline, t: int, state: Tensor, current: Tensor) -> Tensor:
        """The flat state before step t, from the one after it."""
        bits = None if self.step.reset == NONE else timeline.bits(t - 1)[0]
        record = timeline.records.record(2 * t - 1)
        return ops.steps_on(state.device).undo(state, current, bits, self.step, record)  # type: ignore


_plans: weakref.WeakKeyDictionary[Any, dict[str, Plan]] = weakref.WeakKeyDictionary()


def plan_of(
    neuron: Any, state: str, beta: Tensor, reset: str, derivative: Derivative, example: Tensor
) -> Plan:
    """The plan of one of a neuron's states; made again when a parameter or a setting changed.

    ``example``: a tensor of the states' shape and layout.

    Raises:
        ValueError: a decay that can't be undone.
    """
    threshold, bits = neuron.threshold, gridding.bits_of(neuron)
    each = bool(beta.numel() > 1 or threshold.numel() > 1)
    versions = (
        id(beta), beta._version, id(threshold), threshold._version, reset, derivative, bits, example.device,
        (example.shape, example.stride()) if each else None,
    )  # fmt: skip
    plans = _plans.get(neuron)
    if plans is None:
        plans = _plans[neuron] = {}
    plan = plans.get(state)
    if plan is not None and plan.versions == versions:
        return plan
    name = f"{gridding.name_of(neuron)}.{state}"
    with torch.no_grad():
        clamped = beta.float().clamp(0, 1)
        factor: Any = float(clamped) if clamped.numel() == 1 else _each(clamped, example).double()
        if isinstance(factor, float):
            low = high = factor
        else:
            low, high = (float(end) for end in torch.aminmax(clamped))
        theta = snap(threshold.float(), bits)
        flat_theta: Any = float(theta) if theta.numel() == 1 else _each(theta, example)
        scale = 2.0**bits
        step = Step(decay_of(factor, low, high, name), flat_theta * scale, reset, scale)
    plan = plans[state] = Plan(step, derivative, theta, flat_theta, name, versions, bits)
    return plan


def _each(parameter: Tensor, example: Tensor) -> Tensor:
    """A parameter with an element for each neuron, flat in the order of memory."""
    return flat(parameter.expand(example.shape), example.stride())


class Charging(torch.autograd.Function):
    """``plan.charging.apply([reset, pieces, reaches], u, current, beta, threshold)`` -> the state after.

    ``reset``: the spikes of u, or None; ``pieces`` collects what has to be written down, None if nothing;
    ``reaches`` the largest magnitude.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, constants: list[Any], u: Tensor, current: Tensor, beta: Tensor, threshold: Tensor
    ) -> Tensor:
        plan: Plan = ctx._forward_cls.plan
        reset, pieces, reaches = constants
        stride = u.stride()
        record = pieces is not None
        state = like(u)
        found, reach = ops.steps_on(u.device).charge(
            flat(u, stride),
            flat(current, stride),
            None if reset is None else flat(reset, stride),
            plan.step,
            record,
            flat(state, stride),
        )
        reaches.append(reach)
        if record:
            pieces.extend(found)
        kind = plan.step.reset
        # Asking for needs_input_grad here would cost bytes a step.
        uses_reset = kind in (BEFORE, AFTER) or (kind == SUBTRACT and threshold.requires_grad)
        ctx.save_for_backward(beta, u if beta.requires_grad else None, reset if uses_reset else None)
        if current.dtype is not torch.float32:
            ctx.dtype = current.dtype
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        beta, u, reset = ctx.saved_tensors
        plan: Plan = ctx._forward_cls.plan
        dtype = getattr(ctx, "dtype", torch.float32)
        _, of_u, of_current, of_beta, of_threshold = ctx.needs_input_grad
        kind = plan.step.reset
        passed: Any = 1 - reset if kind in (BEFORE, AFTER) else None
        if kind == AFTER:
            g = g * passed
        by_threshold = by_beta = by_u = None
        if of_threshold and kind == SUBTRACT:
            by_threshold = (-g * reset).sum_to_size(plan.theta.shape)
        if of_beta:
            decayed = u if kind != BEFORE else passed * u
            by_beta = through_clamp(beta, (g * decayed).sum_to_size(beta.shape).to(beta.dtype))
        if of_u:
            by_u = g * beta.clamp(0, 1)
            if kind == BEFORE:
                by_u = by_u * passed
        return None, by_u, g.to(dtype) if of_current else None, by_beta, by_threshold


class Firing(torch.autograd.Function):
    """``plan.firing.apply(pieces, mem, threshold)`` -> spikes."""

    @staticmethod
    def forward(ctx: Any, pieces: Any, mem: Tensor, threshold: Tensor) -> Tensor:  # type: ignore[override]
        plan: Plan = ctx._forward_cls.plan
        ctx.save_for_backward(mem, threshold)
        spikes, stride = like(mem), mem.stride()
        form = ops.steps_on(mem.device)
        pieces.append(form.fire(flat(mem, stride), plan.flat_theta, False, flat(spikes, stride)))
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mem, threshold = ctx.saved_tensors
        plan: Plan = ctx._forward_cls.plan
        _, to_mem, to_threshold = ctx.needs_input_grad
        of_mem = plan.derivative(mem - plan.theta, g)
        of_threshold = None
        if to_threshold:
            of_threshold = (-of_mem).sum_to_size(threshold.shape).to(threshold.dtype)
        return None, of_mem if to_mem else None, of_threshold


def step(
    plan: Plan,
    current: Tensor,
    u: Tensor,
    beta: Tensor,
    threshold: Tensor,
    *,
    fires: bool = True,
    trusted: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step on the grid, on a timeline where a tape records.

    Args:
        plan: the neuron's.
        current, u: input and the state before the step, of one shape.
        beta, threshold: the parameters of the plan.
        fires: whether the state fires; without, no spikes come out.
        trusted: the current rests on states of other timelines only, and may be replayed.

    Returns:
        The state after the step, its spikes, and the spikes of ``u``.

    Raises:
        OverflowError: the state left the range in which the grid is exact.
    """
    recorder = tape.current()
    needs = any(x.requires_grad for x in (current, u, beta, threshold))
    if recorder is not None and (recorder.suspended or not needs or not tape.may_record()):
        recorder = None
    timeline = None if recorder is None else continued(u, plan)
    starts = timeline is None
    if timeline is None:
        u = snap(u, plan.bits)
        if not is_dense(u):
            u = u.contiguous()
    form = ops.steps_on(u.device)
    handle = None
    if recorder is not None:
        keeps = not trusted and rests_on_a_state(look_up(current))
        handle = recorder.hold(current) if keeps else recorder.pack(current)
    with tape.paused():
        reset = None
        if starts:
            bits: list[Any] = []
            if fires:
                reset, stride = like(u), u.stride()
                bits = [form.fire(flat(u, stride), plan.flat_theta, False, flat(reset, stride))]
            if recorder is not None:
                timeline = Timeline(plan, u, plan.name)
                timeline.records.append(bits)
        elif fires:
            assert timeline is not None
            reset = timeline.newest_spikes()
        if timeline is not None and reset is not None:
            enter(reset, NewSpikes(timeline, timeline.length))
        pieces: list[Any] | None = None if timeline is None else []
        resets = None if plan.step.reset == NONE else reset
        reaches: list[Any] = []
        state = plan.charging.apply([resets, pieces, reaches], u, current, beta, threshold)
        reach = watched(reaches[0], plan.name, plan.bits)
        if timeline is None:
            tape.mark_opaque(state)
        else:
            assert recorder is not None and handle is not None
            timeline.step(handle, recorder.hold(state), reach, pieces or [])
            enter(state, NewState(timeline, timeline.length))
        spikes = None
        bits = []
        if fires:
            spikes = plan.firing.apply(bits, state, threshold)
        if timeline is not None:
            timeline.fired(bits, spikes)
            if spikes is not None:
                enter(spikes, NewSpikes(timeline, timeline.length))
        elif spikes is not None:
            tape.mark_spikes(spikes)
    return state, spikes, reset


def reference(
    current: Tensor,
    u: Tensor,
    beta: Tensor,
    threshold: Tensor,
    reset: str,
    spike_grad: Any = None,
    bits: int = 16,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`step` written with operations that autograd differentiates; ``spike_grad`` None: no spikes."""
    u = snap(u, bits)
    fired: Any = None
    if spike_grad is not None:
        fired = (u - snap(threshold, bits)).detach().gt(0).float()
    v = decay((1 - fired) * u if reset == BEFORE else u, beta.clamp(0, 1), bits)
    if reset == SUBTRACT:
        v = v - fired * snap(threshold, bits)
    state = v + snap(current, bits)
    if reset == AFTER:
        state = (1 - fired) * state
    spikes = None if spike_grad is None else spike_grad(state - snap(threshold, bits))
    return state, spikes, fired
