"""One neuron's step on the grid and back, on the CPU, by the loops that :mod:`.kernels_numba` compiles.

The arithmetic is that of :mod:`.grid.step.reference`, which is the specification, and
what is written down that of :mod:`.grid.step.on_numpy`; only the order of the bytes
is another.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from snn_reversible_plugin.grid.decays import AFTER, BEFORE, SUBTRACT, Step, digits_a_byte
from snn_reversible_plugin.grid.step import Record, Undo, kernels
from snn_reversible_plugin.grid.step import gradient_kernels as gradients

Piece = np.ndarray[Any, Any]
_KINDS = {SUBTRACT: kernels.MINUS_THETA, BEFORE: kernels.ZERO_BEFORE, AFTER: kernels.ZERO_AFTER}
_NOTHING = np.empty(0, np.float32)
_NO_BYTES = np.empty(0, np.uint8)


def as_pieces(chunk: torch.Tensor) -> Piece:
    """Bytes as this form reads and writes them."""
    return chunk.numpy()


def fire(h: torch.Tensor, threshold: Any, inclusive: bool, out: torch.Tensor) -> Piece:
    """See :func:`.grid.step.on_numpy.fire`."""
    bits = np.empty((len(h) + 7) // 8, np.uint8)
    kernels.fire(h.numpy(), _single(threshold), inclusive, out.numpy(), bits)
    return bits


def fired(bits: Piece, out: torch.Tensor) -> None:
    """See :func:`.grid.step.on_numpy.fired`."""
    kernels.unpack(bits, out.numpy())


def charge(
    u: torch.Tensor,
    current: torch.Tensor,
    bits: Piece | None,
    step: Step,
    record: Record | None,
    out: torch.Tensor,
    fires: tuple[Any, bool, torch.Tensor] | None = None,
) -> tuple[list[Any], float, Piece | None]:
    """See :func:`.grid.step.on_numpy.charge`."""
    radix, each = _radix(step)
    kind = _KINDS.get(step.reset, kernels.KEEP)
    un, theta = u.numpy(), _double(step.theta)
    reset_by = _NO_BYTES if kind == kernels.KEEP else bits
    digits, pieces = _NO_BYTES, []
    if record is not None and radix > 1:
        digits = np.empty(len(un) // each + 2 if each else 2 * len(un), np.uint8)
    if record is not None and kind >= kernels.ZERO_BEFORE:
        pieces.append(kernels.overshoot(un, reset_by, theta, step.scale))
    gain = np.float32(1 if step.gain is None else step.gain)
    threshold, inclusive, spikes = (0.0, False, None) if fires is None else fires
    found = _NO_BYTES if spikes is None else np.empty((len(un) + 7) // 8, np.uint8)
    used, reach = kernels.charge(
        un, current.numpy(), reset_by, step.decay.arrays[0], theta, radix, each, kind, step.scale, gain,
        out.numpy(), digits, _single(threshold), inclusive, _NOTHING if spikes is None else spikes.numpy(),
        found,
    )  # fmt: skip
    if used:
        pieces.append(digits[:used])
    return pieces, reach, None if spikes is None else found


def undo(
    state: torch.Tensor, current: torch.Tensor, bits: Piece | None, step: Step, record: Piece
) -> torch.Tensor:
    """See :func:`.grid.step.on_numpy.undo`."""
    radix, each = _radix(step)
    kind = _KINDS.get(step.reset, kernels.KEEP)
    out = torch.empty_like(state)
    reset_by = _NO_BYTES if kind == kernels.KEEP else bits
    gain = np.float32(1 if step.gain is None else step.gain)
    kernels.undo(
        state.numpy(), current.numpy(), reset_by, *step.decay.arrays, _double(step.theta), radix, each,
        kind, step.scale, gain, record, out.numpy(),
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
    """See :func:`.grid.step.on_numpy.reset`."""
    hn, sn, theta = h.numpy(), spikes.numpy(), _double(theta)
    pieces = []
    if record and to is not None:
        pieces.append(kernels.overshoot(hn, np.packbits(sn != 0, bitorder="little"), theta, scale))
    unit, value = np.float32(1 / scale), np.float32(to or 0.0)
    return pieces, kernels.reset(hn, sn, theta, to is None, value, unit, out.numpy())


def unreset(
    v: torch.Tensor, bits: Piece, theta: Any, to: float | None, scale: float, record: Piece
) -> torch.Tensor:
    """See :func:`.grid.step.on_numpy.unreset`."""
    if to is None:
        out = torch.empty_like(v)
        spikes = np.empty(len(v), np.uint8)
        kernels.unpack(bits, spikes)
        kernels.unreset(v.numpy(), spikes, _double(theta), np.float32(1 / scale), out.numpy())
    else:
        out = v.clone()
        kernels.undo_overshoot(out.numpy(), bits, _double(theta), scale, record)
    return out


def charge_and_reset(
    u: torch.Tensor,
    current: torch.Tensor,
    step: Step,
    to: float | None,
    record: Record | None,
    out: tuple[torch.Tensor, torch.Tensor],
    fires: tuple[float, bool, torch.Tensor],
) -> tuple[list[Any], list[Any], float, Piece]:
    """See :func:`.grid.step.on_triton.charge_and_reset`. One call."""
    radix, each = _radix(step)
    n, (h, after), (threshold, inclusive, spikes) = len(u), out, fires
    digits, bits = _NO_BYTES, np.empty((n + 7) // 8, np.uint8)
    if record is not None and radix > 1:
        digits = np.empty(n // each + 2 if each else 2 * n, np.uint8)
    soft, keeps = to is None, record is not None
    used, charged, reach, overshot = kernels.charge_and_reset(
        u.numpy(), current.numpy(), step.decay.beta, step.theta, radix, each, step.scale,
        1.0 if step.gain is None else step.gain, h.numpy(), digits, threshold, inclusive, spikes.numpy(),
        bits, to or 0.0, soft, keeps, after.numpy(),
    )  # fmt: skip
    # NaN is in range of nothing, and has to come through.
    reach = charged if charged >= reach or charged != charged else reach
    return [digits[:used]] if used else [], [overshot] if keeps and not soft else [], reach, bits


def undo_charge_and_reset(
    after: torch.Tensor,
    current: torch.Tensor,
    bits: Piece,
    step: Step,
    to: float | None,
    lost: Any,
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.grid.step.on_triton.undo_charge_and_reset`. One call. ``before``: a place for it."""
    radix, each = _radix(step)
    charged, out = torch.empty_like(after), torch.empty_like(after) if before is None else before
    kernels.undo_charge_and_reset(
        after.numpy(), current.numpy(), bits, *step.decay.arrays, step.theta, radix, each, step.scale,
        1.0 if step.gain is None else step.gain, to is None, *lost, charged.numpy(), out.numpy(),
    )  # fmt: skip
    return charged, out


