"""One neuron's step on the grid and back, on the CPU, compiled: each function is one pass over the neurons.

The arithmetic is that of :mod:`snn_reversible_plugin.ops.steps_torch`, which is the specification, and
what is written down that of :mod:`snn_reversible_plugin.ops.steps_numpy`; only the order of the bytes
is another (:mod:`.records_numba`, which has the notes on what compiles to what).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from snn_reversible_plugin.ops.decays import AFTER, BEFORE, SUBTRACT, Step, digits_a_byte
from snn_reversible_plugin.ops.records_numba import (
    STRETCH,
    combine,
    compiled,
    element_of,
    overshoot,
    pack,
    part_of,
    pull,
    push,
    separate,
    undo_overshoot,
    unpack,
)

Piece = np.ndarray[Any, Any]
_KEEP, _MINUS_THETA, _ZERO_BEFORE, _ZERO_AFTER = range(4)
_KINDS = {SUBTRACT: _MINUS_THETA, BEFORE: _ZERO_BEFORE, AFTER: _ZERO_AFTER}
_NOTHING = np.empty(0, np.float32)
_NO_BYTES = np.empty(0, np.uint8)


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
def _fire(h: Any, threshold: Any, inclusive: bool, out: Any, bits: Any) -> None:
    flags = np.empty(STRETCH, np.uint8)
    for start in range(0, len(h), STRETCH):
        part = slice(start, min(start + STRETCH, len(h)))
        hs, thresholds, spikes = h[part], part_of(threshold, part), out[part]
        n = len(hs)
        if inclusive:
            for j in range(n):
                flags[j] = np.uint8(1 if hs[j] >= element_of(thresholds, j) else 0)
        else:
            for j in range(n):
                flags[j] = np.uint8(1 if hs[j] > element_of(thresholds, j) else 0)
        for j in range(n):
            spikes[j] = flags[j]
        pack(flags[:n], bits[start // 8 :])


@compiled
def _zero_where(fired: Any, v: Any) -> None:
    for j in range(len(fired)):
        v[j] = 0 if fired[j] != 0 else v[j]


@compiled
def _decay(v: Any, beta: Any, n: int) -> None:
    for j in range(n):
        v[j] = np.floor(element_of(beta, j) * v[j] + 0.5)


@compiled
def _decay_and_bits(v: Any, beta: Any, n: int, codes: Any) -> None:
    """Decay, and the codes of the digits, of radix 2, that :func:`push` takes."""
    codes[n:] = 0
    for j in range(n):
        y = element_of(beta, j) * v[j] + 0.5
        v[j] = np.floor(y)
        r = y - v[j]
        code = 2.0 if r < 1 - element_of(beta, j) else 0.0
        code = 3.0 if r >= element_of(beta, j) else code
        codes[j] = np.uint8(np.int32(code))


@compiled
def _decay_and_digits(v: Any, beta: Any, n: int, digits: Any) -> None:
    for j in range(n):
        y = element_of(beta, j) * v[j] + 0.5
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
        w = np.float32(v[j]) - fired[j] * np.float32(element_of(theta, j))
        out[j] = (w + np.rint(current[j] * gain * scale)) * unit


@compiled
def _charge(
    u: Any, current: Any, spikes: Any, beta: Any, theta: Any, radix: int, each: int, kind: int,
    scale: float, gain: Any, out: Any, lost: Any,
) -> tuple[int, Any]:  # fmt: skip
    """The step; returns how many bytes of digits it wrote to ``lost``, and the reach."""
    v, codes, digits = np.empty(STRETCH), np.zeros(STRETCH, np.uint8), np.empty(STRETCH, np.uint16)
    at, waiting, held, largest = 0, 0, 0, np.int32(0)
    for start in range(0, len(u), STRETCH):
        part = slice(start, min(start + STRETCH, len(u)))
        us, xs, outs, betas = u[part], current[part], out[part], part_of(beta, part)
        n = len(us)
        for j in range(n):
            v[j] = us[j] * scale
        if kind >= _ZERO_BEFORE:
            _zero_where(spikes[part], v)
        if len(lost) == 0:
            _decay(v, betas, n)
        elif radix == 2:
            _decay_and_bits(v, betas, n, codes)
            at, waiting, held = push(codes, n, lost, at, waiting, held)
        else:
            _decay_and_digits(v, betas, n, digits)
            at = combine(digits, n, radix, each, lost, at)
        if kind == _MINUS_THETA:
            _add_and_reset(v, xs, gain, np.float32(scale), spikes[part], part_of(theta, part), outs)
        else:
            _add(v, xs, gain, np.float32(scale), outs)
        if kind == _ZERO_AFTER:
            _zero_where(spikes[part], outs)
        largest = _largest(outs, largest)
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
def _undo(
    state: Any, current: Any, spikes: Any, beta: Any, inverse: Any, offset: Any, spare: Any, theta: Any,
    radix: int, each: int, kind: int, scale: float, gain: Any, record: Any, out: Any,
) -> None:  # fmt: skip
    v, codes, digits = np.empty(STRETCH), np.zeros(STRETCH, np.uint8), np.empty(STRETCH, np.uint16)
    unit, at = 1 / scale, 0
    if kind >= _ZERO_BEFORE:
        record = record[undo_overshoot(out, spikes, theta, scale, record) :]
    for start in range(0, len(state), STRETCH):
        part = slice(start, min(start + STRETCH, len(state)))
        hs, xs, outs = state[part], current[part], out[part]
        n = len(hs)
        if kind == _MINUS_THETA:
            thetas = part_of(theta, part)
            _subtract_and_unreset(hs, xs, gain, np.float32(scale), spikes[part], thetas, v)
        else:
            _subtract(hs, xs, gain, np.float32(scale), v)
        if kind >= _ZERO_BEFORE:
            _zero_where(spikes[part], v)
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
        if kind >= _ZERO_BEFORE:
            fired = spikes[part]
            for j in range(n):
                outs[j] = outs[j] if fired[j] != 0 else np.float32((v[j] + 0.0) * unit)
        else:
            for j in range(n):
                outs[j] = np.float32((v[j] + 0.0) * unit)  # -0 + 0 is +0


@compiled
def _reset(h: Any, spikes: Any, theta: Any, soft: bool, to: Any, unit: Any, out: Any) -> Any:
    if soft:
        for i in range(len(h)):
            out[i] = h[i] - spikes[i] * (np.float32(element_of(theta, i)) * unit)
    else:
        for i in range(len(h)):
            out[i] = to if spikes[i] != 0 else h[i]
    return _as_float(_largest(out, np.int32(0)))


@compiled
def _unreset(v: Any, spikes: Any, theta: Any, unit: Any, out: Any) -> None:
    for i in range(len(v)):
        out[i] = v[i] + np.float32(spikes[i]) * (np.float32(element_of(theta, i)) * unit)


# -- as the other forms have it ----------------------------------------------------------------------


def fire(h: torch.Tensor, threshold: Any, inclusive: bool, out: torch.Tensor) -> Piece:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.fire`."""
    bits = np.empty((len(h) + 7) // 8, np.uint8)
    _fire(h.numpy(), _single(threshold), inclusive, out.numpy(), bits)
    return bits


def fired(bits: Piece, out: torch.Tensor) -> None:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.fired`."""
    unpack(bits, out.numpy())


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
        pieces.append(overshoot(un, sn, theta, step.scale))
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
        unpack(bits, spikes)
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
    pieces = [overshoot(hn, sn, theta, scale)] if record and to is not None else []
    unit, value = np.float32(1 / scale), np.float32(to or 0.0)
    return pieces, _reset(hn, sn, theta, to is None, value, unit, out.numpy())


def unreset(
    v: torch.Tensor, bits: Piece, theta: Any, to: float | None, scale: float, record: Piece
) -> torch.Tensor:
    """See :func:`snn_reversible_plugin.ops.steps_numpy.unreset`."""
    spikes = np.empty(len(v), np.uint8)
    unpack(bits, spikes)
    if to is None:
        out = torch.empty_like(v)
        _unreset(v.numpy(), spikes, _double(theta), np.float32(1 / scale), out.numpy())
    else:
        out = v.clone()
        undo_overshoot(out.numpy(), spikes, _double(theta), scale, record)
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
