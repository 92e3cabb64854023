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
# NOTE [Other orders]
#
# The sums above are SpikingJelly 2.0's. Its older releases write the same equations in other words, and
# autograd adds up in another order (:class:`Order`).
#
# 1. The hard reset is written `(1 - s) * h + s * v_reset`, so the last product gets its gradient first:
#    `v_reset_first`. With a reset to 0.1, g_s = 1, g_v = -1 and h = 1e8 the spike's gradient is
#    (1 - 0.1) + 1e8 there, and (1 + 1e8) - 0.1 in the note above.
# 2. Where a scripted function computes a charge or a reset, its backward is one node, which adds up what
#    goes to one tensor before handing it on: `reset_together`, here 1 + (1e8 - 0.1), and `charge_together`.
# 3. A step that is taken by `x_seq[t]` gets its gradient as a contiguous tensor of zeros with one step
#    filled in; these are added up, so with two steps or more no zero of the sum is negative: `selects`.
# 4. A membrane that starts as a number multiplies as a number: the gradient of a factor is the sum over all
#    neurons times that number (`numbers`).
#
# NOTE [Layouts]
#
# A result's strides are part of what stock hands on: the next layer's kernel, and so its rounding,
# depends on them. Operations here are written out of place, operand by operand as stock's are, so that
# results are laid out as stock's. A stack of steps is contiguous, or channels-last in each step where
# all of them are; `restacked` does that to a single step.


class Order(NamedTuple):
    """How an implementation's operations differ from those of :func:`step`; see the note on other orders.

    ``v_reset_first``: the spike's gradient is (g_s + g_v * v_reset) + -(g_v * h).
    ``reset_together``: it is g_s + (-(g_v * h) + g_v * v_reset).
    ``charge_together``: the membrane's two terms come as one, g_v_seq + (g_h + -(g_h / tau)).
    ``v_seq_last``: the membrane's gradient from v_seq is added last.
    ``scales``: at rest zero, with an undecayed input, the charge is ``v * (1 - 1 / tau) + x``.
    ``selects``: steps are taken one by one from x_seq.
    ``cats``: they are put together by ``torch.cat``, which keeps no layout.
    ``numbers``: the first membrane is a number, not a tensor full of it.
    """

    v_reset_first: bool = False
    reset_together: bool = False
    charge_together: bool = False
    v_seq_last: bool = False
    scales: bool = False
    selects: bool = False
    cats: bool = False
    numbers: bool = False


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
    order: Order = Order()

    @property
    def scales(self) -> bool:
        """Whether the membrane is scaled rather than pulled to its rest."""
        return self.order.scales and not self.decay_input and self.rest == 0

    @property
    def rest(self) -> float:
        """What the membrane decays to."""
        return 0.0 if self.v_reset is None else self.v_reset


class Neuron(NamedTuple):
    """A neuron as its equations see it.

    ``q``: the leak 1 / tau as a scalar tensor, of a parametric one. ``launched``: its sequences are
    computed by its device's form (:mod:`.neurons.integrate_fire.on_device`), as stock's are by a kernel.
    ``wide``: membranes are float32 whatever the currents are; their gradients and spikes are as those.
    """

    rule: Rule
    surrogate: Surrogate
    q: Tensor | None = None
    launched: bool = False
    wide: bool = False

    @property
    def leaky(self) -> bool:
        """Whether the membrane decays."""
        return self.q is not None or self.rule.tau is not None

    @property
    def kept(self) -> Tensor | float:
        """The part of the membrane that stays, of a leaky neuron whose rule ``scales``."""
        return 1.0 - self.q if self.q is not None else 1.0 - 1.0 / self.rule.tau  # type: ignore[operator]

    @property
    def parts(self) -> int:
        """In how many terms the gradient of the first membrane comes."""
        return 2 if self.leaky and not (self.rule.scales or self.rule.order.charge_together) else 1