def _of_each(g: torch.Tensor, h: torch.Tensor) -> Any:
    """A gradient for each neuron, of one for all."""
    return (g if g.numel() == h.numel() else g.expand(len(h)).contiguous()).numpy()


def _charged(after: torch.Tensor, undo: Undo, to: float | None) -> torch.Tensor:
    step, bits, planes, digits, current, before = undo
    if current is None:
        return unreset(after, bits, step.theta, to, step.scale, planes)
    return undo_charge_and_reset(after, current, bits, step, to, (digits, planes), before)[0]


def gradient(
    h: torch.Tensor,
    given: tuple[torch.Tensor | None, torch.Tensor | None],
    rule: Any,
    surrogate: Any,
    factors: tuple[Any, float | None],
    made: tuple[torch.Tensor | None, torch.Tensor],
    undo: Undo | None = None,
) -> None:
    """See :func:`.grid.step.on_triton.gradient`. One call, and one that undoes."""
    if undo is not None:
        h = _charged(h, undo, rule.v_reset)
    (beta, gain), (by_v, by_x) = factors, made
    assert _COMPILED[surrogate.name] is atan, surrogate.name
    ((_, alpha),) = surrogate.parameters
    g_s, g_v = given
    gradients.step(
        h.numpy(), None if g_s is None else _of_each(g_s, h), None if g_v is None else _of_each(g_v, h),
        None if by_v is None else by_v.numpy(), by_x.numpy(), rule.v_threshold, rule.rest, float(beta),
        1.0 if gain is None else gain,
        math.pi / 2 * alpha, alpha / 2, rule.v_reset is None, rule.detach_reset,
    )  # fmt: skip


def gate(g: torch.Tensor, factor: Any, bits: Piece, out: torch.Tensor) -> None:
    """See :func:`.grid.step.reference.gate`."""
    kernels.gate(g.numpy(), _single(factor), bits, out.numpy())


def add_past_reset(h: torch.Tensor, threshold: float, g: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`.grid.step.reference.add_past_reset`."""
    gradients.add_past_reset(h.numpy(), np.float32(threshold), g.numpy(), out.numpy())


def add_through_reset(
    h: torch.Tensor, threshold: float, to: float | None, g_v: torch.Tensor, g_s: torch.Tensor
) -> None:
    """See :func:`.grid.step.reference.add_through_reset`."""
    single, value = np.float32(threshold), np.float32(to or 0.0)
    gradients.add_through_reset(h.numpy(), single, value, to is None, g_v.numpy(), g_s.numpy())


def atan(h: torch.Tensor, theta: Any, grad: torch.Tensor, out: torch.Tensor, *, alpha: float) -> None:
    """Write the gradient through snnTorch's ``ATan`` surrogate of ``h - theta`` into ``out``."""
    factor, half = np.float32(math.pi / 2 * alpha), np.float32(alpha / 2)
    gradients.atan(h.numpy(), _single(theta), grad.numpy(), factor, half, out.numpy())


def fast_sigmoid(
    h: torch.Tensor, theta: Any, grad: torch.Tensor, out: torch.Tensor, *, slope: float
) -> None:
    """The same of its ``FastSigmoid``."""
    gradients.fast_sigmoid(h.numpy(), _single(theta), grad.numpy(), np.float32(slope), out.numpy())


_COMPILED: dict[str, Callable[..., None]] = {
    "snntorch.atan": atan,
    "snntorch.fast_sigmoid": fast_sigmoid,
    "spikingjelly.ATan": atan,
}


def in_one_pass(name: str, parameters: dict[str, float]) -> Callable[..., None] | None:
    """``write(membrane, threshold, grad, out)`` of a surrogate's formula; None where nothing is compiled.

    Tensors are flat and float32.
    """
    return functools.partial(_COMPILED[name], **parameters) if name in _COMPILED else None


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
