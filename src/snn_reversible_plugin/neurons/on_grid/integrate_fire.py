"""SpikingJelly's integrate-and-fire family on the dyadic grid: equations of one time step, and back.

The one idea: charge, fire and reset are one autograd function, which saves the charged membrane as a place
on the neuron's :class:`~.neurons.on_grid.timeline.Timeline`, and no tensor. On the grid every charge reads
``h = decay(v, beta) + snap(gain * x)``: IF with beta = 1, LIF and ParametricLIF with beta = 1 - 1/tau.

Source: ``spikingjelly.activation_based.neuron`` 2.0.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid import decay, snap
from snn_reversible_plugin.grid.decays import NONE, Step, decay_of
from snn_reversible_plugin.grid.range import check_step, reach
from snn_reversible_plugin.grid.step import Record, Undo, steps_on
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule, fire_reset_vjp
from snn_reversible_plugin.neurons.on_grid.neuron import check_spikes
from snn_reversible_plugin.neurons.on_grid.places import NewCharged, saved_and_way_back
from snn_reversible_plugin.neurons.on_grid.step import Before, Charged, Constants, Parameters, Stepped
from snn_reversible_plugin.neurons.on_grid.timeline import REMEDY, WayBack
from snn_reversible_plugin.neurons.rerun import differentiable_once
from snn_reversible_plugin.neurons.surrogates import Surrogate, in_one_pass
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import alike, flat, like
from snn_reversible_plugin.ops.outputs import on_its_own
from snn_reversible_plugin.tape.final_membrane import FinalMembrane
from snn_reversible_plugin.tape.origins import enter

Pair = tuple[Tensor | None, Tensor | None]
"""Gradients of the spikes and of the membrane after, not both None."""


@dataclass(frozen=True, eq=False)
class IntegrateFire(Constants):
    """A neuron that fires at ``h >= v_threshold`` and resets at once.

    Attributes:
        rule: with its threshold and its reset on the grid.
        surrogate: the gradient.
        beta: the decay, where it is not a parameter.
    """

    rule: Rule
    surrogate: Surrogate
    beta: Any

    @property
    def resets_at_once(self) -> bool:
        """Always."""
        return True

    @functools.cached_property
    def stepping(self) -> type[Stepping]:
        """:class:`Stepping` with these constants: an attribute of each node would cost bytes a step."""
        return type("Stepping", (Stepping,), {"constants": self})

    def charge(self, current: Tensor, before: Before, parameters: Parameters) -> Charged:
        """Charge, fire and reset."""
        lost: list[Any] = []
        fired: list[Any] = []
        reaches: list[Any] = []
        beta = parameters[0] if parameters else None
        spikes, v = self.stepping.apply((before, lost, fired, reaches), before.state, current, beta)
        return Charged(on_its_own(v), spikes, lost, fired, reaches)

    def write(
        self, rows: list[Tensor], record: Record | None, reaches: list[Any]
    ) -> tuple[Sequence[Any], Sequence[Any], Any]:
        """Write a step. ``rows``: the membrane, the current, places for h, the membrane after, the spikes.

        Returns what the charge lost and what the reset did, in pieces, and the spikes as bits; ``reaches``
        collects the largest magnitudes.
        """
        (v, x, h, after, s), rule, step, form = rows, self.rule, self.step, steps_on(rows[0].device)
        fires = rule.v_threshold, not self.surrogate.strict, s
        if hasattr(form, "charge_and_reset"):
            digits, resets, reach, bits = form.charge_and_reset(
                v, x, step, rule.v_reset, record, (h, after), fires
            )
            reaches.append(reach)
            return digits, resets, bits
        digits, reach, bits = form.charge(v, x, None, step, record, h, fires)
        reaches.append(reach)
        resets, reach = form.reset(h, s, step.theta, rule.v_reset, step.scale, record is not None, after)
        reaches.append(reach)
        return digits, resets, bits

    def unreset(self, state: Tensor, fired: Any, lost: Any) -> Tensor:
        """The charged membrane of a step, flat, from the membrane after it."""
        step = self.step
        return steps_on(state.device).unreset(  # type: ignore[no-any-return]
            state, fired, step.theta, self.rule.v_reset, step.scale, lost
        )

    def undoes_at_once(self, device: torch.device) -> bool:
        """Where the device has a form that does."""
        return hasattr(steps_on(device), "undo_charge_and_reset")

    def back_to_both(self, state: Tensor, current: Tensor, record: Any, lost: Any) -> tuple[Tensor, Tensor]:
        """The charged membrane of a step and the one before it, flat."""
        end = (len(state) + 7) // 8
        return steps_on(
            state.device
        ).undo_charge_and_reset(  # type: ignore[no-any-return]
            state, current, record[:end], self.step, self.rule.v_reset, (lost, record[end:])
        )

    def back(self, charged: Tensor, current: Tensor, fired: Any, lost: Any) -> Tensor:
        """The membrane before a step, flat."""
        return steps_on(charged.device).undo(charged, current, None, self.step, lost)  # type: ignore[no-any-return]

    def gradient(self, h: Tensor, g_s: Tensor | None, g_v: Tensor | None) -> Tensor:
        """That of the charged membrane; not both of the given are None."""
        rule, surrogate, stride = self.rule, self.surrogate, h.stride()
        given = [g for g in (g_s, g_v) if g is not None and g.stride() == stride]
        if len(given) < 2 or surrogate.strict or (rule.v_reset is None and rule.detach_reset):
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

    def has_gradients_at_once(self, h: Tensor, g_s: Tensor | None, g_v: Tensor | None) -> bool:
        """Whether a form there has :meth:`gradients_at_once`, of gradients laid out as these are."""
        if self.surrogate.strict or not hasattr(steps_on(h.device), "gradient"):
            return False
        if may_look(h.device):
            # What is made of a gradient of another layout may have that one, and products round by it.
            for g in (g_s, g_v):
                if g is not None and g.stride() != h.stride() and any(g.stride()):
                    return False
        return in_one_pass(self.surrogate, h.device) is not None

    def gradients_at_once(
        self, h: Tensor, back: WayBack | None, grads: Pair, beta: Tensor | None, of_v: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Those of the membrane before, if wanted, and of the current.

        ``h``: the charged membrane, or the one after the step, which is undone with it if there is a way
        back.
        """
        size, stride = (h.numel(),), h.stride()
        g_s, g_v = grads
        given = (
            None if g_s is None else _flat_or_one(g_s, stride),
            None if g_v is None else _flat_or_one(g_v, stride),
        )
        by_x, *others = alike(h, 1 + of_v)
        by_v = others[0] if of_v else None
        factors = (self.beta if beta is None else beta), self.step.gain
        made = None if by_v is None else by_v.as_strided(size, (1,)), by_x.as_strided(size, (1,))
        rows, undo = flat(h, stride), None
        if back is not None:
            before = None if back.current is None else torch.empty_like(rows)
            end = (len(rows) + 7) // 8
            bits, planes = back.record[:end], back.record[end:]
            undo = Undo(self.step, bits, planes, back.lost, back.current, before)
        steps_on(h.device).gradient(rows, given, self.rule, self.surrogate, factors, made, undo)
        if back is not None and undo is not None and undo.before is not None:
            back.arrived(undo.before)
        return by_v, by_x

    def reference(self, current: Tensor, state: Tensor, parameters: Parameters) -> Stepped:
        """The step as operations that autograd differentiates."""
        rule, gain, bits = self.rule, self.step.gain, self.bits
        beta = parameters[0] if parameters else self.beta
        x = current if gain is None else current.float() * gain
        h = decay(snap(state, bits), beta, bits) + snap(x, bits)
        check_step(reach(h), self.name, bits, REMEDY)
        assert self.fire is not None
        s = self.fire(h - rule.v_threshold)
        reset = s.detach() if rule.detach_reset else s
        if rule.v_reset is None:
            v = h - reset * rule.v_threshold
        else:
            v = reset * rule.v_reset + (1.0 - reset) * h
        # As of stock's operators, what comes through the reset is no part of the gradient of the spikes.
        return Stepped(v, s.view_as(s), None)


