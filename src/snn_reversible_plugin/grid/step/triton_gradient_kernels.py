"""What Triton compiles of gradients on the grid: through a surrogate and a reset, one launch a step.

The one idea: the operations of autograd in autograd's order, an element at a time, rounded as torch rounds
each, so that their bits are its bits and memory is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snn_reversible_plugin.grid.step.triton_kernels import parameter
from snn_reversible_plugin.ops.bits.triton_kernels import load_flags, tile

# NOTE [Surrogates of a kernel]
#
# 1. Products, sums and quotients are correctly rounded in torch on every device, and so are they here: `/`
#    is not on a GPU, so it is `div_rn`, and a tensor below a number is its reciprocal times that number.
# 2. What takes an exponential is left to torch, whose rounding of it is not Triton's.
# 3. A number that torch multiplies with is float32 where it is used: a, b and c come so from the host.
ATAN = tl.constexpr(0)  # b / (1 + (a u)^2)
FAST_SIGMOID = tl.constexpr(1)  # 1 / (a |u| + 1)^2
PIECEWISE_QUADRATIC = tl.constexpr(2)  # b - a |u|, 0 beyond c
SOFT_SIGN = tl.constexpr(3)  # 1 / (a (b + |u|)^2)
SUPER_SPIKE = tl.constexpr(4)  # a / (1 + |u|)^2


@triton.jit
def _through(g, u, a, b, c, SURROGATE: tl.constexpr):
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
    else:
        tl.static_assert(SURROGATE == SUPER_SPIKE)
        far = tl.abs(u) + 1.0
        return tl.div_rn(g * a, far * far)


@triton.jit
def surrogate(
    h, theta, g, out, n, a, b, c, THETA: tl.constexpr, SURROGATE: tl.constexpr, SIZE: tl.constexpr
):
    """The gradient of membranes from that of their spikes."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < n
    u = tl.load(h + index, mask=mask, other=0.0) - parameter(theta, index, mask, THETA)
    through = _through(tl.load(g + index, mask=mask, other=0.0), u, a, b, c, SURROGATE)
    tl.store(out + index, through, mask=mask)


@triton.jit
def step(
    h, g_s, g_v, by_v, by_x, n, s_next, v_next, threshold, to, beta, gain, a, b, c, BETA: tl.constexpr,
    OF_SPIKES: tl.constexpr, OF_V: tl.constexpr, TO_V: tl.constexpr, GAINS: tl.constexpr,
    SOFT: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The gradients of the membrane before a step, and of its current, from those after it.

    OF_SPIKES, OF_V: which are given; TO_V: the first is wanted; GAINS: the current was multiplied.
    """
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = index < n
    charged = tl.load(h + index, mask=mask, other=0.0)
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
            g = kept + _through(total, u, a, b, c, SURROGATE)
    else:
        g = _through(of_s, u, a, b, c, SURROGATE)
    if TO_V:
        tl.store(by_v + index, g * parameter(beta, index, mask, BETA), mask=mask)
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
