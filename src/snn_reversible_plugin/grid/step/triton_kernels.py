"""What Triton compiles of a neuron's step on the grid and back: each step is one launch.

The one idea: on the grid states are integers below 2^24 and a decay is p / 2^e with p below 2^24, so that
rounding and its inverse are integer arithmetic on the device, with factors that never leave it.

Source: MacKay et al., "Reversible Recurrent Neural Networks", NeurIPS 2018.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snn_reversible_plugin.ops.bits.triton_kernels import load_bits, load_flags, store_bits, tile

# NOTE [Integer arithmetic]
#
# 1. A float32 beta in [2^-16, 1] is p / 2^e for its significand p, 2^23 <= p < 2^24, and 23 <= e <= 39.
#    With |U| < 2^30, the product U p is below 2^54, and v = floor(beta U + 1/2) = (U p + 2^(e-1)) >> e.
# 2. Let r be the e lowest bits of U p + 2^(e-1). U + 1 adds p to them, so U is the (r div p)-th of the
#    values that become v, counted from 0. For beta >= 1/2, r < 2^e <= 2 p: a digit is a bit.
# 3. Otherwise r div p <= 2^16. Float32 gives r and p to 2^-24 of themselves, and a quotient to two units
#    in the last place, 2^-22. So the quotient is off by less than 1/8 before it is cut: one more or less
#    is told from r - quotient p, in integers.
# 4. The lowest U that becomes v has U p >= w for w = v 2^e - 2^(e-1). In range |w / p| <= 2^24 + 1, and
#    its float32 is off by less than 7 once cut. 8 less is below it, and what is left is positive and below
#    16 p: it is divided as in 3., rounding up.
# 5. Digits have a number of bits that the host knows: of a decay that learns, it was fixed before. A digit
#    that doesn't fit is lost, and so is a state beyond 2^30, or what a beta outside [2^-16, 1] does. Then
#    the reach is a NaN of its own, which is out of every range: whoever walks back looks at it first.
#
# NOTE [What a reset to a value loses]
#
# 1. Where a neuron fired, U - theta, an integer >= 0. In range and for theta >= 0 it has 24 bits; what
#    doesn't fit is lost as in the note above. Where it didn't, its digit, which has room in their place.
# 2. How many fired is known to the device alone, so there is room for all: three bytes a neuron, in three
#    planes, where a whole state takes four. Less needs a look at what happened, and that is a wait.
#
# NOTE [The reach]
#
# Below their sign, the bits of floats are ordered as the floats are, and NaN is above all: the largest
# magnitude is a maximum of integers, which programs of any number of launches accumulate in one place.
KEEP = tl.constexpr(0)  # what spikes do to states: nothing,
MINUS_THETA_AT_ONCE = tl.constexpr(1)  # or at once, to the state that fired: take theta away,
VALUE_AT_ONCE = tl.constexpr(2)  # or put a value in its place,
MINUS_THETA = tl.constexpr(3)  # or in the next step: take theta away,
ZERO_BEFORE = tl.constexpr(4)  # or put zero in its place, before the charge
ZERO_AFTER = tl.constexpr(5)  # or after it
NUMBER = tl.constexpr(0)  # where a parameter is: it is itself the number,
ONE = tl.constexpr(1)  # or points to one of all neurons,
EACH = tl.constexpr(2)  # or to one for each
PLANES = tl.constexpr(3)  # bytes of a value that a reset loses
_ROOM = tl.constexpr(256**3)  # where such values end
_LARGEST = tl.constexpr(2.0**30)
_INFINITY = tl.constexpr(0x7F800000)
_LOST = tl.constexpr(0x7FC05EED)  # as a float, `grid.range.LOST`


@triton.jit
def parameter(value, index, mask, WHERE: tl.constexpr):
    """A neuron's parameter, float32, of a tile of neurons or of all."""
    if WHERE == NUMBER:
        return tl.cast(value, tl.float32)
    elif WHERE == ONE:
        return tl.load(value)
    else:
        return tl.load(value + index, mask=mask, other=1.0)