def integrate_fire(
    name: str,
    bits: int,
    beta: float | tuple[Tensor, float],
    gain: float | None,
    rule: Rule,
    surrogate: Surrogate,
    parameters: Parameters,
) -> IntegrateFire:
    """The constants of a neuron.

    Args:
        name: whose membrane it is, for errors.
        bits: the grid's.
        beta: the decay, a float32 in (0, 1]; on a device, where a learned one is not looked at, it as a
            tensor, and the smallest that there is room for.
        gain: what the input is multiplied with, None for 1.
        rule: the neuron's threshold and reset, as the user gave them.
        surrogate: its firing function, a Heaviside step that autograd differentiates, and the gradient.
        parameters: those that beta follows from.

    Raises:
        ValueError: a decay that can't be undone.
    """
    scale = 2.0**bits
    theta = round(rule.v_threshold * scale) / scale
    to = None if rule.v_reset is None else round(rule.v_reset * scale) / scale
    factor, smallest, largest = (*beta, 1.0) if isinstance(beta, tuple) else (beta, beta, beta)
    if isinstance(factor, Tensor):
        factor = factor.view(1)
    decay = decay_of(factor, smallest, largest, name)
    charge = Step(decay, theta * scale, NONE, scale, gain)
    rule = rule._replace(v_threshold=theta, v_reset=to)
    fire, surrogate = surrogate.fire, replace(surrogate, fire=None)
    return IntegrateFire(name, bits, charge, fire, parameters, rule, surrogate, factor)


