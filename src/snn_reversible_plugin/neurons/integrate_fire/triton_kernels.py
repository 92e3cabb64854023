"""What Triton compiles of a neuron over a sequence: every time step in one launch there, and in one back.

The one idea: neurons don't see each other, so a program takes its neurons through all of time. What comes
back needs the charged membranes: a first sweep makes them of the currents, where the currents or their
gradients are, and a second one goes back over them.

Source: the integrate-and-fire family and its surrogates in SpikingJelly (Fang et al., Science Advances 9,
2023); the order of operations is that of its Triton kernels, version 2.0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snn_reversible_plugin.ops.bits.triton_kernels import tile

# NOTE [The same bits as stock's kernels]
#
# 1. Operations, their order, and how each of them rounds are those of stock: where stock writes `div_rn`,
#    `/` or `fma`, so is it here. `/` is not correctly rounded on a GPU, and a fused product isn't rounded
#    at all. All else is compiled with fusion off, by the caller.
# 2. A sum with 0 stands where stock adds a gradient that is not there: it makes +0 of -0.
# 3. Currents and gradients are float32 once loaded; membranes are float32 in memory too.
#
# NOTE [Two sweeps over one place]
#
# 1. Membranes are float32. Where the currents' gradient is too, they are kept in its place, step by step,
#    and each is read before its gradient is written there. That place may be the currents' own.
# 2. Gradients of half precision have no room for them. There a program has a place of its own for the
#    membranes of its neurons, T rows, and goes over several blocks of neurons; it stays in the cache.
# 3. An element may be written by one thread and read by another: between the sweeps, and before a place is
#    used for the next block, the threads of a program wait for each other.
NO_LEAK = tl.constexpr(0)  # what decays in a charge: nothing,
LEAK = tl.constexpr(1)  # the membrane,
LEAK_AND_INPUT = tl.constexpr(2)  # or the current as well;
KEEP = tl.constexpr(3)  # or the membrane, of which a part is kept
FINAL = tl.constexpr(1)  # which membranes have a gradient: the final one,
ALL = tl.constexpr(2)  # or those after each step
SIGMOID = tl.constexpr(0)
ATAN = tl.constexpr(1)
PIECEWISE_QUADRATIC = tl.constexpr(2)
PIECEWISE_EXP = tl.constexpr(3)
SOFT_SIGN = tl.constexpr(4)
SUPER_SPIKE = tl.constexpr(5)
ERF = tl.constexpr(6)
_HALF_PI = tl.constexpr(1.5707963267948966)
_INVERSE_SQRT_PI = tl.constexpr(0.5641895835477563)


@triton.jit
def slope(u, alpha, SURROGATE: tl.constexpr):
    """The derivative of a surrogate at ``u = h - v_threshold``."""
    if SURROGATE == SIGMOID:
        y = tl.div_rn(1.0, 1.0 + tl.exp(-alpha * u))
        return (1.0 - y) * y * alpha
    elif SURROGATE == ATAN:
        scaled = u * (_HALF_PI * alpha)
        return (0.5 * alpha) / (1.0 + scaled * scaled)
    elif SURROGATE == PIECEWISE_QUADRATIC:
        return tl.maximum(0.0, alpha - alpha * alpha * tl.abs(u))
    elif SURROGATE == PIECEWISE_EXP:
        return (0.5 * alpha) * tl.exp(-alpha * tl.abs(u))
    elif SURROGATE == SOFT_SIGN:
        far = tl.div_rn(1.0, alpha) + tl.abs(u)
        return tl.div_rn(1.0, 2.0 * alpha * far * far)
    elif SURROGATE == SUPER_SPIKE:
        far = 1.0 + tl.abs(u)
        return tl.div_rn(alpha, far * far)
    else:
        tl.static_assert(SURROGATE == ERF)
        scaled = alpha * u
        return (_INVERSE_SQRT_PI * alpha) * tl.exp(-scaled * scaled)


@triton.jit
def charge(x, v, tau, rest, LEAKS: tl.constexpr, MULTIPLIES: tl.constexpr):
    """The charged membrane; tau is 1 / tau where it MULTIPLIES, and the part that is kept where KEEP."""
    if LEAKS == NO_LEAK:
        return v + x
    elif LEAKS == KEEP:
        return v * tau + x
    else:
        pull = x - (v - rest) if LEAKS == LEAK_AND_INPUT else v - rest
        leak = pull * tau if MULTIPLIES else tl.div_rn(pull, tau)
        return v + leak if LEAKS == LEAK_AND_INPUT else v - leak + x


@triton.jit
def reset(h, s, threshold, to, SOFT: tl.constexpr):
    """The membrane after a step with the spikes s."""
    return h - s * threshold if SOFT else s * to + (1.0 - s) * h


@triton.jit
def start(v, index, mask, EACH: tl.constexpr):
    """The membranes before the first step, of a place or of one number."""
    if EACH:
        return tl.load(v + index, mask=mask, other=0.0)
    else:
        return tl.zeros(index.shape, tl.float32) + tl.cast(v, tl.float32)


@triton.jit
def time_constant(tau, LEAKS: tl.constexpr, LEARNS: tl.constexpr):
    """What :func:`charge` takes: of what learns, a place of 1 / tau is given."""
    if not LEARNS:
        return tl.cast(tau, tl.float32)
    elif LEAKS == KEEP:
        return 1.0 - tl.load(tau)
    else:
        return tl.load(tau)


@triton.jit
def forward(
    x, v, tau, spikes, v_seq, v_last, T, n, x_step, x_next, s_step, v_step, threshold, to,
    LEAKS: tl.constexpr, LEARNS: tl.constexpr, MULTIPLIES: tl.constexpr, SOFT: tl.constexpr,
    EACH: tl.constexpr, V_SEQ: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Spikes [T, n], and membranes after each step, if they are wanted."""
    _groups, index = tile(ROWS)
    mask = index < n
    tau = time_constant(tau, LEAKS, LEARNS)
    threshold = tl.cast(threshold, tl.float32)
    to = tl.cast(to, tl.float32)
    state = start(v, index, mask, EACH)
    of_x = index * x_next
    for _ in range(T):
        current = tl.load(x + of_x, mask=mask, other=0.0).to(tl.float32)
        h = charge(current, state, tau, to, LEAKS, MULTIPLIES)
        s = (h >= threshold).to(tl.float32)
        state = reset(h, s, threshold, to, SOFT)
        tl.store(spikes + index, s.to(spikes.dtype.element_ty), mask=mask)
        if V_SEQ:
            tl.store(v_seq + index, state, mask=mask)
            v_seq += v_step
        x += x_step
        spikes += s_step
    tl.store(v_last + index, state, mask=mask)


