"""One time step of a snnTorch neuron on the dyadic grid, which a later backward can undo.

The one idea: as in :mod:`.step` a step is two autograd functions, charge and fire; but what they save is
a place on the neuron's :class:`~.neurons.on_grid.timeline.Timeline`, and no state. :func:`reference`
is the same step written with ordinary operations on the grid: the specification of values and gradients.

Source: design section 6; ``forward`` of ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import decay, snap
from snn_reversible_plugin.grid.decays import AFTER, BEFORE, NONE, SUBTRACT, Step, decay_of
from snn_reversible_plugin.grid.step import as_pieces, steps_on
from snn_reversible_plugin.neurons.leaky.reference import through_clamp
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.timeline import (
    NewBits,
    NewSpikes,
    NewState,
    Timeline,
    continued,
    rests_on_a_state,
    watched,
)
from snn_reversible_plugin.neurons.surrogates import Surrogate, in_one_pass
from snn_reversible_plugin.ops.layouts import flat, is_dense, like
from snn_reversible_plugin.tape.origins import enter, look_up


@dataclass(frozen=True, eq=False)
class Plan:
    """A neuron's constants, as long as its parameters are what they are.

    ``beta``: the decay, clamped; ``theta``: the threshold on the grid, as a tensor of the parameter's
    shape; ``flat_theta``: a number, or float32 [n].
    """

    step: Step
    surrogate: Surrogate
    beta: Tensor
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

    @functools.cached_property
    def decayed(self) -> float | None:
        """The factor of the state in the charge's gradient, where that is a constant number."""
        factor = self.step.decay.beta
        return factor if isinstance(factor, float) and self.step.reset in (NONE, SUBTRACT) else None

    def charge(
        self,
        u: Tensor,
        current: Tensor,
        bits: Any,
        pieces: list[Any] | None,
        out: Tensor,
        spikes: Tensor | None,
    ) -> tuple[Any, Any]:
        """Write the state after the charge to ``out``, and its spikes; both are laid out as u.

        ``bits``: the spikes of u; ``pieces`` collects what has to be written down, None if nothing.
        Returns the largest magnitude, and the bits of the spikes.
        """
        stride = u.stride()
        found, reach, fired = steps_on(u.device).charge(
            flat(u, stride),
            flat(current, stride),
            None if self.step.reset == NONE else bits,
            self.step,
            pieces is not None,
            flat(out, stride),
            None if spikes is None else (self.flat_theta, False, flat(spikes, stride)),
        )
        if pieces is not None:
            pieces.extend(found)
        return reach, fired

    def fire_vjp(self, mem: Tensor, g: Tensor) -> Tensor:
        """The gradient of a membrane from that of its spikes."""
        write = in_one_pass(self.surrogate) if mem.device.type == "cpu" else None
        stride = mem.stride()
        if write is None or g.stride() != stride or g.dtype is not torch.float32:
            return self.surrogate.vjp(g, mem - self.theta)
        out = like(mem)
        write(flat(mem, stride), self.flat_theta, flat(g, stride), flat(out, stride))
        return out

    def back(self, timeline: Timeline, t: int, state: Tensor, current: Tensor) -> Tensor:
        """The flat state before step t, from the one after it."""
        bits = None if self.step.reset == NONE else timeline.bits(t - 1)[0]
        record = timeline.records.record(2 * t - 1)
        return steps_on(state.device).undo(state, current, bits, self.step, record)  # type: ignore


_plans: weakref.WeakKeyDictionary[Any, dict[str, Plan]] = weakref.WeakKeyDictionary()


