"""What numba compiles of a neuron's step on the grid and back: each step is one pass over the neurons.

The one idea: a stretch of neurons is computed by loops that compile to vector instructions, and then
what it loses (bits, digits, overshoots) is pushed together into bytes by loops without branches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from snn_reversible_plugin.ops.compiled import compiled

# NOTE [What compiles to what]
#
# 1. A loop becomes vector code where it goes over slices from 0 on, selects instead of branching, and has
#    no float maximum. So stretches are sliced first, flags are selected bytes, and a reach is the maximum
#    of the bits below the sign, as integers: NaN is the largest of all.
# 2. Neither fastmath nor threads: results are those of the torch form bit for bit, and numba's own threads
#    must not be entered by two of ours at once. Without fastmath no product is fused with a sum.
# 3. A parameter is one number or an array: `part_of` and `element_of` are resolved when a function is
#    compiled for its types.
# 4. The digits of all neurons are one string of bits. Eight neurons at a time push as many bits as they
#    have digits, behind at most seven that wait; the last byte is filled with zeros.
# 5. What is compiled is kept on disk, and compiled again when the file that a function stands in has
#    changed, but not when a function that it calls has, in another file. So what calls one another stands
#    in one file.
STRETCH = 960  # whole bytes, of whatever radix
KEEP, MINUS_THETA, ZERO_BEFORE, ZERO_AFTER = range(4)  # what spikes do to the state they come from


def part_of(value: Any, part: slice) -> Any:
    """A stretch of a parameter that has an element a neuron; the parameter if it is one number."""
    raise NotImplementedError


def element_of(value: Any, index: Any) -> Any:
    """A neuron's element of such a parameter."""
    raise NotImplementedError


@overload(part_of)
def _resolve_part(value, part):  # numba compares the names of arguments, and annotations would differ
    if isinstance(value, types.Array):
        return lambda value, part: value[part]
    return lambda value, part: value


@overload(element_of)
def _resolve_element(value, index):
    if isinstance(value, types.Array):
        return lambda value, index: value[index]
    return lambda value, index: value


