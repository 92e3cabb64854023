"""One neuron's step on the grid and back, on the CPU: the digits that a step loses are compacted.

Held to :mod:`.grid.step.reference`, which is the specification of the arithmetic; the
records differ. Works in blocks of neurons that fit a core's cache, through numpy, whose comparisons are
several times faster than torch's there.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from snn_reversible_plugin.grid.decays import AFTER, BEFORE, SUBTRACT, Decay, Step, digits_a_byte
from snn_reversible_plugin.grid.step import Record, reference

BLOCK = 1 << 15
Piece = np.ndarray[Any, Any]

# NOTE [What is written down of a step]
#
# 1. Let y = beta U + 1/2, V = floor(y) and r = y - V, exactly (float64). U is the digit-th preimage of V,
#    counted from the lowest, for digit = floor(r / beta): a step down in U is a step of beta down in r.
# 2. For beta > 1/2, V has one or two preimages. There are two iff digit is 1 or r + beta < 1. Undoing finds
#    that out from V alone, so digits are written down only where there are two, one bit each: log2(1/beta)
#    bits are what is lost on average, and 2 (1 - beta) bits are written.
# 3. For beta <= 1/2 there are always several; digits are written in the mixed radix, as many as fit a byte.
# 4. A reset to zero loses U where the neuron fired. There it is written instead of a digit, as its
#    distance from the threshold, which is small and never negative.
# 5. A record is the blocks' pieces one after the other. Their lengths are known again when it is read.

_local = threading.local()


def _scratch() -> tuple[Any, ...]:
    rows = getattr(_local, "rows", None)
    if rows is None:
        doubles = [np.empty(BLOCK) for _ in range(2)]
        singles = [np.empty(BLOCK, np.float32) for _ in range(2)]
        truths = [np.empty(BLOCK, np.bool_) for _ in range(2)]
        rows = _local.rows = (*doubles, *singles, *truths)
    return rows  # type: ignore[no-any-return]


def _of(value: Any, part: slice) -> Any:
    return value if isinstance(value, float) else value[part]


def _array(value: Any) -> Any:
    return value if isinstance(value, float) else value.numpy()


def blocks(n: int) -> list[slice]:
    """The stretches of neurons that are worked on together."""
    return [slice(a, min(a + BLOCK, n)) for a in range(0, n, BLOCK)]


def as_pieces(chunk: torch.Tensor) -> Piece:
    """Bytes as this form reads and writes them."""
    return chunk.numpy()


def fire(h: torch.Tensor, threshold: Any, inclusive: bool, out: torch.Tensor) -> Piece:
    """Write the spikes of the potentials ``h`` into ``out``, and return them as bits."""
    flags = (np.greater_equal if inclusive else np.greater)(h.numpy(), _array(threshold))
    np.copyto(out.numpy(), flags.view(np.uint8))
    return np.packbits(flags, bitorder="little")


def fired(bits: Piece, out: torch.Tensor) -> None:
    """Write spikes that :func:`fire` gave as bits into ``out``."""
    flags = np.unpackbits(bits, count=len(out), bitorder="little")
    np.copyto(out.numpy(), flags)


def charge(
    u: torch.Tensor,
    current: torch.Tensor,
    bits: Piece | None,
    step: Step,
    record: Record | None,
    out: torch.Tensor,
    fires: tuple[Any, bool, torch.Tensor] | None = None,
) -> tuple[list[Any], Any, Piece | None]:
    """Write the state after ``decay(u) + current`` into ``out``, and :func:`fire` with it where it fires.

    ``bits``: the spikes of ``u``, where they reset it; ``fires``: the other arguments of :func:`fire`.
    Returns what has to be written down of ``u``, the largest magnitude in ``out``, NaN if there is one,
    and the bits of its spikes.
    """
    pieces: list[Piece] = []
    un, xn, on = u.numpy(), current.numpy(), out.numpy()
    sn = None if bits is None else _spikes(bits, len(un))
    beta, theta = step.decay.arrays, _array(step.theta)
    for part in blocks(len(un)):
        n = part.stop - part.start
        a, v, w, x, digit, several = (row[:n] for row in _scratch())
        of_beta = tuple(_of(value, part) for value in beta)
        _units(un[part], step.scale, out=v)
        fired = None
        if step.reset in (BEFORE, AFTER):
            assert sn is not None
            fired = np.flatnonzero(sn[part])
            if record is not None and len(fired):
                pieces += _overshoot(v.take(fired) - _of_indices(theta, part, fired))
            v[fired] = 0
        _decayed(v, of_beta, a)
        if record is not None:
            _digits(step.decay, of_beta, a, v, digit, several, pieces)
        np.copyto(w, v, casting="unsafe")
        if step.reset == SUBTRACT:
            assert sn is not None
            np.multiply(sn[part], np.float32(theta) if isinstance(theta, float) else theta[part], out=x)
            w -= x
        w += _current_units(xn[part], step, x)
        if step.reset == AFTER:
            w[fired] = 0
        np.multiply(w, np.float32(1 / step.scale), out=on[part])
    return pieces, _reach(on), None if fires is None else fire(out, *fires)


def undo(
    state: torch.Tensor, current: torch.Tensor, bits: Piece | None, step: Step, record: Piece
) -> torch.Tensor:
    """The state that :func:`charge` started from; ``bits``: its spikes, as :func:`fire` gave them."""
    out = torch.empty_like(state)
    hn, xn, on = state.numpy(), current.numpy(), out.numpy()
    sn = None if bits is None else _spikes(bits, len(hn))
    beta, theta = step.decay.arrays, _array(step.theta)
    at = 0
    for part in blocks(len(hn)):
        n = part.stop - part.start
        a, v, w, x, _, several = (row[:n] for row in _scratch())
        np.multiply(hn[part], np.float32(step.scale), out=w)
        w -= _current_units(xn[part], step, x)
        fired = lost = None
        if step.reset in (BEFORE, AFTER):
            assert sn is not None
            fired = np.flatnonzero(sn[part])
            if len(fired):
                lost, at = _read_overshoot(record, at, len(fired))
                lost += _of_indices(theta, part, fired)
            w[fired] = 0
        elif step.reset == SUBTRACT:
            assert sn is not None
            np.multiply(sn[part], np.float32(theta) if isinstance(theta, float) else theta[part], out=x)
            w += x
        at = _undecayed(
            step.decay, tuple(_of(value, part) for value in beta), w, (a, v, several), record, at
        )
        if lost is not None:
            v[fired] = lost
        v += 0.0  # -0 + 0 is +0
        np.multiply(v, 1 / step.scale, out=on[part], casting="unsafe")
    return out


def _units(values: Piece, scale: float, out: Piece) -> None:
    np.multiply(values, np.float64(scale), out=out)


def _current_units(values: Piece, step: Step, out: Piece) -> Piece:
    if step.gain is None:
        np.multiply(values, np.float32(step.scale), out=out)
    else:
        np.multiply(values, np.float32(step.gain), out=out)
        out *= np.float32(step.scale)
    return np.rint(out, out=out)


def _decayed(v: Piece, of_beta: tuple[Any, ...], a: Piece) -> None:
    """beta * v rounded into v, and the fraction r in a."""
    np.multiply(v, of_beta[0], out=a)
    a += 0.5
    np.floor(a, out=v)
    a -= v


def _digits(
    decay: Decay, of_beta: tuple[Any, ...], a: Piece, v: Piece, digit: Piece, several: Piece, pieces: Any
) -> None:
    beta = of_beta[0]
    if decay.radix == 1:
        return
    if decay.radix == 2:
        np.greater_equal(a, beta, out=digit)
        if decay.always_several:
            pieces.append(np.packbits(digit, bitorder="little"))
            return
        np.less(a, 1 - beta, out=several)
        several |= digit
        written = np.flatnonzero(several)
        if len(written):
            pieces.append(np.packbits(digit.take(written), bitorder="little"))
        return
    a /= beta
    pieces.append(_pack(np.floor(a), decay.radix))


def _undecayed(
    decay: Decay,
    of_beta: tuple[Any, ...],
    w: Piece,
    rows: tuple[Piece, Piece, Piece],
    record: Piece,
    at: int,
) -> int:
    """The preimages of w into v, of the ``rows`` (room, v, truths); returns where the next piece begins."""
    a, v, several = rows
    _, inverse, offset, spare = of_beta
    if decay.radix == 1:
        np.copyto(v, w)
        return at
    np.multiply(w, np.asarray(inverse, np.float64), out=a)
    a += offset
    np.ceil(a, out=v)
    if decay.radix > 2:
        digits, at = _unpack(record, at, len(v), decay.radix)
        v += digits
        return at
    if decay.always_several:
        end = at + (len(v) + 7) // 8
        v += np.unpackbits(record[at:end], count=len(v), bitorder="little")
        return end
    np.subtract(v, a, out=a)
    np.less(a, spare, out=several)
    written = np.flatnonzero(several)
    if len(written):
        end = at + (len(written) + 7) // 8
        v[written] += np.unpackbits(record[at:end], count=len(written), bitorder="little")
        at = end
    return at


def _pack(digits: Piece, radix: int) -> Piece:
    if radix > 256:
        return digits.astype("<u2").view(np.uint8)
    each = digits_a_byte(radix)
    digits = digits.astype(np.uint8)
    if len(digits) % each:
        digits = np.pad(digits, (0, -len(digits) % each))
    total = digits[each - 1 :: each].copy()
    for place in reversed(range(each - 1)):
        total *= np.uint8(radix)
        total += digits[place::each]
    return total


def _unpack(record: Piece, at: int, n: int, radix: int) -> tuple[Piece, int]:
    if radix > 256:
        end = at + 2 * n
        return record[at:end].copy().view("<u2"), end
    each = digits_a_byte(radix)
    end = at + -(-n // each)
    rest = record[at:end].copy()
    digits = np.empty((len(rest), each), np.uint8)
    for place in range(each):
        digits[:, place] = rest % np.uint8(radix) if radix < 256 else rest
        if place + 1 < each:
            rest //= np.uint8(radix)
    return digits.reshape(-1)[:n], end


def _of_indices(value: Any, part: slice, indices: Piece) -> Any:
    return value if isinstance(value, float) else value[part].take(indices)


def _overshoot(values: Piece) -> list[Piece]:
    """Non-negative integers in as many bytes each as the largest needs, after a byte that tells."""
    width = 2
    while values.max() >= 256.0**width and width < 4:
        width += 1
    words = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    return [np.array([width], np.uint8), np.ascontiguousarray(words[:, :width]).reshape(-1)]


def _read_overshoot(record: Piece, at: int, n: int) -> tuple[Piece, int]:
    width = int(record[at])
    end = at + 1 + n * width
    words = np.zeros((n, 4), np.uint8)
    words[:, :width] = record[at + 1 : end].reshape(n, width)
    return words.reshape(-1).view("<u4").astype(np.float64), end


def reset(
    h: torch.Tensor,
    spikes: torch.Tensor,
    theta: Any,
    to: float | None,
    scale: float,
    record: bool,
    out: torch.Tensor,
) -> tuple[list[Any], Any]:
    """Write the state after a reset at once into ``out``: by subtraction (``to`` None), or to a value.

    Returns what has to be written down of ``h``, and the largest magnitude in ``out``.
    """
    hn, sn, on, theta = h.numpy(), spikes.numpy(), out.numpy(), _array(theta)
    pieces: list[Piece] = []
    if to is None:
        np.multiply(sn, np.asarray(theta, np.float32) / np.float32(scale), out=on)
        np.subtract(hn, on, out=on)
        return pieces, _reach(on)
    np.copyto(on, hn)
    for part in blocks(len(hn)):
        fired = np.flatnonzero(sn[part])
        if not len(fired):
            continue
        if record:
            units = hn[part].take(fired).astype(np.float64) * scale
            pieces += _overshoot(units - _of_indices(theta, part, fired))
        on[part][fired] = to
    return pieces, _reach(on)


def unreset(
    v: torch.Tensor, bits: Piece, theta: Any, to: float | None, scale: float, record: Piece
) -> torch.Tensor:
    """The charged state that :func:`reset` started from; ``bits`` as in :func:`undo`."""
    vn, sn, theta = v.numpy(), _spikes(bits, len(v)), _array(theta)
    if to is None:
        return torch.from_numpy(vn + sn * (np.asarray(theta, np.float32) / np.float32(scale)))
    out = v.clone()
    on, at = out.numpy(), 0
    for part in blocks(len(vn)):
        fired = np.flatnonzero(sn[part])
        if len(fired):
            units, at = _read_overshoot(record, at, len(fired))
            on[part][fired] = (units + _of_indices(theta, part, fired)) / scale
    return out


add_past_reset, add_through_reset = reference.add_past_reset, reference.add_through_reset


def gate(g: torch.Tensor, factor: Any, bits: Piece, out: torch.Tensor) -> None:
    """See :func:`.grid.step.reference.gate`."""
    on = out.numpy()
    np.multiply(g.numpy(), np.asarray(_array(factor), np.float32), out=on)
    on *= 1 - _spikes(bits, len(on))


def _spikes(bits: Piece, n: int) -> Piece:
    return np.unpackbits(bits, count=n, bitorder="little").astype(np.float32)


def _reach(values: Piece) -> Any:
    return np.maximum(values.max(), -values.min()) if len(values) else 0.0