@triton.jit
def _factor(beta):
    """p and e of a decay, int64, and whether it is one that can be undone."""
    bits = beta.to(tl.int32, bitcast=True)
    good = (bits >= 0x37800000) & (bits <= 0x3F800000)  # 2^-16 and 1
    bits = tl.where(good, bits, 0x3F800000)
    return ((bits & 0x7FFFFF) | 0x800000).to(tl.int64), (150 - (bits >> 23)).to(tl.int64), good


@triton.jit
def _half(e):
    return tl.full((), 1, tl.int64) << (e - 1)


@triton.jit
def _quotient(a, p):
    """a div p for a quotient of at most 2^17."""
    quotient = (a.to(tl.float32) / p.to(tl.float32)).to(tl.int32)
    left = a - quotient.to(tl.int64) * p
    return quotient + (left >= p).to(tl.int32) - (left < 0).to(tl.int32)


@triton.jit
def _digit(rest, p, DIGIT_BITS: tl.constexpr):
    """rest div p, or any number above 1 where that doesn't fit the only bit."""
    if DIGIT_BITS <= 1:
        return (rest >= p).to(tl.int32) + (rest >= 2 * p).to(tl.int32)
    else:
        return _quotient(rest, p)


@triton.jit
def _lowest(v, p, e):
    """The lowest units that become v."""
    wanted = (v.to(tl.int64) << e) - _half(e)
    below = (wanted.to(tl.float32) / p.to(tl.float32)).to(tl.int32) - 8
    return below + _quotient(wanted - below.to(tl.int64) * p + p - 1, p)


@triton.jit
def undone(w, beta, digits, groups, index, mask, n, DIGIT_BITS: tl.constexpr):
    """The units before a decay that made w of them, both whole."""
    whole = w.to(tl.int32)
    if DIGIT_BITS > 0:
        p, e, _ = _factor(beta)
        whole = _lowest(whole, p, e)
        if DIGIT_BITS == 1:
            whole = whole + load_flags(digits, groups, n)
        else:
            whole = whole + load_bits(digits, index, mask, DIGIT_BITS)
    return whole


@triton.jit
def rounded(x):
    """The nearest integer, halves to even: of what is below 2^23, adding 2^23 leaves it."""
    size = tl.abs(x)
    near = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0, -near, near), x)


@triton.jit
def _store_planes(to, values, index, mask, n):
    at = index
    for k in tl.static_range(PLANES):
        tl.store(to + at, ((values >> (8 * k)) & 255).to(tl.uint8), mask=mask)
        at += n


@triton.jit
def _load_planes(planes, index, mask, n):
    values = tl.zeros(index.shape, tl.int32)
    at = index
    for k in tl.static_range(PLANES):
        values = values | (tl.load(planes + at, mask=mask, other=0).to(tl.int32) << (8 * k))
        at += n
    return values


@triton.jit
def _fired(h, threshold, INCLUSIVE: tl.constexpr):
    return h >= threshold if INCLUSIVE else h > threshold


@triton.jit
def _size(values):
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _add_reach(reach, size, lost, mask):
    # A state that is NaN or infinite is said to be that.
    size = tl.where(mask, tl.where(lost & (size < _INFINITY), _LOST, size), 0)
    tl.atomic_max(reach, tl.max(tl.max(size, axis=1), axis=0), sem="relaxed")


@triton.jit
def _reset_at_once(h, s, theta, unit, to, RESET: tl.constexpr):
    """The state after a reset by its own spikes s, 0 or 1."""
    if RESET == MINUS_THETA_AT_ONCE:
        return h - s.to(tl.float32) * (theta * unit)
    else:
        return tl.where(s != 0, to, h)


