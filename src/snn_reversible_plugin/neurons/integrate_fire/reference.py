"""Neuron equations as pure functions of tensors: charge, fire, reset, and their gradients.

This file is the specification: one step the way it reads in the papers, its vector-Jacobian product
written out, and both over a sequence. The one idea: what the backward needs of a step is its charged
membrane ``h``, and that can be had again from the input current. :mod:`.neurons.integrate_fire.in_place`
does the same in place. Neither knows of frameworks, modules, or the tape.

Source: the integrate-and-fire family as in Fang et al., SpikingJelly (Science Advances 9, 2023,
eqs. 2-4); ParametricLIF from Fang et al., ICCV 2021; surrogate gradients, Neftci et al. 2019.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops.layouts import is_contiguous_in, restacked

# NOTE [The order of floating point operations]
#
# Autograd runs the nodes of a graph in descending order of their creation, and adds gradients that
# meet at a tensor in the order in which they arrive; two terms commute, three don't associate. With
# the operations of `step` created as they are written, the sums of more than two terms are:
#
# 1. into the spike: from the output first, then from `1 - s` (last created), then from `s * v_reset`:
#    (g_s + -(g_v * h)) + g_v * v_reset.
# 2. into the membrane between two steps: from the stored v_seq first (its stack was created last),
#    then from the charge's sum, then through the leak: (g_v_seq + g_h) + -(g_h / tau).
# 3. into the membrane that a call starts from, where a loss or a later call adds its own: the two
#    terms of 2. must arrive one after the other, so they are returned as two (`Gradients.v`).
# 4. into the leak of a parametric neuron: one sum over all neurons a step, the last step first. A sum
#    depends on the order of its elements, so it always runs over whole steps (`Gradients.q`).
# 5. -(a * b) is (-a) * b and a + -b is a - b, bit for bit, so signs may move.
#
# NOTE [Layouts]
#
# A result's strides are part of what stock hands on: the next layer's kernel, and so its rounding,
# depends on them. Operations here are written out of place, operand by operand as stock's are, so that
# results are laid out as stock's. A stack of steps is contiguous, or channels-last in each step where
# all of them are; `restacked` does that to a single step.


class Rule(NamedTuple):
    """The settings of an integrate-and-fire neuron.

    ``tau`` is None for a neuron without a leak, and for one whose leak is a tensor beside the rule
    (:class:`Neuron`). ``v_reset`` None is the soft reset ``v = h - s * v_threshold``.
    """

    tau: float | None
    decay_input: bool
    v_threshold: float
    v_reset: float | None
    detach_reset: bool

    @property
    def rest(self) -> float:
        """What the membrane decays to."""
        return 0.0 if self.v_reset is None else self.v_reset


class Neuron(NamedTuple):
    """A neuron as its equations see it. ``q``: the leak 1 / tau as a scalar tensor, of a parametric one."""

    rule: Rule
    surrogate: Surrogate
    q: Tensor | None = None

    @property
    def leaky(self) -> bool:
        """Whether the membrane decays."""
        return self.q is not None or self.rule.tau is not None


class OutputGradients(NamedTuple):
    """Gradients of what a sequence returns, not all None: spikes, final membrane, all membranes."""

    s: Tensor | None
    v: Tensor | None = None
    v_seq: Tensor | None = None


class Gradients(NamedTuple):
    """What a backward returns: see the note on order for why ``v`` and ``q`` come in parts.

    ``v``: the two terms for the initial membrane (the second is None for a neuron without a leak).
    ``q``: one scalar a time step, the last step first.
    """

    x: Tensor | None
    v: tuple[Tensor | None, Tensor | None]
    q: list[Tensor]


class Wanted(NamedTuple):
    """Which gradients a backward has to compute."""

    x: bool
    v: bool
    q: bool


def step(x: Tensor, v: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One time step.

    Args:
        x: input current [N, ...].
        v: membrane before the step, same shape.
        neuron: whose step it is.

    Returns:
        Spikes, the membrane after the step, the charged membrane h, and what q multiplies (None
        without q).
    """
    rule = neuron.rule
    h, pull = _charge(x, v, rule, neuron.q)
    s = neuron.surrogate.fired(h - rule.v_threshold)
    if rule.v_reset is None:
        return s, h - s * rule.v_threshold, h, pull
    return s, s * rule.v_reset + (1.0 - s) * h, h, pull


