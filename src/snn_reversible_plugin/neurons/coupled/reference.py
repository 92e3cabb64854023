"""The reversible spiking node: two groups of channels, coupled so that a step can be undone.

The one idea: what a step adds to one group is a function of the other, so it can be computed again and
taken away. Given outputs and states after a step, inputs and states before it come back, and the spikes
and membranes that the gradient needs come with them: one sweep back through time does both. Here are
the equations as autograd differentiates them, which is the specification; :mod:`.in_place` does the
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
from snn_reversible_plugin.neurons.surrogates import Surrogate

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


class Constants(NamedTuple):
    """The settings of a node, all numbers: ``leak`` is 1 / tau (None: a tensor beside them).

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
        """How much of one group goes into the other."""
        return 2.0**-self.shift


class Node(NamedTuple):
    """A node in one call. ``surrogate`` gives zeros and ones; ``name`` is for errors.

    ``leak`` is 1 / tau as a scalar tensor, where the constants have none.
    """

    constants: Constants
    surrogate: Surrogate
    name: str
    leak: Tensor | None = None


def constants_of(
    name: str,
    *,
    tau: float | None,
    alpha: float,
    beta: float,
    v_threshold: float,
    bits: int,
    detach_reset: bool,
) -> Constants:
    """A node's settings, checked. ``tau`` None: its inverse is a tensor beside them.

    Raises:
        ValueError: what does not fit, with ``name`` and the remedy.

    Example:
        >>> settings = dict(alpha=0.0, v_threshold=1.0, bits=16, detach_reset=False)
        >>> constants_of("node", tau=2.0, beta=0.25, **settings).shift
        2
        >>> constants_of("node", tau=2.0, beta=0.3, **settings)
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
    return Constants(None if tau is None else 1 / tau, float(v_threshold), alpha, shift, bits, detach_reset)


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int) -> Tensor:
        return (z * 2.0**bits).floor_().mul_(2.0**-bits)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g, None


def sequence(
    x_seq: Tensor,
    s: Tensor | None,
    constants: Constants,
    fire: Callable[[Tensor], Tensor],
    leak: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All steps, as the paper has them: the specification, differentiated by autograd.

    Args:
        x_seq: inputs [T, N, C, ...], C even.
        s: states before the first step [N, C, ...]; None for zeros.
        constants: the node's.
        fire: its surrogate as autograd differentiates it, from ``V - v_threshold`` to zeros and ones.
        leak: 1 / tau as a scalar tensor, where the constants have none.

    Returns:
        Outputs [T, N, C, ...] and states [N, C, ...], float32 (float64 for float64).

    Example:
        >>> import torch
        >>> constants = Constants(0.5, v_threshold=1.0, alpha=0.0, shift=1, bits=16, detach_reset=False)
        >>> y_seq, s = sequence(torch.full((1, 1, 2), 1.5), None, constants, lambda u: (u >= 0).to(u))
        >>> y_seq.flatten(), s.flatten()
        (tensor([0.7500, 0.7500]), tensor([0.7500, 0.7500]))
    """
    q: Any = constants.leak if leak is None else leak
    x_seq = snap(x_seq, constants.bits - constants.shift)
    s1, s2 = (torch.zeros_like(x_seq[0]) if s is None else snap(s, constants.bits)).chunk(2, 1)

    def group_step(x: Tensor, s: Tensor, x_other: Tensor, s_other: Tensor) -> tuple[Tensor, Tensor]:
        v = snap(s + (x - s) * q, constants.bits)
        o = fire(v - constants.v_threshold)
        y = o + constants.beta * x_other
        o = o.detach() if constants.detach_reset else o
        reset = (1.0 - o) * v
        if constants.alpha:
            reset = reset + constants.alpha * o
        return y, reset + _Floor.apply(constants.beta * s_other, constants.bits)  # type: ignore[no-untyped-call]

    outputs = []
    for x in x_seq:
        x1, x2 = x.chunk(2, 1)
        s1_old = s1
        y1, s1 = group_step(x1, s1, x2, s2)
        y2, s2 = group_step(y1, s1, x1, s1_old)
        outputs.append(torch.cat([y1, y2], 1))
    return torch.stack(outputs), torch.cat([s1, s2], 1)


def couple(o_seq: Tensor, x_seq: Tensor, constants: Constants) -> Tensor:
    """Outputs from spikes and inputs, as few operations on whole tensors, for a tape to record."""
    x_seq = torch.round(x_seq.to(o_seq.dtype) * 2.0 ** (constants.bits - constants.shift))
    return o_seq + torch.roll(x_seq, x_seq.shape[2] // 2, 2) * 2.0**-constants.bits
