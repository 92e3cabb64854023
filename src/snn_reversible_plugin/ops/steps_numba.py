"""One neuron's step on the grid and back, on the CPU, compiled: each function is one pass over the neurons.

The arithmetic is that of :mod:`snn_reversible_plugin.ops.steps_torch`, which is the specification, and
what is written down that of :mod:`snn_reversible_plugin.ops.steps_numpy`; only the order of the bytes
is another. The one idea: a stretch of neurons is computed by loops that compile to vector instructions,
and then the digits that it loses are pushed together by a loop without branches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

from snn_reversible_plugin.ops.decays import AFTER, BEFORE, SUBTRACT, Step, digits_a_byte

# NOTE [What compiles to what]
#
# 1. A loop becomes vector code where it goes over slices from 0 on, selects instead of branching, and has
#    no float maximum. So stretches are sliced first, flags are selected bytes, and a reach is the maximum
#    of the bits below the sign, as integers: NaN is the largest of all.
# 2. Neither fastmath nor threads: results are those of the torch form bit for bit, and numba's own threads
#    must not be entered by two of ours at once. A product and its sum may be fused: see `decays`.
# 3. A parameter is one number or an array: `_of` is resolved when a function is compiled for its types.
# 4. The digits of all neurons are one string of bits. Eight neurons at a time push as many bits as they have
#    digits, behind at most seven that wait; the last byte is filled with zeros.
STRETCH = 960  # whole bytes, of whatever radix
Piece = np.ndarray[Any, Any]
_KEEP, _MINUS_THETA, _ZERO_BEFORE, _ZERO_AFTER = range(4)
_KINDS = {SUBTRACT: _MINUS_THETA, BEFORE: _ZERO_BEFORE, AFTER: _ZERO_AFTER}
_NOTHING = np.empty(0, np.float32)
_NO_BYTES = np.empty(0, np.uint8)


def _compiled(function: Any) -> Any:
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this directory nor the user's can be written to
        return njit(**options)(function)


def _of(value: Any, part: slice) -> Any:
    raise NotImplementedError


def _at(value: Any, index: int) -> Any:
    raise NotImplementedError


@overload(_of)
def _part_of(value, part):  # numba compares the names of arguments, and annotations would differ
    if isinstance(value, types.Array):
        return lambda value, part: value[part]
    return lambda value, part: value


@overload(_at)
def _element_of(value, index):
    if isinstance(value, types.Array):
        return lambda value, index: value[index]
    return lambda value, index: value


# -- bits ------------------------------------------------------------------------------------------


@_compiled
def _pack(flags: Any, out: Any) -> None:
    """Bytes that are 0 or 1 as bits."""
    n = len(flags)
    for i in range(n // 8):
        byte = np.uint8(0)
        for j in range(8):
            byte |= np.uint8(flags[8 * i + j] << np.uint8(j))
        out[i] = byte
    if n % 8:
        byte = np.uint8(0)
        for j in range(n % 8):
            byte |= np.uint8(flags[n - n % 8 + j] << np.uint8(j))
        out[n // 8] = byte


@_compiled
def _unpack(bits: Any, out: Any) -> None:
    n = len(out)
    for i in range(n // 8):
        byte = np.uint32(bits[i])
        for j in range(8):
            out[8 * i + j] = (byte >> np.uint32(j)) & np.uint32(1)
    for j in range(n - n % 8, n):
        out[j] = (bits[n // 8] >> (j % 8)) & 1


@_compiled
def _push(codes: Any, n: int, out: Any, at: int, waiting: int, held: int) -> tuple[int, int, int]:
    """Append digits to bytes: code 2 is the digit 0, code 3 the digit 1, others are none.

    ``waiting`` bits, in ``held``, are not written yet.
    """
    one, byte = np.uint64(1), np.uint64(255)
    bits, k = np.uint64(held), np.uint64(waiting)
    words = codes.view(np.uint64)
    for i in range((n + 7) // 8):
        word = words[i]
        if word == 0:
            continue
        for _ in range(8):
            bits |= (word & one) << k
            k += (word >> one) & one
            word >>= np.uint64(8)
        out[at] = np.uint8(bits & byte)
        whole = k >> np.uint64(3)
        at += np.int64(whole)
        bits >>= whole << np.uint64(3)
        k &= np.uint64(7)
    return at, np.int64(k), np.int64(bits)


@_compiled
def _pull(codes: Any, n: int, record: Any, at: int) -> int:
    """Replace codes that are 1 by the next digits of the record, from its bit ``at`` on."""
    one = np.uint64(1)
    words = codes.view(np.uint64)
    for i in range((n + 7) // 8):
        word = words[i]
        if word == 0:
            continue
        byte = at >> 3
        bits = np.uint64(record[byte])
        if byte + 1 < len(record):
            bits |= np.uint64(record[byte + 1]) << np.uint64(8)
        bits >>= np.uint64(at & 7)
        digits = np.uint64(0)
        for j in range(8):
            flag = word & one
            digits |= (bits & flag) << np.uint64(8 * j)
            bits >>= flag
            at += np.int64(flag)
            word >>= np.uint64(8)
        words[i] = digits
    return at


@_compiled
def _largest(values: Any, so_far: Any) -> Any:
    """The largest magnitude, NaN above all, as the bits of a float."""
    bits = values.view(np.int32)
    for j in range(len(bits)):
        magnitude = bits[j] & np.int32(0x7FFFFFFF)
        so_far = magnitude if magnitude > so_far else so_far
    return so_far


@_compiled
def _as_float(bits: Any) -> Any:
    found = np.empty(1, np.int32)
    found[0] = bits
    return found.view(np.float32)[0]


# -- what a reset to a value loses -----------------------------------------------------------------


@_compiled
def _overshoot(values: Any, spikes: Any, theta: Any, scale: float) -> Any:
    """Distances from the threshold where neurons fired, in as many bytes each as the largest needs."""
    found, count = np.empty(len(values) + 1, np.int32), 0
    above, flags = np.empty(STRETCH, np.int32), np.empty(STRETCH, np.uint8)
    for start in range(0, len(values), STRETCH):
        part = slice(start, min(start + STRETCH, len(values)))
        vs, fired, thetas = values[part], spikes[part], _of(theta, part)
        n = len(vs)
        for j in range(n):
            above[j] = np.int32(vs[j] * scale - _at(thetas, j))
            flags[j] = np.uint8(1 if fired[j] != 0 else 0)
        for j in range(n):
            found[count] = above[j]
            count += np.int64(flags[j])
    if count == 0:
        return np.empty(0, np.uint8)
    largest = np.int32(0)
    for i in range(count):
        largest = max(largest, found[i])
    width = 2 + (largest >= 1 << 16) + (largest >= 1 << 24)
    out = np.empty(1 + width * count, np.uint8)
    out[0] = width
    for j in range(width):
        for i in range(count):
            out[1 + j * count + i] = np.uint8((found[i] >> np.int32(8 * j)) & np.int32(255))
    return out


@_compiled
def _undo_overshoot(out: Any, spikes: Any, theta: Any, scale: float, record: Any) -> int:
    """Write what :func:`_overshoot` wrote down over ``out``; returns how many bytes that took."""
    count = 0
    for spike in spikes:
        count += np.int64(spike)
    if count == 0:
        return 0
    found, width, unit = np.zeros(count + 1, np.int32), np.int64(record[0]), 1 / scale
    for j in range(width):
        for i in range(count):
            found[i] |= np.int32(record[1 + j * count + i]) << np.int32(8 * j)
    above, k = np.empty(STRETCH, np.int32), 0
    for start in range(0, len(out), STRETCH):
        part = slice(start, min(start + STRETCH, len(out)))
        outs, fired, thetas = out[part], spikes[part], _of(theta, part)
        n = len(outs)
        for j in range(n):
            above[j] = found[k]
            k += np.int64(fired[j])
        for j in range(n):
            lost = np.float32((above[j] + np.float64(_at(thetas, j))) * unit)
            outs[j] = lost if fired[j] != 0 else outs[j]
    return 1 + width * count


# -- the step --------------------------------------------------------------------------------------


@_compiled
def _fire(h: Any, threshold: Any, inclusive: bool, out: Any, bits: Any) -> None:
    flags = np.empty(STRETCH, np.uint8)
    for start in range(0, len(h), STRETCH):
        part = slice(start, min(start + STRETCH, len(h)))
        hs, thresholds, spikes = h[part], _of(threshold, part), out[part]
        n = len(hs)
        if inclusive:
            for j in range(n):
                flags[j] = np.uint8(1 if hs[j] >= _at(thresholds, j) else 0)
        else:
            for j in range(n):
                flags[j] = np.uint8(1 if hs[j] > _at(thresholds, j) else 0)
        for j in range(n):
            spikes[j] = flags[j]
        _pack(flags[:n], bits[start // 8 :])


@_compiled
def _zero_where(fired: Any, v: Any) -> None:
    for j in range(len(fired)):
        v[j] = 0 if fired[j] != 0 else v[j]


@_compiled
def _decay(v: Any, beta: Any, n: int) -> None:
    for j in range(n):
        v[j] = np.floor(_at(beta, j) * v[j] + 0.5)


@_compiled
def _decay_and_bits(v: Any, beta: Any, n: int, codes: Any) -> None:
    """Decay, and the codes of the digits, of radix 2, that :func:`_push` takes."""
    codes[n:] = 0
    for j in range(n):
        y = _at(beta, j) * v[j] + 0.5
        v[j] = np.floor(y)
        r = y - v[j]
        code = 2.0 if r < 1 - _at(beta, j) else 0.0
        code = 3.0 if r >= _at(beta, j) else code
        codes[j] = np.uint8(np.int32(code))


@_compiled
def _decay_and_digits(v: Any, beta: Any, n: int, digits: Any) -> None:
    for j in range(n):
        y = _at(beta, j) * v[j] + 0.5
        v[j] = np.floor(y)
        digits[j] = np.uint16(np.int32(np.floor((y - v[j]) / _at(beta, j))))


@_compiled
def _add(v: Any, current: Any, gain: Any, scale: Any, out: Any) -> None:
    unit = np.float32(1) / scale
    for j in range(len(out)):
        out[j] = (np.float32(v[j]) + np.rint(current[j] * gain * scale)) * unit


@_compiled
def _add_and_reset(
    v: Any, current: Any, gain: Any, scale: Any, fired: Any, theta: Any, out: Any
) -> None:
    unit = np.float32(1) / scale
    for j in range(len(out)):
        w = np.float32(v[j]) - fired[j] * np.float32(_at(theta, j))
        out[j] = (w + np.rint(current[j] * gain * scale)) * unit


@_compiled
def _charge(
    u: Any, current: Any, spikes: Any, beta: Any, theta: Any, radix: int, each: int, kind: int, scale: float,
    gain: Any, out: Any, lost: Any,
) -> tuple[int, Any]:  # fmt: skip
    """The step; returns how many bytes of digits it wrote to ``lost``, and the reach."""
    v, codes, digits = np.empty(STRETCH), np.zeros(STRETCH, np.uint8), np.empty(STRETCH, np.uint16)
    at, waiting, held, largest = 0, 0, 0, np.int32(0)
    for start in range(0, len(u), STRETCH):
        part = slice(start, min(start + STRETCH, len(u)))
        us, xs, outs, betas = u[part], current[part], out[part], _of(beta, part)
        n = len(us)
        for j in range(n):
            v[j] = us[j] * scale
        if kind >= _ZERO_BEFORE:
            _zero_where(spikes[part], v)
        if len(lost) == 0:
            _decay(v, betas, n)
        elif radix == 2:
            _decay_and_bits(v, betas, n, codes)
            at, waiting, held = _push(codes, n, lost, at, waiting, held)
        else:
            _decay_and_digits(v, betas, n, digits)
            at = _combine(digits, n, radix, each, lost, at)
        if kind == _MINUS_THETA:
            _add_and_reset(v, xs, gain, np.float32(scale), spikes[part], _of(theta, part), outs)
        else:
            _add(v, xs, gain, np.float32(scale), outs)
        if kind == _ZERO_AFTER:
            _zero_where(spikes[part], outs)
        largest = _largest(outs, largest)
    if waiting:
        lost[at] = np.uint8(held)
        at += 1
    return at, _as_float(largest)


@_compiled
def _combine(digits: Any, n: int, radix: int, each: int, out: Any, at: int) -> int:
    """Write digits of a radix, ``each`` to a byte, or two bytes for a digit if that is 0."""
    if not each:
        for j in range(n):
            out[at + 2 * j] = np.uint8(digits[j] & 255)
            out[at + 2 * j + 1] = np.uint8(digits[j] >> 8)
        return at + 2 * n
    for first in range(0, n, each):
        total = 0
        for j in range(min(first + each, n) - 1, first - 1, -1):
            total = total * radix + np.int64(digits[j])
        out[at] = np.uint8(total)
        at += 1
    return at


@_compiled
def _separate(digits: Any, n: int, radix: int, each: int, record: Any, at: int) -> int:
    if not each:
        for j in range(n):
            digits[j] = np.uint16(record[at + 2 * j]) | (np.uint16(record[at + 2 * j + 1]) << np.uint16(8))
        return at + 2 * n
    for first in range(0, n, each):
        rest = np.int64(record[at])
        for j in range(first, min(first + each, n)):
            digits[j] = np.uint16(rest % radix)
            rest //= radix
        at += 1
    return at


@_compiled
def _subtract(state: Any, current: Any, gain: Any, scale: Any, v: Any) -> None:
    for j in range(len(state)):
        v[j] = state[j] * scale - np.rint(current[j] * gain * scale)


@_compiled
def _subtract_and_unreset(
    state: Any, current: Any, gain: Any, scale: Any, fired: Any, theta: Any, v: Any
) -> None:
    for j in range(len(state)):
        w = state[j] * scale - np.rint(current[j] * gain * scale)
        v[j] = w + np.float32(fired[j]) * np.float32(_at(theta, j))


@_compiled
def _lowest(v: Any, inverse: Any, offset: Any, n: int) -> None:
    for j in range(n):
        v[j] = np.ceil(v[j] * _at(inverse, j) + _at(offset, j))


@_compiled
def _lowest_of_two(v: Any, inverse: Any, offset: Any, spare: Any, n: int, codes: Any) -> None:
    """The lowest preimages, and codes that are 1 where there are two."""
    codes[n:] = 0
    for j in range(n):
        q = v[j] * _at(inverse, j) + _at(offset, j)
        v[j] = np.ceil(q)
        several = 1.0 if v[j] - q < _at(spare, j) else 0.0
        codes[j] = np.uint8(np.int32(several))


@_compiled
def _undo(
    state: Any, current: Any, spikes: Any, beta: Any, inverse: Any, offset: Any, spare: Any, theta: Any,
    radix: int, each: int, kind: int, scale: float, gain: Any, record: Any, out: Any,
) -> None:  # fmt: skip
    v, codes, digits = np.empty(STRETCH), np.zeros(STRETCH, np.uint8), np.empty(STRETCH, np.uint16)
    unit, at = 1 / scale, 0
    if kind >= _ZERO_BEFORE:
        record = record[_undo_overshoot(out, spikes, theta, scale, record) :]
    for start in range(0, len(state), STRETCH):
        part = slice(start, min(start + STRETCH, len(state)))
        hs, xs, outs = state[part], current[part], out[part]
        n = len(hs)
        if kind == _MINUS_THETA:
            thetas = _of(theta, part)
            _subtract_and_unreset(hs, xs, gain, np.float32(scale), spikes[part], thetas, v)
        else:
            _subtract(hs, xs, gain, np.float32(scale), v)
        if kind >= _ZERO_BEFORE:
            _zero_where(spikes[part], v)
        inverses, offsets = _of(inverse, part), _of(offset, part)
        if radix == 2:
            _lowest_of_two(v, inverses, offsets, _of(spare, part), n, codes)
            at = _pull(codes, n, record, at)
            for j in range(n):
                v[j] += codes[j]
        elif radix > 2:
            _lowest(v, inverses, offsets, n)
            at = _separate(digits, n, radix, each, record, at)
            for j in range(n):
                v[j] += digits[j]
        if kind >= _ZERO_BEFORE:
            fired = spikes[part]
            for j in range(n):
                outs[j] = outs[j] if fired[j] != 0 else np.float32((v[j] + 0.0) * unit)
        else:
            for j in range(n):
                outs[j] = np.float32((v[j] + 0.0) * unit)  # -0 + 0 is +0


@_compiled
def _reset(h: Any, spikes: Any, theta: Any, soft: bool, to: Any, unit: Any, out: Any) -> Any:
    if soft:
        for i in range(len(h)):
            out[i] = h[i] - spikes[i] * (np.float32(_at(theta, i)) * unit)
    else:
        for i in range(len(h)):
            out[i] = to if spikes[i] != 0 else h[i]
    return _as_float(_largest(out, np.int32(0)))


@_compiled
def _unreset(v: Any, spikes: Any, theta: Any, unit: Any, out: Any) -> None:
    for i in range(len(v)):
        out[i] = v[i] + np.float32(spikes[i]) * (np.float32(_at(theta, i)) * unit)


# -- as the other forms have it ----------------------------------------------------------------------


def fire(h: torch.Tensor, threshold: Any, inclusive: bool, out: torch.Tensor) -> Piece:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.fire`."""
    bits = np.empty((len(h) + 7) // 8, np.uint8)
    _fire(h.numpy(), _single(threshold), inclusive, out.numpy(), bits)
    return bits


def fired(bits: Piece, out: torch.Tensor) -> None:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.fired`."""
    _unpack(bits, out.numpy())


def charge(
    u: torch.Tensor,
    current: torch.Tensor,
    spikes: torch.Tensor | None,
    step: Step,
    record: bool,
    out: torch.Tensor,
) -> tuple[list[Any], float]:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.charge`."""
    radix, each = _radix(step)
    kind = _KINDS.get(step.reset, _KEEP)
    un, sn, theta = u.numpy(), _NOTHING if spikes is None else spikes.numpy(), _double(step.theta)
    digits, pieces = _NO_BYTES, []
    if record and radix > 1:
        digits = np.empty(len(un) // each + 2 if each else 2 * len(un), np.uint8)
    if record and kind >= _ZERO_BEFORE:
        pieces.append(_overshoot(un, sn, theta, step.scale))
    gain = np.float32(1 if step.gain is None else step.gain)
    used, reach = _charge(
        un, current.numpy(), sn, step.decay.arrays[0], theta, radix, each, kind, step.scale, gain,
        out.numpy(), digits,
    )  # fmt: skip
    if used:
        pieces.append(digits[:used])
    return pieces, reach


def undo(
    state: torch.Tensor, current: torch.Tensor, bits: Piece | None, step: Step, record: Piece
) -> torch.Tensor:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.undo`."""
    radix, each = _radix(step)
    kind = _KINDS.get(step.reset, _KEEP)
    out = torch.empty_like(state)
    spikes = _NO_BYTES
    if kind != _KEEP:
        spikes = np.empty(len(state), np.uint8)
        _unpack(bits, spikes)
    gain = np.float32(1 if step.gain is None else step.gain)
    _undo(
        state.numpy(), current.numpy(), spikes, *step.decay.arrays, _double(step.theta), radix, each, kind,
        step.scale, gain, record, out.numpy(),
    )  # fmt: skip
    return out


def reset(
    h: torch.Tensor,
    spikes: torch.Tensor,
    theta: Any,
    to: float | None,
    scale: float,
    record: bool,
    out: torch.Tensor,
) -> tuple[list[Any], float]:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.reset`."""
    hn, sn, theta = h.numpy(), spikes.numpy(), _double(theta)
    pieces = [_overshoot(hn, sn, theta, scale)] if record and to is not None else []
    unit, value = np.float32(1 / scale), np.float32(to or 0.0)
    return pieces, _reset(hn, sn, theta, to is None, value, unit, out.numpy())


def unreset(
    v: torch.Tensor, bits: Piece, theta: Any, to: float | None, scale: float, record: Piece
) -> torch.Tensor:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.unreset`."""
    spikes = np.empty(len(v), np.uint8)
    _unpack(bits, spikes)
    if to is None:
        out = torch.empty_like(v)
        _unreset(v.numpy(), spikes, _double(theta), np.float32(1 / scale), out.numpy())
    else:
        out = v.clone()
        _undo_overshoot(out.numpy(), spikes, _double(theta), scale, record)
    return out


def _radix(step: Step) -> tuple[int, int]:
    """The radix, and how many of its digits fit a byte: 0 if one takes two."""
    radix = step.decay.radix
    if radix <= 2:
        return radix, 8
    return radix, 0 if radix > 256 else digits_a_byte(radix)


def _single(value: Any) -> Any:
    return np.float32(value) if isinstance(value, float) else value.numpy()


def _double(value: Any) -> Any:
    return value if isinstance(value, float) else value.numpy()