def plan_of(
    neuron: Any, state: str, beta: Tensor, reset: str, surrogate: Surrogate, example: Tensor
) -> Plan:
    """The plan of one of a neuron's states; made again when a parameter or a setting changed.

    ``example``: a tensor of the states' shape and layout.

    Raises:
        ValueError: a decay that can't be undone.
    """
    threshold, bits = neuron.threshold, switches.bits_of(neuron)
    each = bool(beta.numel() > 1 or threshold.numel() > 1)
    versions = (
        id(beta), beta._version, id(threshold), threshold._version, reset, surrogate, bits, example.device,
        (example.shape, example.stride()) if each else None,
    )  # fmt: skip
    plans = _plans.get(neuron)
    if plans is None:
        plans = _plans[neuron] = {}
    plan = plans.get(state)
    if plan is not None and plan.versions == versions:
        return plan
    name = f"{switches.name_of(neuron)}.{state}"
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
    plan = plans[state] = Plan(step, surrogate, clamped, theta, flat_theta, name, versions, bits)
    return plan


def _each(parameter: Tensor, example: Tensor) -> Tensor:
    """A parameter with an element for each neuron, flat in the order of memory."""
    return flat(parameter.expand(example.shape), example.stride())


class Charging(torch.autograd.Function):
    """``plan.charging.apply(call, u, current, beta, threshold)`` -> the state after the charge.

    Of the ``call = [bits, reset, pieces, spikes, found]``, ``reset`` are the spikes of u where the gradient
    asks for them, as bits if u is contiguous; ``found`` collects what :meth:`Plan.charge` returns; the
    rest are its arguments.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, constants: list[Any], u: Tensor, current: Tensor, beta: Tensor, threshold: Tensor
    ) -> Tensor:
        plan: Plan = ctx._forward_cls.plan
        bits, reset, pieces, spikes, found = constants
        state = like(u)
        found.extend(plan.charge(u, current, bits, pieces, state, spikes))
        # Asking for needs_input_grad here would cost bytes a step.
        learned = beta.requires_grad
        ctx.save_for_backward(beta if learned else None, u if learned else None, reset)
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
        if kind == AFTER:
            g = _gated(g, 1.0, reset)
        by_threshold = by_beta = by_u = None
        if of_threshold and kind == SUBTRACT:
            by_threshold = (-g * _spikes(reset, g)).sum_to_size(plan.theta.shape)
        if of_beta:
            decayed = u if kind != BEFORE else (1 - _spikes(reset, g)) * u
            by_beta = through_clamp(beta, (g * decayed).sum_to_size(beta.shape).to(beta.dtype))
        if of_u:
            factor = plan.beta if beta is None else beta.clamp(0, 1)
            by_u = _gated(g, factor, reset) if kind == BEFORE else g * factor
        return None, by_u, g.to(dtype) if of_current else None, by_beta, by_threshold


def _spikes(reset: Tensor, g: Tensor) -> Tensor:
    """The spikes of a reset, which are saved as bits where a layout is contiguous."""
    if reset.dtype is not torch.uint8:
        return reset
    spikes = torch.empty(g.shape, device=g.device)
    steps_on(g.device).fired(as_pieces(reset), spikes.view(-1))
    return spikes


def _gated(g: Tensor, factor: Any, reset: Tensor) -> Tensor:
    """``g * factor``, and times 0 where neurons fired."""
    one = isinstance(factor, float) or factor.numel() == 1
    if reset.dtype is not torch.uint8 or not one:
        return (g * factor).mul_(1 - _spikes(reset, g))
    out = torch.empty(g.shape, device=g.device)
    form = steps_on(g.device)
    form.gate(flat(g, out.stride()), float(factor), as_pieces(reset), out.view(-1))
    return out


class Firing(torch.autograd.Function):
    """``plan.firing.apply([spikes], mem, *threshold)`` -> the spikes; with a threshold that is learned."""

    @staticmethod
    def forward(ctx: Any, spikes: list[Tensor], mem: Tensor, *threshold: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(mem, *threshold)
        return spikes[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mem, *threshold = ctx.saved_tensors
        plan: Plan = ctx._forward_cls.plan
        of_mem = plan.fire_vjp(mem, g)
        to_mem = ctx.needs_input_grad[1]
        of_threshold = [(-of_mem).sum_to_size(one.shape).to(one.dtype) for one in threshold]
        return None, of_mem if to_mem else None, *of_threshold


def _unpacked(bits: Any, u: Tensor) -> Tensor:
    spikes = like(u)
    steps_on(u.device).fired(bits, flat(spikes, u.stride()))
    return spikes


def _charge(
    plan: Plan,
    u: Tensor,
    current: Tensor,
    beta: Tensor,
    threshold: Tensor,
    bits: Any,
    timeline: Timeline | None,
    spikes: Tensor | None,
) -> tuple[Tensor, Any, Any, Any]:
    """The state after the charge, what has to be written down of u, the largest magnitude, the new bits."""
    pieces: list[Any] | None = None if timeline is None else []
    learned = beta.requires_grad or threshold.requires_grad
    if plan.decayed is None or learned or current.stride() != u.stride():
        reset = None
        kind = plan.step.reset
        if kind in (BEFORE, AFTER) or (kind == SUBTRACT and threshold.requires_grad):
            reset = torch.as_tensor(bits) if u.is_contiguous() else _unpacked(bits, u)
            if timeline is not None:
                known = NewBits if u.is_contiguous() else NewSpikes
                enter(reset, known(timeline, timeline.length))
        found: list[Any] = []
        state = plan.charging.apply([bits, reset, pieces, spikes, found], u, current, beta, threshold)
        return state, pieces, *found
    # NOTE [A sum for its gradient]
    #
    # The gradient of such a charge is that of a sum, whose node saves nothing and is no Python object. So
    # autograd is shown the sum, and what it comes to is overwritten by what the grid makes of it.
    state = torch.add(current, u, alpha=plan.decayed)
    return state, pieces, *plan.charge(u, current, bits, pieces, state, spikes)


def step(
    plan: Plan,
    current: Tensor,
    u: Tensor,
    beta: Tensor,
    threshold: Tensor,
    *,
    fires: bool = True,
    trusted: bool = False,
) -> tuple[Tensor, Tensor | None, Fired | None]:
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
    needs = current.requires_grad or u.requires_grad or beta.requires_grad or threshold.requires_grad
    recorded = needs and tape.is_recording()
    timeline = continued(u, plan) if recorded else None
    starts = timeline is None
    handle = None
    if recorded:
        keeps = not trusted and rests_on_a_state(look_up(current))
        handle = tape.keep(current) if keeps else tape.pack(current)
    with tape.paused():
        bits = None if timeline is None else timeline.newest_bits
        if starts:
            u = snap(u, plan.bits)
            if not is_dense(u):
                u = u.contiguous()
            tape.mark_opaque(u)
        if starts and fires:
            bits = steps_on(u.device).fire(
                flat(u, u.stride()), plan.flat_theta, False, flat(like(u), u.stride())
            )
        if starts and recorded:
            timeline = Timeline(plan, u, plan.name)
            timeline.fired([bits] if fires else [])
        spikes = like(u) if fires else None
        state, pieces, reach, fired = _charge(plan, u, current, beta, threshold, bits, timeline, spikes)
        reach = watched(reach, plan.name, plan.bits)
        if timeline is not None:
            assert handle is not None
            timeline.step(handle, tape.keep(state), reach, pieces)
            t = timeline.length  # one object for all handles
            enter(state, NewState(timeline, t))
        else:
            tape.mark_opaque(state)
        if spikes is not None:
            learned = (threshold,) if threshold.requires_grad else ()
            spikes = plan.firing.apply([spikes], state, *learned)
            if timeline is None:
                tape.mark_spikes(spikes)
        if timeline is not None:
            timeline.fired([] if spikes is None else [fired])
            if spikes is not None:
                enter(spikes, NewSpikes(timeline, t))
    return state, spikes, None if bits is None else Fired(bits, u.size(), u.stride(), u.device)


class Fired(NamedTuple):
    """Spikes as bits."""

    bits: Any
    size: torch.Size
    stride: tuple[int, ...]
    device: torch.device

    def spikes(self) -> Tensor:
        """The spikes themselves."""
        return _unpacked(self.bits, torch.empty_strided(self.size, self.stride, device=self.device))


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