def _flat_or_one(g: Tensor, stride: tuple[int, ...]) -> Tensor:
    """A gradient, flat in the order of memory of a layout; of one number for all, that one."""
    if g.dtype is torch.float32 and not any(g.stride()) and not g.is_neg():  # a kernel reads memory
        return g.detach().as_strided((1,), (1,))
    return flat(g, stride)


def _values(
    constants: IntegrateFire, v: Tensor, x: Tensor, record: Record | None, sinks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The charged membrane, the spikes and the membrane after; ``sinks``: see :class:`Stepping`."""
    lost, fired, reaches = sinks
    stride = v.stride()
    h, s, after = alike(v, 3)
    size = (v.numel(),)
    rows = [flat(v, stride), flat(x, stride), *[new.as_strided(size, (1,)) for new in (h, after, s)]]
    digits, resets, bits = constants.write(rows, record, reaches)
    if constants.surrogate.users:
        check_spikes(constants.fire, h - constants.rule.v_threshold, s)
    if record is not None:
        lost += digits
        fired += [bits, *resets]
    return h, s, after


def first_membrane(constants: IntegrateFire, v: float, x: Tensor) -> Tensor:
    """The membrane that one step leaves behind; ``v``: a number on the grid."""
    start = torch.full_like(x, v, dtype=torch.float32)
    return _values(constants, start, x, None, ([], [], []))[2]


class Stepping(torch.autograd.Function):
    """``constants.stepping.apply(sinks, v, x, beta)`` -> spikes, the membrane after.

    ``sinks = (before, lost, fired, reaches)``: ``lost`` and ``fired`` collect what has to be written down,
    where there is a timeline, ``reaches`` the largest magnitudes. ``beta``: None where it is a constant.
    """

    @staticmethod
    def forward(ctx: Any, sinks: Any, v: Tensor, x: Tensor, beta: Tensor | None) -> Any:  # type: ignore[override]
        constants: IntegrateFire = ctx._forward_cls.constants
        ctx.set_materialize_grads(False)
        (_, _, timeline, t, first), lost, fired, reaches = sinks
        record = None if timeline is None else timeline.record
        h, s, after = _values(constants, v, x, record, (lost, fired, reaches))
        if timeline is not None:
            enter(h, NewCharged(timeline, t))
        if first is not None:
            ctx.first = weakref.ref(first)
            after = first.placeholder(after)
        # Asking for needs_input_grad here would cost bytes a step.
        ctx.save_for_backward(h, beta, v if beta is not None and beta.requires_grad else None)
        if x.dtype is not torch.float32:
            ctx.dtype = x.dtype
        return s, after

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_s: Tensor | None, g_v: Tensor | None) -> Any:
        constants: IntegrateFire = ctx._forward_cls.constants
        _, of_v, of_x, of_beta = ctx.needs_input_grad
        of_first, is_given = getattr(ctx, "first", None), not (g_s is None and g_v is None)
        at_once, back = is_given and of_x and not of_beta and not hasattr(ctx, "dtype"), None
        if at_once and of_first is None:
            (h, beta, v), back = saved_and_way_back(ctx)
        else:
            h, beta, v = ctx.saved_tensors
        if at_once and constants.has_gradients_at_once(h, g_s, g_v):
            if of_first is not None:
                _keep(of_first(), constants, h)
            return None, *constants.gradients_at_once(h, back, (g_s, g_v), beta, of_v), None
        if back is not None:
            h = back.charged().as_strided(h.size(), h.stride())
        if of_first is not None:
            _keep(of_first(), constants, h)
        if not is_given:
            return None, None, None, None
        g = constants.gradient(h, g_s, g_v)
        by_v = by_x = by_beta = None
        if of_v:
            by_v = g * (constants.beta if beta is None else beta)
        if of_x:
            by_x = g.to(getattr(ctx, "dtype", torch.float32))
            if constants.step.gain is not None:
                by_x = by_x * constants.step.gain
        if of_beta:
            by_beta = (g * v).sum_to_size(beta.shape).to(beta.dtype)
        return None, by_v, by_x, by_beta


def _keep(first: FinalMembrane | None, constants: IntegrateFire, h: Tensor) -> None:
    """Keep the promise of the membrane after a step that charged to h, where somebody may still read it."""
    if first is None or first.membrane is not None or first.settle():
        return
    stride, rule, step, after = h.stride(), constants.rule, constants.step, like(h)
    spikes = (h > rule.v_threshold if constants.surrogate.strict else h >= rule.v_threshold).float()
    steps_on(h.device).reset(
        flat(h, stride),
        flat(spikes, stride),
        step.theta,
        rule.v_reset,
        step.scale,
        False,
        flat(after, stride),
    )
    first.keep(after)
