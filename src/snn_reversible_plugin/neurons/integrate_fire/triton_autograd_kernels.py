"""What Triton compiles of a sequence's way back where stock is torch code, recorded by autograd.

The one idea: the operations and the sums are autograd's, in the order that a release's code leaves them in
(:class:`.reference.Order`), an element at a time, in one launch where autograd makes some ten a time step.

Source: ``reference.sequence_vjp``, which is the specification; neurons of SpikingJelly before 2.0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snn_reversible_plugin.grid.step.triton_gradient_kernels import through_surrogate
from snn_reversible_plugin.neurons.integrate_fire.triton_kernels import (
    KEEP,
    LEAK_AND_INPUT,
    NO_LEAK,
    charge,
    reset,
    start,
    time_constant,
)

# NOTE [A gradient that is not there]
#
# Autograd adds nothing where there is no gradient, and a sum with 0 would make +0 of -0. But x + -0 is x,
# for both zeros too: so -0 stands for what is not there. Where it would be multiplied, and so become some
# zero or a NaN, the result is what is chosen (`carried`). Triton takes a literal -0.0 for 0.0.
#
# NOTE [The gradient of a learned leak]
#
# It is a sum over neurons at each step, which torch adds up in an order of its own. So the products are
# written, a row a step, and torch adds them up. Their rows hold the charged membranes before, so that the
# gradient of the currents can be written over these.
#
# NOTE [Half precision]
#
# What comes in is widened and what goes out is rounded, once each; the rest is float32. Currents' gradients
# have no room for membranes then (`triton_kernels`, note on two sweeps, 2): a program has a place of its
# own, unless a learned leak's products have one, and goes over several blocks. Others have one block, and
# the bounds say so to the compiler: where it keeps the loop, some kernels need memory beside registers.
IN_TURN = tl.constexpr(0)  # how the spikes' gradient adds up at a hard reset: (g_s - g_v h) + g_v v_reset,
VALUE_FIRST = tl.constexpr(1)  # (g_s + g_v v_reset) - g_v h,
TOGETHER = tl.constexpr(2)  # or g_s + (g_v v_reset - g_v h)


@triton.jit
def _of_spikes(g_s, g_v, h, threshold, to, SOFT: tl.constexpr, SUM: tl.constexpr, OF_SPIKES: tl.constexpr):
    """The gradient of spikes, their own and through the reset."""
    if SOFT:
        term = -g_v * threshold
        return g_s + term if OF_SPIKES else term
    else:
        through, value = -(g_v * h), g_v * to
        if not OF_SPIKES:
            return through + value
        elif SUM == TOGETHER:
            return g_s + (through + value)
        elif SUM == VALUE_FIRST:
            return (g_s + value) + through
        else:
            return (g_s + through) + value


@triton.jit
def backward(
    x, v, tau, g_s, g_v, g_v_seq, g_x, membranes, g_start, g_leak, v_last, T, n, blocks, x_step, x_next,
    s_step, s_next, v_next, v_seq_step, v_seq_next, g_step, h_step, threshold, to, a, b, c,
    LEAKS: tl.constexpr, LEARNS: tl.constexpr, MULTIPLIES: tl.constexpr, SOFT: tl.constexpr,
    DETACH: tl.constexpr, SUM: tl.constexpr, V_SEQ_LAST: tl.constexpr, NO_MINUS: tl.constexpr,
    SURROGATE: tl.constexpr, EACH: tl.constexpr, NUMBER: tl.constexpr, OF_SPIKES: tl.constexpr,
    OF_V: tl.constexpr, OF_V_SEQ: tl.constexpr, STARTS: tl.constexpr, OF_LEAK: tl.constexpr,
    V_LAST: tl.constexpr, OWN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The currents' gradient into g_x, from those of spikes, of the final membrane, and of all.

    ``membranes``: [T, n] that the charged ones are put to, g_x where not OF_LEAK; with it, what adds up to
    the gradient of 1 / tau is left there. Where OWN it is [programs * T, SIZE], a place for each program's.
    STARTS: in how many terms the starting membrane's gradient is wanted, in g_start and g_leak. V_SEQ_LAST:
    gradients of all membranes are added last. NO_MINUS: before it is rounded, no zero of the currents'
    gradient is negative. NUMBER: the first membrane is a number, which the leak's gradient is multiplied
    with when it has been added up.
    """
    tau = time_constant(tau, LEAKS, LEARNS)
    threshold = tl.cast(threshold, tl.float32)
    to = tl.cast(to, tl.float32)
    a, b, c = tl.cast(a, tl.float32), tl.cast(b, tl.float32), tl.cast(c, tl.float32)
    last = tl.cast(T, tl.int64) - 1
    first = tl.program_id(0)
    for block in range(first, blocks if OWN else first + 1, tl.num_programs(0) if OWN else 1):
        lane = tl.cast(block, tl.int64) * SIZE + tl.arange(0, SIZE)
        mask = lane < n
        of_x, of_s, of_v_seq = lane * x_next, lane * s_next, lane * v_seq_next
        of_h = lane
        if OWN:
            of_h = tl.program_id(0).to(tl.int64) * T * SIZE + tl.arange(0, SIZE)
        x_row, h_row = x, membranes
        state = start(v, lane, mask, EACH)
        for _ in range(T):
            current = tl.load(x_row + of_x, mask=mask, other=0.0).to(tl.float32)
            h = charge(current, state, tau, to, LEAKS, MULTIPLIES)
            tl.store(h_row + of_h, h, mask=mask)
            state = reset(h, (h >= threshold).to(tl.float32), threshold, to, SOFT)
            x_row += x_step
            h_row += h_step
        if V_LAST:
            tl.store(v_last + lane, state, mask=mask)
        tl.debug_barrier()
        x_row -= x_step
        h_row -= h_step
        g_row = g_x + last * g_step
        nothing = -tl.zeros(lane.shape, tl.float32)
        carry = nothing
        leak = tl.zeros(lane.shape, tl.float32)
        g_h = tl.zeros(lane.shape, tl.float32)
        if OF_SPIKES:
            s_row = g_s + last * s_step
        if OF_V:
            carry = tl.load(g_v + lane * v_next, mask=mask, other=0.0)
        if OF_V_SEQ:
            v_row = g_v_seq + last * v_seq_step
            carry = carry + tl.load(v_row + of_v_seq, mask=mask, other=0.0)
        for step in range(T):
            h = tl.load(h_row + of_h, mask=mask, other=0.0)
            u = h - threshold
            g_spike = carry
            if OF_SPIKES:
                g_spike = tl.load(s_row + of_s, mask=mask, other=0.0).to(tl.float32)
                s_row -= s_step
            kept = carry
            if not SOFT:
                kept = carry * (1.0 - (u >= 0).to(tl.float32))
            if DETACH and not OF_SPIKES:
                g_h = kept
            else:
                total = g_spike
                if not DETACH:
                    total = _of_spikes(g_spike, carry, h, threshold, to, SOFT, SUM, OF_SPIKES)
                if not (OF_V or OF_V_SEQ):
                    carried = step > 0
                    total = tl.where(carried, total, g_spike)
                    kept = tl.where(carried, kept, nothing)
                g_h = kept + through_surrogate(total, u, a, b, c, SURROGATE)
            g_current = g_h
            if LEAKS == NO_LEAK:
                carry = g_h
            elif LEAKS == KEEP:
                carry = g_h * tau
            else:
                leak = g_h * tau if MULTIPLIES else tl.div_rn(g_h, tau)
                carry = g_h - leak
                if LEAKS == LEAK_AND_INPUT:
                    g_current = leak
            if OF_V_SEQ:
                v_row -= v_seq_step
                above = tl.load(v_row + of_v_seq, mask=mask & (step + 1 < T), other=nothing)
                if LEAKS == NO_LEAK or LEAKS == KEEP or V_SEQ_LAST:  # noqa: SIM109 - Triton knows no `in`
                    carry = carry + above
                else:
                    carry = (above + g_h) - leak
            if OF_LEAK:
                before = start(v, lane, mask, EACH)
                if step + 1 < T:
                    h = tl.load(h_row - h_step + of_h, mask=mask, other=0.0)
                    before = reset(h, (h >= threshold).to(tl.float32), threshold, to, SOFT)
                if LEAKS == KEEP:
                    product = g_h * before
                elif LEAKS == LEAK_AND_INPUT:
                    current = tl.load(x_row + of_x, mask=mask, other=0.0).to(tl.float32)
                    product = g_h * (current - (before - to))
                else:
                    product = -g_h * (before - to)
                if NUMBER:
                    product = tl.where(step + 1 < T, product, g_h)
                tl.store(h_row + of_h, product, mask=mask)
            if NO_MINUS:
                g_current = g_current + 0.0
            tl.store(g_row + lane, g_current.to(g_x.dtype.element_ty), mask=mask)
            x_row -= x_step
            h_row -= h_step
            g_row -= g_step
        if STARTS == 1:
            tl.store(g_start + lane, carry, mask=mask)
        elif STARTS == 2:
            tl.store(g_start + lane, g_h, mask=mask)
            tl.store(g_leak + lane, -leak, mask=mask)
        if OWN:
            tl.debug_barrier()
