"""The reversible spiking node: two halves of the channels, coupled so that a step can be undone.

The one idea: what a step adds to one half is a function of the other half, so it can be computed again and
taken away. Given outputs and states after a step, inputs and states before it come back, and the spikes
and membranes that the gradient needs come with them: one sweep back through time does both. Here are
the equations as autograd differentiates them, which is the specification; :mod:`.coupled_sweeps` does the
same in place, there and back. Neither knows of frameworks, modules, or the tape.

Source: Lei et al., "Towards Zero Memory Footprint Spiking Neural Network Training", arXiv 2308.08649,
with rounding to the dyadic grid (:mod:`.grid`), without which the division by beta makes errors grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.grid import check_bits, snap

# NOTE [What a step loses, and what is stored of it]
#
# Let u = 2^-bits be the grid of states and outputs, and beta = 2^-shift.
#
# 1. A membrane V = snap(S + (X - S) / tau) is only ever computed, never undone: it needs the same S and X.
# 2. Inputs are rounded to multiples of u / beta. Then beta X lies on the grid, Y = O + beta X is exact, and
#    X = (Y - O) / beta comes back from Y alone: an input costs no bit.
# 3. beta S, of a state that the node made itself, is rounded down to the grid and leaves a remainder of
#    `shift` bits. It is stored: log2(1 / beta) bits a neuron and step. A step shrinks the volume of the
#    states by exactly beta a neuron, so on a fixed grid fewer don't do; with beta = 1 there are none.
# 4. Between spikes the step is linear, with eigenvalues of sum (1 - 1 / tau)(1 + beta) and product
#    -beta^2: all below 1 if and only if beta < 1 / tau. Positive states that grow are reset; negative ones
#    are not.
# 5. A value that left the range shows in the walk back (grid, note, 3): outputs, the last states, and
#    each rebuilt state are looked at. Inputs and membranes need no look of their own.


class Rule(NamedTuple):
    """The settings of a node, all numbers: ``leak`` is 1 / tau (None: a tensor beside the rule).

    ``alpha`` is a multiple of 2^-bits, ``shift`` is log2(1 / beta).
    """

    leak: float | None
    v_threshold: float
    alpha: float
    shift: int
    bits: int
    detach_reset: bool

    @property
    def beta(self) -> float:
        """The coupling of the halves."""
        return 2.0**-self.shift


class Firing(NamedTuple):
    """A spike function of ``u = V - v_threshold`` that gives zeros and ones.

    ``fire`` is differentiable. ``strict``: it fires where ``u > 0``; False: where ``u >= 0``; None: only
    ``fire`` knows. ``vjp(grad, u)`` is its gradient; it may overwrite u, never grad. ``uniform``: its bits
    don't depend on where in memory an element lies (:mod:`.cuts`).
    """

    fire: Callable[[Tensor], Tensor]
    vjp: Callable[[Tensor, Tensor], Tensor]
    strict: bool | None
    uniform: bool = False


def rule_of(
    name: str,
    *,
    tau: float | None,
    alpha: float,
    beta: float,
    v_threshold: float,
    bits: int,
    detach_reset: bool,
) -> Rule:
    """A node's settings, checked. ``tau`` None: its inverse is a tensor beside the rule.

    Raises:
        ValueError: what does not fit, with ``name`` and the remedy.

    Example:
        >>> settings = dict(alpha=0.0, v_threshold=1.0, bits=16, detach_reset=False)
        >>> rule_of("node", tau=2.0, beta=0.25, **settings).shift
        2
        >>> rule_of("node", tau=2.0, beta=0.3, **settings)
        Traceback (most recent call last):
        ...
        ValueError: node: beta=0.3 is not a power of two in (0, 1], ... Take 0.25 or 0.5.
    """
    if tau is not None and not (math.isfinite(tau) and tau >= 1):
        raise ValueError(f"{name}: tau={tau!r}: give a finite number of time steps, 1 or more")
    if not (isinstance(beta, (int, float)) and 0 < beta <= 1 and math.frexp(beta)[0] == 0.5):
        near = ""
        if isinstance(beta, (int, float)) and 0 < beta < 1:
            lower = 2.0 ** math.floor(math.log2(beta))
            near = f" Take {lower:g} or {2 * lower:g}."
        raise ValueError(
            f"{name}: beta={beta!r} is not a power of two in (0, 1], and only by those can be divided "
            f"without an error.{near}"
        )
    for setting, value in (("v_threshold", v_threshold), ("alpha", alpha)):
        if not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{name}: {setting}={value!r}: give a finite number")
    check_bits(bits)
    shift = 1 - math.frexp(beta)[1]
    if shift > bits:
        raise ValueError(
            f"{name}: beta={beta:g} needs a grid of at least {shift} bits, not {bits}: its inputs are "
            "rounded to multiples of 2^-bits / beta"
        )
    alpha = round(alpha * 2.0**bits) / 2.0**bits
    return Rule(None if tau is None else 1 / tau, float(v_threshold), alpha, shift, bits, detach_reset)


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int) -> Tensor:
        return (z * 2.0**bits).floor_().mul_(2.0**-bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None


def sequence(
    x_seq: Tensor, s: Tensor | None, rule: Rule, firing: Firing, leak: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All steps, as the paper has them: the specification, differentiated by autograd.

    Args:
        x_seq: inputs [T, N, C, ...], C even.
        s: states before the first step [N, C, ...]; None for zeros.
        rule, firing: the node.
        leak: 1 / tau as a scalar tensor, where ``rule.leak`` is None.

    Returns:
        Outputs [T, N, C, ...] and states [N, C, ...], float32 (float64 for float64).

    Example:
        >>> import torch
        >>> rule = Rule(0.5, v_threshold=1.0, alpha=0.0, shift=1, bits=16, detach_reset=False)
        >>> heaviside = Firing(lambda u: (u >= 0).to(u), lambda grad, u: grad, strict=False)
        >>> y_seq, s = sequence(torch.full((1, 1, 2), 1.5), None, rule, heaviside)
        >>> y_seq.flatten(), s.flatten()
        (tensor([0.7500, 0.7500]), tensor([0.7500, 0.7500]))
    """
    q: Any = rule.leak if leak is None else leak
    x_seq = snap(x_seq, rule.bits - rule.shift)
    s1, s2 = (torch.zeros_like(x_seq[0]) if s is None else snap(s, rule.bits)).chunk(2, 1)
    outputs = []
    for x in x_seq:
        x1, x2 = x.chunk(2, 1)
        s1_old = s1
        y1, s1 = _half_step(x1, s1, x2, s2, rule, firing, q)
        y2, s2 = _half_step(y1, s1, x1, s1_old, rule, firing, q)
        outputs.append(torch.cat([y1, y2], 1))
    return torch.stack(outputs), torch.cat([s1, s2], 1)


def _half_step(
    x: Tensor, s: Tensor, x_other: Tensor, s_other: Tensor, rule: Rule, firing: Firing, q: Any
) -> tuple[Tensor, Tensor]:
    v = snap(s + (x - s) * q, rule.bits)
    o = firing.fire(v - rule.v_threshold)
    y = o + rule.beta * x_other
    o = o.detach() if rule.detach_reset else o
    reset = (1.0 - o) * v
    if rule.alpha:
        reset = reset + rule.alpha * o
    return y, reset + _Floor.apply(rule.beta * s_other, rule.bits)  # type: ignore[no-untyped-call]


def couple(o_seq: Tensor, x_seq: Tensor, rule: Rule) -> Tensor:
    """Outputs from spikes and inputs, as few operations on whole tensors, for a tape to record."""
    x_seq = torch.round(x_seq.to(o_seq.dtype) * 2.0 ** (rule.bits - rule.shift))
    return o_seq + torch.roll(x_seq, x_seq.shape[2] // 2, 2) * 2.0**-rule.bits