class OutputGradients(NamedTuple):
    """Gradients of what a sequence returns, not all None: spikes, final membrane, all membranes."""

    s: Tensor | None
    v: Tensor | None = None
    v_seq: Tensor | None = None


class Gradients(NamedTuple):
    """What a backward returns: see the note on order for why ``v`` and ``q`` come in parts.

    ``v``: the terms for the initial membrane (the second is None where there is one, see ``Neuron.parts``).
    ``q``: one scalar a time step, the last step first.
    """

    x: Tensor | None
    v: tuple[Tensor | None, Tensor | None]
    q: list[Tensor]


class Wanted(NamedTuple):
    """Which gradients a backward has to compute. ``sums_chunks``: that of q may be a sum of chunks' sums,
    which rounds otherwise; and a device sweeps chunks of neurons, with small buffers and many launches."""

    x: bool
    v: bool
    q: bool
    sums_chunks: bool = False


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
    h, pull = charge(x, v, neuron)
    s, v = fire_reset(h, neuron)
    return s, v, h, pull


def fire_reset(h: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor]:
    """Spikes of a charged membrane, and the membrane after the reset."""
    rule = neuron.rule
    s = neuron.surrogate.fired(h - rule.v_threshold)
    if rule.v_reset is None:
        return s, h - s * rule.v_threshold
    return s, s * rule.v_reset + (1.0 - s) * h


def charge(x: Tensor, v: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor | None]:
    """The charged membrane h, and what q multiplies (None without q)."""
    rule, q = neuron.rule, neuron.q
    if not neuron.leaky:
        return v + x, None
    if rule.scales:
        return v * neuron.kept + x, None if q is None else v
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
        g_s = _spike_gradient(h, g_s, g_v, rule)
    return through_reset if g_s is None else through_reset + surrogate.vjp(g_s, u)


def _spike_gradient(h: Tensor, g_s: Tensor | None, g_v: Tensor, rule: Rule) -> Tensor:
    if rule.v_reset is None:
        term = -g_v * rule.v_threshold
        return term if g_s is None else g_s + term
    terms = [-(g_v * h), g_v * rule.v_reset]
    if rule.order.v_reset_first:
        terms.reverse()
    if g_s is None or rule.order.reset_together:
        both = terms[0] + terms[1]
        return both if g_s is None else g_s + both
    return (g_s + terms[0]) + terms[1]


def charge_vjp(
    g_h: Tensor, neuron: Neuron, pull: Tensor | float | None
) -> tuple[Tensor, tuple[Tensor, Tensor | None], Tensor | None]:
    """Gradients of x, of v in its terms, and of q, from that of h. A ``pull`` that is a number is one for
    all neurons, of which the charge made no tensor."""
    rule, q = neuron.rule, neuron.q
    if not neuron.leaky:
        return g_h, (g_h, None), None
    if rule.scales:
        g_q = None
        if pull is not None and q is not None:
            g_q = -(g_h.sum() * pull if isinstance(pull, float) else (g_h * pull).sum()).to(q.dtype)
        return g_h, (g_h * neuron.kept, None), g_q
    g_leak = g_h if rule.decay_input else -g_h
    g_pull = g_leak * q if q is not None else g_leak / rule.tau  # type: ignore[operator]
    g_q = None
    if pull is not None and q is not None:
        if isinstance(pull, float):
            g_q = (-g_h.sum() * pull).to(q.dtype)
        else:
            g_q = (g_leak * pull).sum().to(q.dtype)
    g_x, through_leak = (g_pull, -g_pull) if rule.decay_input else (g_h, g_pull)
    if rule.order.charge_together:
        return g_x, (g_h + through_leak, None), g_q
    return g_x, (g_h, through_leak), g_q