def _charge(x: Tensor, v: Tensor, rule: Rule, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if q is None and rule.tau is None:
        return v + x, None
    from_rest = v - rule.rest
    pull = x - from_rest if rule.decay_input else from_rest
    leak = pull * q if q is not None else pull / rule.tau  # type: ignore[operator]
    h = v + leak if rule.decay_input else v - leak + x
    return h, None if q is None else pull


def fire_reset_vjp(
    h: Tensor, g_s: Tensor | None, g_v: Tensor | None, rule: Rule, surrogate: Surrogate
) -> Tensor:
    """The gradient of h from those of the spikes and of the membrane after the step, not both None."""
    u = h - rule.v_threshold
    if g_v is None:
        assert g_s is not None
        return surrogate.vjp(g_s, u)
    through_reset = g_v
    if rule.v_reset is not None:
        s = surrogate.fired(u)
        through_reset = g_v * (1.0 - s)
    if not rule.detach_reset:
        if rule.v_reset is None:
            term = -g_v * rule.v_threshold
            g_s = term if g_s is None else g_s + term
        else:
            term = -(g_v * h)
            g_s = (term if g_s is None else g_s + term) + g_v * rule.v_reset
    return through_reset if g_s is None else through_reset + surrogate.vjp(g_s, u)


def charge_vjp(
    g_h: Tensor, rule: Rule, q: Tensor | None, pull: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, of v through the leak, and of q, from that of h (which is v's other part)."""
    if q is None and rule.tau is None:
        return g_h, None, None
    g_leak = g_h if rule.decay_input else -g_h
    g_pull = g_leak * q if q is not None else g_leak / rule.tau  # type: ignore[operator]
    g_q = None if pull is None or q is None else (g_leak * pull).sum().to(q.dtype)
    return (g_pull, -g_pull, g_q) if rule.decay_input else (g_h, g_pull, g_q)


def single_step(x: Tensor, v: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`step`, with the spikes laid out as in a stack of one step."""
    s, v, h, pull = step(x, v, neuron)
    return restacked(s), v, h, pull


def single_step_vjp(
    h: Tensor, g_s: Tensor | None, g_v: Tensor | None, neuron: Neuron, pull: Tensor | None = None
) -> Gradients:
    """Gradients of :func:`single_step` from h and those of the spikes and the membrane, not both None.

    ``pull`` is the forward's fourth output; without it q gets no gradient.
    """
    dims = range(h.dim())
    if g_s is not None and not is_contiguous_in(g_s, dims, zeros=is_contiguous_in(h, dims)):
        # Indexing a stack of one step leaves its gradient contiguous.
        g_s = torch.empty(g_s.shape, dtype=g_s.dtype, device=g_s.device).copy_(g_s)
    g_h = fire_reset_vjp(h, g_s, g_v, neuron.rule, neuron.surrogate)
    g_x, g_leak, g_q = charge_vjp(g_h, neuron.rule, neuron.q, pull)
    return Gradients(restacked(g_x), (g_h, g_leak), [] if g_q is None else [g_q])


def sequence(
    x_seq: Tensor, v: Tensor | float, neuron: Neuron, store_v_seq: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All steps of x_seq [T, N, ...] from the membrane v: [N, ...], or one value for all neurons.

    Returns:
        Spikes [T, N, ...], the final membrane [N, ...], and with ``store_v_seq`` the membranes after
        each step [T, N, ...].
    """
    v = v if isinstance(v, Tensor) else torch.full_like(x_seq[0], v)
    spikes, voltages = [], []
    for x in x_seq:
        s, v, _, _ = step(x, v, neuron)
        spikes.append(s)
        if store_v_seq:
            voltages.append(v)
    return torch.stack(spikes), v, torch.stack(voltages) if store_v_seq else None


def sequence_vjp(
    x_seq: Tensor, v: Tensor | float, grads: OutputGradients, neuron: Neuron, wanted: Wanted
) -> Gradients:
    """Gradients of :func:`sequence` from its inputs and those of its outputs."""
    state = v if isinstance(v, Tensor) else torch.full_like(x_seq[0], v)
    hs: list[Any] = []
    pulls: list[Tensor | None] = []
    for x in x_seq:
        _, state, h, pull = step(x, state, neuron)
        hs.append(h)
        pulls.append(pull if wanted.q else None)
    g_s, carry, g_v_seq = grads
    if g_v_seq is not None:
        carry = g_v_seq[-1] if carry is None else carry + g_v_seq[-1]
    g_h = g_leak = None
    g_x: list[Tensor] = []
    g_q: list[Tensor] = []
    for t in reversed(range(len(hs))):
        g_st = None if g_s is None else g_s[t]
        g_h = fire_reset_vjp(hs[t], g_st, carry, neuron.rule, neuron.surrogate)
        g_xt, g_leak, g_qt = charge_vjp(g_h, neuron.rule, neuron.q, pulls[t])
        hs[t] = pulls[t] = None
        g_x.append(g_xt)
        if g_qt is not None:
            g_q.append(g_qt)
        carry = g_v_seq[t - 1] + g_h if g_v_seq is not None and t else g_h
        if g_leak is not None:
            carry = carry + g_leak
    return Gradients(
        torch.stack(g_x[::-1]) if wanted.x else None,
        (g_h, g_leak) if wanted.v else (None, None),
        g_q,
    )