@triton.jit
def _store_overshoot(to, h, s, theta, scale, index, mask, n):
    """Write down how far from theta the states h that fired are; returns where that is lost."""
    units = h * scale
    good = tl.abs(units) < _LARGEST
    above = tl.where(good, units, 0.0).to(tl.int32) - theta.to(tl.int32)
    fits = good & (above >= 0) & (above < _ROOM)
    _store_planes(to, tl.where(s != 0, above, 0), index, mask, n)
    return (s != 0) & ~fits


@triton.jit
def before_reset(v, s, planes, theta, unit, index, mask, n, RESET: tl.constexpr):
    """The state that :func:`_reset_at_once` changed to v."""
    if RESET == MINUS_THETA_AT_ONCE:
        return v + s.to(tl.float32) * (theta * unit)
    else:
        units = _load_planes(planes, index, mask, n) + theta.to(tl.int32)
        return tl.where(s != 0, units.to(tl.float32) * unit, v)


@triton.jit
def charge(
    u, x, reset_by, beta, theta, threshold, to, out, after, digits, planes, spikes, fired_bits, reach,
    n, scale, unit, gain, BETA: tl.constexpr, THETA: tl.constexpr, THRESHOLD: tl.constexpr,
    RESET: tl.constexpr, DIGIT_BITS: tl.constexpr, RECORD: tl.constexpr, FIRES: tl.constexpr,
    INCLUSIVE: tl.constexpr, STORES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A step: decay, charge, the spikes, the reset, and what is lost.

    FIRES: spikes and their bits are wanted. STORES: the charged state is wanted where a reset at once
    follows. Pointers to what is not wanted are not used.
    """
    groups, index = tile(ROWS)
    mask = index < n
    thetas = parameter(theta, index, mask, THETA)
    p, e, good = _factor(parameter(beta, index, mask, BETA))
    units = tl.load(u + index, mask=mask, other=0.0) * scale
    integer = tl.abs(units) < _LARGEST
    whole = tl.where(integer, units, 0.0).to(tl.int32)
    before = tl.zeros(index.shape, tl.int32)
    if RESET >= MINUS_THETA:
        before = load_flags(reset_by, groups, n)
    left = tl.where(before != 0, 0, whole) if RESET >= ZERO_BEFORE else whole
    y = left.to(tl.int64) * p + _half(e)
    v = y >> e
    lost = ~(integer & good)
    if RECORD:
        digit = _digit(y - (v << e), p, DIGIT_BITS)
        unfit = (digit >> DIGIT_BITS) != 0
        if RESET >= ZERO_BEFORE:
            above = whole - thetas.to(tl.int32)
            unfit = tl.where(before != 0, (above < 0) | (above >= _ROOM), unfit)
            _store_planes(planes, tl.where(before != 0, above, digit), index, mask, n)
        elif DIGIT_BITS > 0:
            store_bits(digits, tl.where(mask, digit, 0), groups, n, DIGIT_BITS)
        lost = lost | unfit
    # What is no integer stays as it is, so that it is seen to be none.
    w = tl.where(integer, v.to(tl.float32), units)
    if RESET == MINUS_THETA:
        w = w - before.to(tl.float32) * thetas
    w = w + rounded(tl.load(x + index, mask=mask, other=0.0) * gain * scale)
    if RESET == ZERO_AFTER:
        w = tl.where(before != 0, 0.0, w)
    h = w * unit
    size = _size(h)
    if STORES:
        tl.store(out + index, h, mask=mask)
    if FIRES:
        s = _fired(h, parameter(threshold, index, mask, THRESHOLD), INCLUSIVE) & mask
        tl.store(spikes + index, s.to(tl.float32).to(spikes.dtype.element_ty), mask=mask)
        store_bits(fired_bits, s.to(tl.int32), groups, n, 1)
        if RESET > KEEP and RESET < MINUS_THETA:
            state = _reset_at_once(h, s.to(tl.int32), thetas, unit, to, RESET)
            tl.store(after + index, state, mask=mask)
            if RECORD and RESET == VALUE_AT_ONCE:
                lost = lost | _store_overshoot(planes, h, s.to(tl.int32), thetas, scale, index, mask, n)
            size = tl.maximum(size, _size(state))
    _add_reach(reach, size, lost, mask)


@triton.jit
def undo(
    state, x, bits, beta, theta, digits, planes, out, charged, n, scale, unit, gain, BETA: tl.constexpr,
    THETA: tl.constexpr, RESET: tl.constexpr, DIGIT_BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The state before :func:`charge` into ``out``, and that before a reset at once into ``charged``."""
    groups, index = tile(ROWS)
    mask = index < n
    thetas = parameter(theta, index, mask, THETA)
    h = tl.load(state + index, mask=mask, other=0.0)
    s = tl.zeros(index.shape, tl.int32)
    if RESET != KEEP:
        s = load_flags(bits, groups, n)
    if RESET > KEEP and RESET < MINUS_THETA:
        h = before_reset(h, s, planes, thetas, unit, index, mask, n, RESET)
        tl.store(charged + index, h, mask=mask)
    w = h * scale - rounded(tl.load(x + index, mask=mask, other=0.0) * gain * scale)
    if RESET == MINUS_THETA:
        w = w + s.to(tl.float32) * thetas
    betas = parameter(beta, index, mask, BETA)
    if RESET >= ZERO_BEFORE:
        p, e, _ = _factor(betas)
        kept = _load_planes(planes, index, mask, n)
        w = tl.where(s != 0, 0.0, w)
        whole = tl.where(s != 0, kept + thetas.to(tl.int32), _lowest(w.to(tl.int32), p, e) + kept)
    else:
        whole = undone(w, betas, digits, groups, index, mask, n, DIGIT_BITS)
    tl.store(out + index, whole.to(tl.float32) * unit, mask=mask)


@triton.jit
def fire(
    h, threshold, spikes, bits, n, THRESHOLD: tl.constexpr, INCLUSIVE: tl.constexpr, ROWS: tl.constexpr
):
    """Spikes, as they are and as bits."""
    groups, index = tile(ROWS)
    mask = index < n
    value = tl.load(h + index, mask=mask, other=0.0)
    s = _fired(value, parameter(threshold, index, mask, THRESHOLD), INCLUSIVE) & mask
    tl.store(spikes + index, s.to(tl.float32).to(spikes.dtype.element_ty), mask=mask)
    store_bits(bits, s.to(tl.int32), groups, n, 1)


@triton.jit
def reset(
    h, spikes, theta, to, out, planes, reach, n, scale, unit, THETA: tl.constexpr, RESET: tl.constexpr,
    RECORD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A reset at once, by itself."""
    _, index = tile(ROWS)
    mask = index < n
    thetas = parameter(theta, index, mask, THETA)
    value = tl.load(h + index, mask=mask, other=0.0)
    s = (tl.load(spikes + index, mask=mask, other=0.0) != 0).to(tl.int32)
    state = _reset_at_once(value, s, thetas, unit, to, RESET)
    tl.store(out + index, state, mask=mask)
    lost = tl.zeros(index.shape, tl.int1)
    if RECORD and RESET == VALUE_AT_ONCE:
        lost = _store_overshoot(planes, value, s, thetas, scale, index, mask, n)
    _add_reach(reach, _size(state), lost, mask)


@triton.jit
def unreset(
    v, bits, theta, planes, out, n, unit, THETA: tl.constexpr, RESET: tl.constexpr, ROWS: tl.constexpr
):
    """The state before a reset at once."""
    groups, index = tile(ROWS)
    mask = index < n
    thetas = parameter(theta, index, mask, THETA)
    value = tl.load(v + index, mask=mask, other=0.0)
    s = load_flags(bits, groups, n)
    h = before_reset(value, s, planes, thetas, unit, index, mask, n, RESET)
    tl.store(out + index, h, mask=mask)