def single_step(x: Tensor, v: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:func:`step`, with the spikes laid out as in a stack of one step, unless steps are selected."""
    s, v, h, pull = step(x, v, neuron)
    return s if neuron.rule.order.selects else restacked(s), v, h, pull


def single_step_vjp(
    h: Tensor, g_s: Tensor | None, g_v: Tensor | None, neuron: Neuron, pull: Tensor | float | None = None
) -> Gradients:
    """Gradients of :func:`single_step` from h and those of the spikes and the membrane, not both None.

    ``pull`` is the forward's fourth output; without it q gets no gradient.
    """
    dims, stacks = range(h.dim()), not neuron.rule.order.selects
    if stacks and g_s is not None and not is_contiguous_in(g_s, dims, zeros=is_contiguous_in(h, dims)):
        # Indexing a stack of one step leaves its gradient contiguous.
        g_s = torch.empty(g_s.shape, dtype=g_s.dtype, device=g_s.device).copy_(g_s)
    g_h = fire_reset_vjp(h, g_s, g_v, neuron.rule, neuron.surrogate)
    g_x, g_start, g_q = charge_vjp(g_h, neuron, pull)
    return Gradients(restacked(g_x) if stacks else g_x, g_start, [] if g_q is None else [g_q])


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
    order = neuron.rule.order
    return _together(spikes, order), v, _together(voltages, order) if store_v_seq else None


def _together(steps: list[Tensor], order: Order) -> Tensor:
    return torch.cat([step[None] for step in steps]) if order.cats else torch.stack(steps)


def sequence_vjp(
    x_seq: Tensor, v: Tensor | float, grads: OutputGradients, neuron: Neuron, wanted: Wanted
) -> Gradients:
    """Gradients of :func:`sequence` from its inputs and those of its outputs."""
    state = v if isinstance(v, Tensor) else torch.full_like(x_seq[0], v)
    order = neuron.rule.order
    hs: list[Any] = []
    pulls: list[Tensor | float | None] = []
    for x in x_seq:
        _, state, h, pull = step(x, state, neuron)
        hs.append(h)
        pulls.append(pull if wanted.q else None)
    if wanted.q and (number := number_pulling(v, neuron.rule)) is not None:
        pulls[0] = number
    g_s, carry, g_v_seq = grads
    if g_v_seq is not None:
        carry = g_v_seq[-1] if carry is None else carry + g_v_seq[-1]
    g_start: tuple[Tensor | None, Tensor | None] = (None, None)
    g_x: list[Tensor] = []
    g_q: list[Tensor] = []
    for t in reversed(range(len(hs))):
        g_st = None if g_s is None else g_s[t]
        g_h = fire_reset_vjp(hs[t], g_st, carry, neuron.rule, neuron.surrogate)
        g_xt, g_start, g_qt = charge_vjp(g_h, neuron, pulls[t])
        hs[t] = pulls[t] = None
        g_x.append(g_xt)
        if g_qt is not None:
            g_q.append(g_qt)
        terms = [one for one in g_start if one is not None]
        if g_v_seq is not None and t:
            terms.insert(len(terms) if order.v_seq_last else 0, g_v_seq[t - 1])
        carry = terms[0]
        for term in terms[1:]:
            carry = carry + term
    return Gradients(
        _gradient_of_steps(g_x[::-1], order) if wanted.x else None,
        g_start if wanted.v else (None, None),
        g_q,
    )


def number_pulling(v: Tensor | float, rule: Rule) -> float | None:
    """What q multiplies at the first step, where that is a number and no tensor."""
    if isinstance(v, Tensor) or not rule.order.numbers or rule.decay_input:
        return None
    return v if rule.scales else v - rule.rest


def _gradient_of_steps(steps: list[Tensor], order: Order) -> Tensor:
    if not order.selects:
        return torch.stack(steps)
    found = torch.empty((len(steps), *steps[0].shape), dtype=steps[0].dtype, device=steps[0].device)
    torch.stack(steps, out=found)
    return found.add_(0.0) if len(steps) > 1 else found