@triton.jit
def _through_reset(g_s, g_v, h, k, threshold, to, SOFT: tl.constexpr, DETACH: tl.constexpr):
    """The gradient of h from those of its spikes and of the membrane after them; k: the slope at h."""
    kept = 1.0
    if not SOFT:
        kept = 1.0 - (h >= threshold).to(tl.float32)
    if not DETACH:
        kept = kept - threshold * k if SOFT else kept + (to - h) * k
    return g_s * k + g_v * kept


@triton.jit
def _through_reset_fused(g_s, g_v, h, k, threshold, to, SOFT: tl.constexpr, DETACH: tl.constexpr):
    """The same as stock has it for a leak that is a number: products are fused with sums."""
    if SOFT:
        of_s = g_s if DETACH else g_s - threshold * g_v
        return tl.fma(of_s, k, g_v)
    else:
        of_s = g_s if DETACH else tl.fma(g_v, to - h, g_s)
        return tl.fma(of_s, k, g_v * (1.0 - (h >= threshold).to(tl.float32)))


@triton.jit
def backward(
    x, v, tau, g_s, g_v, g_x, own, g_start, g_tau, v_last, T, n, blocks, x_step, x_next, s_step, s_next,
    v_step, v_next, g_step, threshold, to, alpha, LEAKS: tl.constexpr, LEARNS: tl.constexpr,
    SOFT: tl.constexpr, DETACH: tl.constexpr, SURROGATE: tl.constexpr, EACH: tl.constexpr,
    OF_SPIKES: tl.constexpr, OF_V: tl.constexpr, OF_START: tl.constexpr, OF_TAU: tl.constexpr,
    V_LAST: tl.constexpr, OWN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The currents' gradient into g_x.

    ``own``: [programs, T, SIZE], a place for each program's membranes, where OWN. OF_SPIKES, OF_V: which
    gradients there are. OF_START, OF_TAU, V_LAST: what else is wanted, the starting membrane's gradient,
    that of 1 / tau neuron by neuron, and the final membrane. Pointers to all else are not used.
    """
    tau = time_constant(tau, LEAKS, LEARNS)
    threshold = tl.cast(threshold, tl.float32)
    to = tl.cast(to, tl.float32)
    alpha = tl.cast(alpha, tl.float32)
    lane = tl.arange(0, SIZE)
    of_x, of_s, of_v = lane.to(tl.int64) * x_next, lane.to(tl.int64) * s_next, lane.to(tl.int64) * v_next
    last = tl.cast(T, tl.int64) - 1
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        base = tl.cast(block, tl.int64) * SIZE
        mask = lane < tl.minimum(n - base, SIZE).to(tl.int32)
        state = start(v, base + lane, mask, EACH)
        if OWN:
            membranes, h_step = own + tl.program_id(0).to(tl.int64) * T * SIZE, SIZE
        else:
            membranes, h_step = g_x + base, g_step
        x_row, h_row = x + base * x_next, membranes
        for _ in range(T):
            current = tl.load(x_row + of_x, mask=mask, other=0.0).to(tl.float32)
            h = charge(current, state, tau, to, LEAKS, LEARNS)
            tl.store(h_row + lane, h, mask=mask)
            state = reset(h, (h >= threshold).to(tl.float32), threshold, to, SOFT)
            x_row += x_step
            h_row += h_step
        if V_LAST:
            tl.store(v_last + base + lane, state, mask=mask)
        tl.debug_barrier()
        x_row, h_row = x + base * x_next + last * x_step, membranes + last * h_step
        g_row = g_x + base + last * g_step
        carry = tl.zeros(lane.shape, tl.float32)
        of_tau = tl.zeros(lane.shape, tl.float32)
        if OF_SPIKES:
            s_row = g_s + base * s_next + last * s_step
        if OF_V:
            v_row = g_v + base * v_next + last * v_step
        if OF_V == FINAL:
            carry = tl.load(v_row + of_v, mask=mask, other=0.0)
        for step in range(T):
            h = tl.load(h_row + lane, mask=mask, other=0.0)
            g_spike = tl.zeros(lane.shape, tl.float32)
            if OF_SPIKES:
                g_spike = tl.load(s_row + of_s, mask=mask, other=0.0).to(tl.float32)
                s_row -= s_step
            if OF_V == ALL:
                carry = tl.load(v_row + of_v, mask=mask, other=0.0) + carry
                v_row -= v_step
            elif LEARNS or LEAKS == NO_LEAK:
                carry = carry + 0.0
            k = slope(h - threshold, alpha, SURROGATE)
            if LEARNS or LEAKS == NO_LEAK:
                g_h = _through_reset(g_spike, carry, h, k, threshold, to, SOFT, DETACH)
            else:
                g_h = _through_reset_fused(g_spike, carry, h, k, threshold, to, SOFT, DETACH)
            share = g_h
            if LEARNS:
                share = g_h * tau
                carry = g_h - share
            elif LEAKS == NO_LEAK:
                carry = g_h
            else:
                share = g_h * (1.0 / tau)
                carry = g_h * (1.0 - 1.0 / tau)
            if OF_TAU:
                if step + 1 < T:
                    h = tl.load(h_row - h_step + lane, mask=mask, other=0.0)
                    before = reset(h, (h >= threshold).to(tl.float32), threshold, to, SOFT)
                else:
                    before = start(v, base + lane, mask, EACH)
                pull = -(before - to)
                if LEAKS == LEAK_AND_INPUT:
                    pull = tl.load(x_row + of_x, mask=mask, other=0.0).to(tl.float32) - (before - to)
                of_tau = of_tau + g_h * pull
            g_current = share if LEAKS == LEAK_AND_INPUT else g_h
            tl.store(g_row + lane, g_current.to(g_x.dtype.element_ty), mask=mask)
            x_row -= x_step
            h_row -= h_step
            g_row -= g_step
        if OF_START:
            tl.store(g_start + base + lane, carry, mask=mask)
        if OF_TAU:
            tl.store(g_tau + base + lane, of_tau, mask=mask)
        tl.debug_barrier()