@compiled
def unpack(bits: Any, out: Any) -> None:
    """Bits as zeros and ones of the type of ``out``."""
    n = len(out)
    for i in range(n // 8):
        byte = np.uint32(bits[i])
        for j in range(8):
            out[8 * i + j] = (byte >> np.uint32(j)) & np.uint32(1)
    for j in range(n - n % 8, n):
        out[j] = (bits[n // 8] >> (j % 8)) & 1


def _tables() -> tuple[Any, ...]:
    places = np.arange(8)
    masks, values = np.arange(256)[:, None, None] >> places & 1, np.arange(256)[None, :, None] >> places & 1
    ranks = masks.cumsum(-1) - masks
    gathered = (masks * values << ranks).sum(-1)
    scattered = (masks * (np.arange(256)[None, :, None] >> ranks & 1) << places).sum(-1)
    spread = (values[0].astype(np.uint64) << (8 * places).astype(np.uint64)).sum(-1, dtype=np.uint64)
    counts, of_set_bits = masks.sum((1, 2)), np.argsort(1 - masks[:, 0], axis=-1, kind="stable")
    return *(table.astype(np.uint8) for table in (gathered, scattered, counts, of_set_bits)), spread


# Of a mask and a byte: the bits of the byte at the mask's places, put together; its lowest bits, put at
# those places. Of a byte: how many bits are set; their places, then the others'; its bits, a byte each.
_GATHERED, _SCATTERED, _COUNTS, _PLACES, _BYTES = _tables()


@compiled
def _bits_of(word: Any) -> Any:
    """The lowest bits of eight bytes, in one."""
    lowest = word & np.uint64(0x0101010101010101)
    return (lowest * np.uint64(0x0102040810204080)) >> np.uint64(56)


@compiled
def push(codes: Any, n: int, out: Any, at: Any, waiting: Any, held: Any) -> Any:
    """Append digits to bytes: code 2 is the digit 0, code 3 the digit 1, others are none.

    ``waiting`` bits, in ``held``, are not written yet.
    """
    bits, k = np.uint32(held), np.uint32(waiting)
    words = codes.view(np.uint64)
    for i in range((n + 7) // 8):
        word = words[i]
        if word == 0:
            continue
        mask = _bits_of(word >> np.uint64(1))
        bits |= np.uint32(_GATHERED[mask, _bits_of(word)]) << k
        k += np.uint32(_COUNTS[mask])
        out[at] = np.uint8(bits & np.uint32(255))
        whole = k >> np.uint32(3)
        at += np.int64(whole)
        bits >>= whole << np.uint32(3)
        k &= np.uint32(7)
    return at, np.int64(k), np.int64(bits)


@compiled
def pull(codes: Any, n: int, record: Any, at: Any) -> Any:
    """Replace codes that are 1 by the next digits of the record, from its bit ``at`` on."""
    words = codes.view(np.uint64)
    for i in range((n + 7) // 8):
        word = words[i]
        if word == 0:
            continue
        byte = at >> 3
        bits = np.uint32(record[byte])
        if byte + 1 < len(record):
            bits |= np.uint32(record[byte + 1]) << np.uint32(8)
        bits = (bits >> np.uint32(at & 7)) & np.uint32(255)
        mask = _bits_of(word)
        at += np.int64(_COUNTS[mask])
        words[i] = _BYTES[_SCATTERED[mask, bits]]
    return at


@compiled
def combine(digits: Any, n: int, radix: int, each: int, out: Any, at: int) -> int:
    """Write digits of a radix, ``each`` to a byte, or two bytes for a digit if that is 0."""
    if not each:
        for j in range(n):
            out[at + 2 * j] = np.uint8(digits[j] & 255)
            out[at + 2 * j + 1] = np.uint8(digits[j] >> 8)
        return at + 2 * n
    for first in range(0, n, each):
        total: Any = 0
        for j in range(min(first + each, n) - 1, first - 1, -1):
            total = total * radix + np.int64(digits[j])
        out[at] = np.uint8(total)
        at += 1
    return at


@compiled
def separate(digits: Any, n: int, radix: int, each: int, record: Any, at: int) -> int:
    """Read what :func:`combine` wrote; returns where the next digits begin."""
    if not each:
        for j in range(n):
            digits[j] = np.uint16(record[at + 2 * j]) | (np.uint16(record[at + 2 * j + 1]) << np.uint16(8))
        return at + 2 * n
    for first in range(0, n, each):
        rest: Any = np.int64(record[at])
        for j in range(first, min(first + each, n)):
            digits[j] = np.uint16(rest % radix)
            rest //= radix
        at += 1
    return at


@compiled
def fired_of(bits: Any) -> Any:
    """Which bits are set."""
    found = np.empty(count_of(bits) + 8, np.int32)
    count: Any = 0
    for i in range(len(bits)):
        # All eight are written, and those too many overwritten: a branch would be guessed wrong.
        for j in range(8):
            found[count + j] = np.int32(8 * i) + np.int32(_PLACES[bits[i], j])
        count += np.int64(_COUNTS[bits[i]])
    return found[:count]


@compiled
def overshoot(values: Any, bits: Any, theta: Any, scale: float) -> Any:
    """Distances from the threshold where neurons fired, in as many bits each as the largest needs: the
    whole bytes first, then a plane for each bit that is left."""
    fired = fired_of(bits)
    found, largest = np.empty(len(fired), np.int32), np.int32(0)
    for k in range(len(fired)):
        found[k] = np.int32(values[fired[k]] * scale - element_of(theta, fired[k]))
    for k in range(len(found)):
        largest = found[k] if found[k] > largest else largest
    if len(found) == 0:
        return np.empty(0, np.uint8)
    width = 0
    while largest >> np.int32(width):
        width += 1
    whole, rest, plane = width // 8, width % 8, (len(found) + 7) // 8
    out = np.zeros(1 + whole * len(found) + rest * plane, np.uint8)
    out[0] = width
    for j in range(whole):
        part = out[1 + j * len(found) :]
        for k in range(len(found)):
            part[k] = np.uint8((found[k] >> np.int32(8 * j)) & np.int32(255))
    for j in range(rest):
        part = out[1 + whole * len(found) + j * plane :]
        for k in range(len(found)):
            bit = (found[k] >> np.int32(8 * whole + j)) & np.int32(1)
            part[k >> 3] |= np.uint8(bit << np.int32(k & 7))
    return out


@compiled
def undo_overshoot(out: Any, bits: Any, theta: Any, scale: float, record: Any) -> None:
    """Write what :func:`overshoot` wrote down over ``out``."""
    fired = fired_of(bits)
    above, unit = np.zeros(len(fired), np.int32), 1 / scale
    if len(fired) == 0:
        return
    width = np.int64(record[0])
    whole, plane = width // 8, (len(fired) + 7) // 8
    for j in range(whole):
        part = record[1 + j * len(fired) :]
        for k in range(len(fired)):
            above[k] |= np.int32(part[k]) << np.int32(8 * j)
    for j in range(width % 8):
        part = record[1 + whole * len(fired) + j * plane :]
        for k in range(len(fired)):
            above[k] |= ((np.int32(part[k >> 3]) >> np.int32(k & 7)) & np.int32(1)) << np.int32(
                8 * whole + j
            )
    for k in range(len(fired)):
        out[fired[k]] = np.float32((above[k] + np.float64(element_of(theta, fired[k]))) * unit)


@compiled
def count_of(bits: Any) -> Any:
    """How many bits are set."""
    number: Any = 0
    for byte in bits:
        number += np.int64(_COUNTS[byte])
    return number


@compiled
def _largest(values: Any, so_far: Any) -> Any:
    """The largest magnitude, NaN above all, as the bits of a float."""
    bits = values.view(np.int32)
    for j in range(len(bits)):
        magnitude = bits[j] & np.int32(0x7FFFFFFF)
        so_far = magnitude if magnitude > so_far else so_far
    return so_far


@compiled
def _as_float(bits: Any) -> Any:
    found = np.empty(1, np.int32)
    found[0] = bits
    return found.view(np.float32)[0]


@compiled
def fire(h: Any, threshold: Any, inclusive: bool, out: Any, bits: Any) -> None:
    """Write the spikes of the potentials ``h``, as they are and as bits."""
    flags = np.empty(STRETCH, np.uint8)
    for start in range(0, len(h), STRETCH):
        part = slice(start, min(start + STRETCH, len(h)))
        _fire(h[part], part_of(threshold, part), inclusive, out[part], bits[start // 8 :], flags)


@compiled
def _fire(hs: Any, thresholds: Any, inclusive: bool, spikes: Any, bits: Any, flags: Any) -> None:
    n = len(hs)
    if inclusive:
        for j in range(n):
            flags[j] = np.uint8(1 if hs[j] >= element_of(thresholds, j) else 0)
    else:
        for j in range(n):
            flags[j] = np.uint8(1 if hs[j] > element_of(thresholds, j) else 0)
    for j in range(n):
        spikes[j] = flags[j]
    flags[n:] = 0
    words = flags.view(np.uint64)
    for i in range((n + 7) // 8):
        bits[i] = np.uint8(_bits_of(words[i]))


@compiled
def _zero_where(fired: Any, v: Any) -> None:
    for j in range(len(fired)):
        v[j] = 0 if fired[j] != 0 else v[j]


@compiled
def _decay(us: Any, scale: float, beta: Any, v: Any) -> None:
    for j in range(len(us)):
        v[j] = np.floor(element_of(beta, j) * (us[j] * scale) + 0.5)


@compiled
def _decay_and_bits(us: Any, scale: float, beta: Any, v: Any, codes: Any) -> None:
    """Decay, and the codes of the digits, of radix 2, that :func:`push` takes."""
    codes[len(us) :] = 0
    for j in range(len(us)):
        y = element_of(beta, j) * (us[j] * scale) + 0.5
        v[j] = np.floor(y)
        r = y - v[j]
        code = 2.0 if r < 1 - element_of(beta, j) else 0.0
        code = 3.0 if r >= element_of(beta, j) else code
        codes[j] = np.uint8(np.int32(code))


@compiled
def _decay_and_digits(us: Any, scale: float, beta: Any, v: Any, digits: Any) -> None:
    for j in range(len(us)):
        y = element_of(beta, j) * (us[j] * scale) + 0.5
        v[j] = np.floor(y)
        digits[j] = np.uint16(np.int32(np.floor((y - v[j]) / element_of(beta, j))))


@compiled
def _add(v: Any, current: Any, gain: Any, scale: Any, out: Any) -> None:
    unit = np.float32(1) / scale
    for j in range(len(out)):
        out[j] = (np.float32(v[j]) + np.rint(current[j] * gain * scale)) * unit


@compiled
def _add_and_reset(v: Any, current: Any, gain: Any, scale: Any, fired: Any, theta: Any, out: Any) -> None:
    unit = np.float32(1) / scale
    for j in range(len(out)):
        w = np.float32(v[j]) - np.float32(fired[j]) * np.float32(element_of(theta, j))
        out[j] = (w + np.rint(current[j] * gain * scale)) * unit


@compiled
def charge(
    u: Any, current: Any, reset_by: Any, beta: Any, theta: Any, radix: int, each: int, kind: int,
    scale: float, gain: Any, out: Any, lost: Any, threshold: Any, inclusive: bool, fired: Any, bits: Any,
) -> tuple[int, Any]:  # fmt: skip
    """The step, and its spikes if there is room for any; returns how many bytes of digits it wrote to
    ``lost``, and the reach."""
    v, codes, digits = np.empty(STRETCH), np.zeros(STRETCH, np.uint8), np.empty(STRETCH, np.uint16)
    left, before, flags = (
        np.empty(STRETCH, np.float32),
        np.empty(STRETCH, np.uint8),
        np.empty(STRETCH, np.uint8),
    )
    at, waiting, held, largest = 0, 0, 0, np.int32(0)
    for start in range(0, len(u), STRETCH):
        part = slice(start, min(start + STRETCH, len(u)))
        us, xs, outs, betas = u[part], current[part], out[part], part_of(beta, part)
        n = len(us)
        spikes = before[:n]
        if kind != KEEP:
            unpack(reset_by[start // 8 :], spikes)
        if kind >= ZERO_BEFORE:
            for j in range(n):
                left[j] = us[j]
            us = left[:n]
            _zero_where(spikes, us)
        if len(lost) == 0:
            _decay(us, scale, betas, v)
        elif radix == 2:
            _decay_and_bits(us, scale, betas, v, codes)
            at, waiting, held = push(codes, n, lost, at, waiting, held)
        else:
            _decay_and_digits(us, scale, betas, v, digits)
            at = combine(digits, n, radix, each, lost, at)
        if kind == MINUS_THETA:
            _add_and_reset(v, xs, gain, np.float32(scale), spikes, part_of(theta, part), outs)
        else:
            _add(v, xs, gain, np.float32(scale), outs)
        if kind == ZERO_AFTER:
            _zero_where(spikes, outs)
        largest = _largest(outs, largest)
        if len(fired):
            _fire(outs, part_of(threshold, part), inclusive, fired[part], bits[start // 8 :], flags)
    if waiting:
        lost[at] = np.uint8(held)
        at += 1
    return at, _as_float(largest)


@compiled
def _subtract(state: Any, current: Any, gain: Any, scale: Any, v: Any) -> None:
    for j in range(len(state)):
        v[j] = state[j] * scale - np.rint(current[j] * gain * scale)


@compiled
def _subtract_and_unreset(
    state: Any, current: Any, gain: Any, scale: Any, fired: Any, theta: Any, v: Any
) -> None:
    for j in range(len(state)):
        w = state[j] * scale - np.rint(current[j] * gain * scale)
        v[j] = w + np.float32(fired[j]) * np.float32(element_of(theta, j))


@compiled
def _lowest(v: Any, inverse: Any, offset: Any, n: int) -> None:
    for j in range(n):
        v[j] = np.ceil(v[j] * element_of(inverse, j) + element_of(offset, j))


@compiled
def _lowest_of_two(v: Any, inverse: Any, offset: Any, spare: Any, n: int, codes: Any) -> None:
    """The lowest preimages, and codes that are 1 where there are two."""
    codes[n:] = 0
    for j in range(n):
        q = v[j] * element_of(inverse, j) + element_of(offset, j)
        v[j] = np.ceil(q)
        several = 1.0 if v[j] - q < element_of(spare, j) else 0.0
        codes[j] = np.uint8(np.int32(several))


@compiled
def undo(
    state: Any, current: Any, bits: Any, beta: Any, inverse: Any, offset: Any, spare: Any, theta: Any,
    radix: int, each: int, kind: int, scale: float, gain: Any, record: Any, out: Any,
) -> None:  # fmt: skip
    """Write the state that :func:`charge` started from."""
    v, codes, digits = np.empty(STRETCH), np.zeros(STRETCH, np.uint8), np.empty(STRETCH, np.uint16)
    unit, at, overshoots, flags = 1 / scale, 0, record, np.empty(STRETCH, np.uint8)
    if kind >= ZERO_BEFORE:
        number = count_of(bits)
        width = np.int64(record[0]) if number else 0
        taken = 1 + width // 8 * number + width % 8 * ((number + 7) // 8)
        record = record[taken:] if number else record
    for start in range(0, len(state), STRETCH):
        part = slice(start, min(start + STRETCH, len(state)))
        hs, xs, outs = state[part], current[part], out[part]
        n = len(hs)
        spikes = flags[:n]
        if kind != KEEP:
            unpack(bits[start // 8 :], spikes)
        if kind == MINUS_THETA:
            thetas = part_of(theta, part)
            _subtract_and_unreset(hs, xs, gain, np.float32(scale), spikes, thetas, v)
        else:
            _subtract(hs, xs, gain, np.float32(scale), v)
        if kind >= ZERO_BEFORE:
            _zero_where(spikes, v)
        inverses, offsets = part_of(inverse, part), part_of(offset, part)
        if radix == 2:
            _lowest_of_two(v, inverses, offsets, part_of(spare, part), n, codes)
            at = pull(codes, n, record, at)
            for j in range(n):
                v[j] += codes[j]
        elif radix > 2:
            _lowest(v, inverses, offsets, n)
            at = separate(digits, n, radix, each, record, at)
            for j in range(n):
                v[j] += digits[j]
        for j in range(n):
            outs[j] = np.float32((v[j] + 0.0) * unit)  # -0 + 0 is +0
    if kind >= ZERO_BEFORE:
        undo_overshoot(out, bits, theta, scale, overshoots)


@compiled
def reset(h: Any, spikes: Any, theta: Any, soft: bool, to: Any, unit: Any, out: Any) -> Any:
    """Write the state after a reset at once; returns the reach."""
    if soft:
        for i in range(len(h)):
            out[i] = h[i] - spikes[i] * (np.float32(element_of(theta, i)) * unit)
    else:
        for i in range(len(h)):
            out[i] = to if spikes[i] != 0 else h[i]
    return _as_float(_largest(out, np.int32(0)))


@compiled
def unreset(v: Any, spikes: Any, theta: Any, unit: Any, out: Any) -> None:
    """Undo a reset by subtraction."""
    for i in range(len(v)):
        out[i] = v[i] + np.float32(spikes[i]) * (np.float32(element_of(theta, i)) * unit)


@compiled
def charge_and_reset(
    u: Any, current: Any, beta: Any, theta: Any, radix: int, each: int, scale: float, gain: float, h: Any,
    lost: Any, threshold: float, inclusive: bool, fired: Any, bits: Any, to: float, soft: bool,
    record: bool, out: Any,
) -> Any:  # fmt: skip
    """:func:`charge` and :func:`reset` in one call; returns the bytes of digits, both reaches, and what
    the reset overshot where that is recorded."""
    of_h = np.empty(0, np.uint8)
    used, charged = charge(
        u, current, of_h, beta, theta, radix, each, KEEP, scale, np.float32(gain), h, lost,
        np.float32(threshold), inclusive, fired, bits,
    )  # fmt: skip
    after = reset(h, fired, theta, soft, np.float32(to), np.float32(1 / scale), out)
    if record and not soft:
        of_h = overshoot(h, bits, theta, scale)
    return used, charged, after, of_h


@compiled
def undo_charge_and_reset(
    after: Any, current: Any, bits: Any, beta: Any, inverse: Any, offset: Any, spare: Any, theta: Any,
    radix: int, each: int, scale: float, gain: float, soft: bool, record: Any, overshot: Any, charged: Any,
    out: Any,
) -> None:  # fmt: skip
    """Write both states that :func:`charge_and_reset` went through."""
    if soft:
        flags = np.empty(len(after), np.uint8)
        unpack(bits, flags)
        unreset(after, flags, theta, np.float32(1 / scale), charged)
    else:
        charged[:] = after
        undo_overshoot(charged, bits, theta, scale, overshot)
    undo(
        charged, current, np.empty(0, np.uint8), beta, inverse, offset, spare, theta, radix, each, KEEP,
        scale, np.float32(gain), record, out,
    )  # fmt: skip


@compiled
def gate(g: Any, factor: Any, bits: Any, out: Any) -> None:
    """Write ``g * factor`` times 0 where neurons fired."""
    flags = np.empty(STRETCH, np.uint8)
    for start in range(0, len(g), STRETCH):
        part = slice(start, min(start + STRETCH, len(g)))
        gs, outs, factors = g[part], out[part], part_of(factor, part)
        unpack(bits[start // 8 :], flags[: len(gs)])
        for j in range(len(gs)):
            outs[j] = gs[j] * element_of(factors, j) * (np.float32(1) - np.float32(flags[j]))
