"""What Triton compiles of gradients on the grid: through a surrogate and a reset, one launch a step.

That launch undoes the step, too, where nobody has yet: the charged membrane is in registers only.

The one idea: the operations of autograd in autograd's order, an element at a time, rounded as torch rounds
each, so that their bits are its bits and memory is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from snn_reversible_plugin.grid.step.triton_kernels import (
    MINUS_THETA_AT_ONCE,
    VALUE_AT_ONCE,
    before_reset,
    parameter,
    rounded,
    undone,
)
from snn_reversible_plugin.ops.bits.triton_kernels import load_flags, tile

# NOTE [Surrogates of a kernel]
#
# 1. Products, sums and quotients are correctly rounded in torch on every device, and so are they here: `/`
#    is not on a GPU, so it is `div_rn`, and a tensor below a number is its reciprocal times that number.
# 2. Triton's own exponential is an approximation of the device's. CUDA's, which torch is compiled with, is
#    libdevice's. Triton links it so that it takes denormal numbers for zeros: their exponential is 1 either
#    way, and what it gives may be denormal, as torch's.
# 3. A number that torch multiplies with is float32 where it is used: a, b and c come so from the host.
ATAN = tl.constexpr(0)  # b / (1 + (a u)^2)
FAST_SIGMOID = tl.constexpr(1)  # 1 / (a |u| + 1)^2
PIECEWISE_QUADRATIC = tl.constexpr(2)  # b - a |u|, 0 beyond c
SOFT_SIGN = tl.constexpr(3)  # 1 / (a (b + |u|)^2)
SUPER_SPIKE = tl.constexpr(4)  # a / (1 + |u|)^2
SIGMOID = tl.constexpr(5)  # a s (1 - s), s = 1 / (1 + exp(-a u))
PIECEWISE_EXP = tl.constexpr(6)  # b exp(a |u|)
ERF = tl.constexpr(7)  # b exp(-(a u)^2)
SIGMOID_BY_EXP = tl.constexpr(8)  # a e / (1 + e)^2, e = exp(b u)
CHARGED = tl.constexpr(0)  # which membrane a step's gradient starts from: the charged one,
AFTER = tl.constexpr(1)  # or the one after, whose reset is to be undone,
TO_BEFORE = tl.constexpr(2)  # and its charge as well


@triton.jit
def through_surrogate(g, u, a, b, c, SURROGATE: tl.constexpr):
    """The gradient g times the derivative of a surrogate at u."""
    if SURROGATE == ATAN:
        scaled = u * a
        return tl.div_rn(1.0, scaled * scaled + 1.0) * b * g
    elif SURROGATE == FAST_SIGMOID:
        far = tl.abs(u) * a + 1.0
        return tl.div_rn(g, far * far)
    elif SURROGATE == PIECEWISE_QUADRATIC:
        size = tl.abs(u)
        return tl.where(size > c, 0.0, g * (size * -a + b))
    elif SURROGATE == SOFT_SIGN:
        far = tl.abs(u) + b
        return tl.div_rn(g, far * far * a)
    elif SURROGATE == SUPER_SPIKE:
        far = tl.abs(u) + 1.0
        return tl.div_rn(g * a, far * far)
    elif SURROGATE == SIGMOID:
        s = tl.div_rn(1.0, 1.0 + libdevice.exp(-(u * a)))
        return g * (1.0 - s) * s * a
    elif SURROGATE == PIECEWISE_EXP:
        return libdevice.exp(tl.abs(u) * a) * b * g
    elif SURROGATE == ERF:
        scaled = u * a
        return g * libdevice.exp(-(scaled * scaled)) * b
    else:
        tl.static_assert(SURROGATE == SIGMOID_BY_EXP)
        e = libdevice.exp(u * b)
        far = e + 1.0
        return tl.div_rn(g * a * e, far * far)


@triton.jit
def surrogate(
    h, theta, g, out, n, a, b, c, THETA: tl.constexpr, SURROGATE: tl.constexpr, SIZE: tl.constexpr
):
    """The gradient of membranes from that of their spikes."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < n
    u = tl.load(h + index, mask=mask, other=0.0) - parameter(theta, index, mask, THETA)
    through = through_surrogate(tl.load(g + index, mask=mask, other=0.0), u, a, b, c, SURROGATE)
    tl.store(out + index, through, mask=mask)


@triton.jit
def step(
    h, x, bits, digits, planes, before, g_s, g_v, by_v, by_x, n, s_next, v_next, threshold, to, beta, gain,
    scale, unit, a, b, c, BETA: tl.constexpr, OF_SPIKES: tl.constexpr, OF_V: tl.constexpr,
    TO_V: tl.constexpr, GAINS: tl.constexpr, SOFT: tl.constexpr, DETACH: tl.constexpr,
    SURROGATE: tl.constexpr, UNDO: tl.constexpr, DIGIT_BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of the membrane before a step, and of its current, from those after it.

    OF_SPIKES, OF_V: which are given; TO_V: the first is wanted; GAINS: the current was multiplied. UNDO:
    what ``h`` is; with TO_BEFORE, the membrane before the step is written to ``before``.
    """
    groups, index = tile(ROWS)
    mask = index < n
    betas = parameter(beta, index, mask, BETA)
    charged = tl.load(h + index, mask=mask, other=0.0)
    if UNDO != CHARGED:
        s = load_flags(bits, groups, n)
        theta = tl.cast(threshold, tl.float32) * scale
        RESET: tl.constexpr = MINUS_THETA_AT_ONCE if SOFT else VALUE_AT_ONCE
        charged = before_reset(charged, s, planes, theta, unit, index, mask, n, RESET)
    if UNDO == TO_BEFORE:
        w = charged * scale - rounded(tl.load(x + index, mask=mask, other=0.0) * gain * scale)
        whole = undone(w, betas, digits, groups, index, mask, n, DIGIT_BITS)
        tl.store(before + index, whole.to(tl.float32) * unit, mask=mask)
    u = charged - threshold
    if OF_SPIKES:
        of_s = tl.load(g_s + index * s_next, mask=mask, other=0.0)
    if OF_V:
        of_v = tl.load(g_v + index * v_next, mask=mask, other=0.0)
        kept = of_v
        if not SOFT:
            kept = of_v * (1.0 - (u >= 0).to(tl.float32))
        if DETACH and not OF_SPIKES:
            g = kept
        else:
            if DETACH:
                total = of_s
            elif SOFT:
                total = -of_v * threshold
                if OF_SPIKES:
                    total = of_s + total
            else:
                total = -(of_v * charged)
                if OF_SPIKES:
                    total = of_s + total
                total = total + of_v * to
            g = kept + through_surrogate(total, u, a, b, c, SURROGATE)
    else:
        g = through_surrogate(of_s, u, a, b, c, SURROGATE)
    if TO_V:
        tl.store(by_v + index, g * betas, mask=mask)
    if GAINS:
        g = g * gain
    tl.store(by_x + index, g, mask=mask)


@triton.jit
def gate(g, factor, bits, out, n, FACTOR: tl.constexpr, ROWS: tl.constexpr):
    """``g * factor`` times 0 where neurons fired."""
    groups, index = tile(ROWS)
    mask = index < n
    product = tl.load(g + index, mask=mask, other=0.0) * parameter(factor, index, mask, FACTOR)
    product = product * (1 - load_flags(bits, groups, n)).to(tl.float32)
    tl.store(out + index, product, mask=mask)


@triton.jit
def add_past_reset(h, threshold, g, out, n, SIZE: tl.constexpr):
    """Add g times 0 where the potentials fire."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < n
    s = (tl.load(h + index, mask=mask, other=0.0) - threshold >= 0).to(tl.float32)
    past = tl.load(g + index, mask=mask, other=0.0) * (1.0 - s)
    tl.store(out + index, past + tl.load(out + index, mask=mask, other=0.0), mask=mask)


@triton.jit
def add_through_reset(h, threshold, to, g_v, g_s, n, SOFT: tl.constexpr, SIZE: tl.constexpr):
    """Add to the spikes' gradients what comes to them through the reset."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < n
    of_v = tl.load(g_v + index, mask=mask, other=0.0)
    total = tl.load(g_s + index, mask=mask, other=0.0)
    if SOFT:
        total = total + -of_v * threshold
    else:
        total = total + -(of_v * tl.load(h + index, mask=mask, other=0.0)) + of_v * to
    tl.store(g_s + index, total, mask=mask)
