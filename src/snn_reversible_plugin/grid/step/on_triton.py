"""One neuron's step on the grid and back, on GPUs: one launch each, and nothing waits for the device.

The arithmetic is that of :mod:`.grid.step.reference`, which is the specification, in integers. Records have
a size that is known beforehand; parameters are numbers, or float32 tensors that stay where they are.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.grid.decays import AFTER, BEFORE, NONE, SUBTRACT, Step
from snn_reversible_plugin.grid.step import Record, Undo
from snn_reversible_plugin.grid.step import triton_gradient_kernels as gradients
from snn_reversible_plugin.grid.step import triton_kernels as kernels
from snn_reversible_plugin.ops import devices
from snn_reversible_plugin.ops.bits.on_triton import GROUPS, programs, unpack_bits

SIZE = 8 * GROUPS  # elements a program
AT_A_TIME = 1024  # reaches that are zeroed together
_NEXT = {
    NONE: kernels.KEEP.value,
    SUBTRACT: kernels.MINUS_THETA.value,
    BEFORE: kernels.ZERO_BEFORE.value,
    AFTER: kernels.ZERO_AFTER.value,
}


def as_pieces(chunk: Tensor) -> Tensor:
    """Bytes as this form reads and writes them."""
    return chunk


def fire(h: Tensor, threshold: Any, inclusive: bool, out: Tensor) -> Tensor:
    """See :func:`.grid.step.on_numpy.fire`. One launch."""
    n, bits = len(h), _bytes_for(len(h), 1, h)
    if n:
        with torch.cuda.device_of(h):
            value, where = _parameter(threshold)
            kernels.fire[programs(n)](h, value, out, bits, n, where, inclusive, GROUPS)
    return bits


def fired(bits: Tensor, out: Tensor) -> None:
    """See :func:`.grid.step.on_numpy.fired`. One launch."""
    unpack_bits(bits, out)


def charge(
    u: Tensor,
    current: Tensor,
    bits: Tensor | None,
    step: Step,
    record: Record | None,
    out: Tensor,
    fires: tuple[Any, bool, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """See :func:`.grid.step.on_numpy.charge`. One launch. The reach goes on from ``record.reach``.

    The reach is NaN where something that the record should hold is lost: a digit of a decay that learned
    to forget more than ``step.decay.radix`` tells, or a state that is out of range already.
    """
    reset = _NEXT[step.reset]
    digits, planes = _room(u, step, record)
    reach, fired_bits = _reach_of(record, u.device), _bytes_for(len(u), 1, u) if fires else None
    given = (u, current, bits if step.reset != NONE else None, 0.0)
    made = (out, None, digits, planes, fires[2] if fires else None, fired_bits, reach)
    _charge(given, made, step, reset, record is not None, fires)
    return [piece for piece in (digits, planes) if piece is not None], reach, fired_bits


def charge_and_reset(
    u: Tensor,
    current: Tensor,
    step: Step,
    to: float | None,
    record: Record | None,
    out: tuple[Tensor | None, Tensor],
    fires: tuple[Any, bool, Tensor],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """:func:`charge` and :func:`reset` by its spikes, in one launch.

    Args:
        u, current, step, record, fires: what :func:`charge` takes; the step's own reset is NONE.
        to: what :func:`reset` takes.
        out: the charged state, None where nobody wants it, and the state after the reset.

    Returns:
        What has to be written down of ``u``, what of the charged state, the largest magnitude in both
        states, and the bits of the spikes.
    """
    assert step.reset == NONE, step.reset
    reset = _at_once(to)
    digits, _ = _room(u, step, record)
    bits, planes = _bytes_for(len(u), 1, u), None
    if record is not None and to is not None:
        # One after the other: together they are a record, which nobody has to copy.
        both = torch.empty(len(bits) + kernels.PLANES.value * len(u), dtype=torch.uint8, device=u.device)
        bits, planes = both[: len(bits)], both[len(bits) :]
    reach = _reach_of(record, u.device)
    made = (*out, digits, planes, fires[2], bits, reach)
    _charge((u, current, None, 0.0 if to is None else to), made, step, reset, record is not None, fires)
    lost, overshoot = ([] if piece is None else [piece] for piece in (digits, planes))
    return lost, overshoot, reach, bits


def _charge(
    given: tuple[Any, ...],
    made: tuple[Tensor | None, ...],
    step: Step,
    reset: Any,
    record: bool,
    fires: tuple[Any, bool, Tensor] | None,
) -> None:
    u, current, bits, to = given
    n = len(u)
    if not n:
        return
    with torch.cuda.device_of(u):
        beta, beta_is = _parameter(step.decay.beta)
        theta, theta_is = _parameter(step.theta)
        threshold, threshold_is = _parameter(0.0 if fires is None else fires[0])
        kernels.charge[programs(n)](
            u, current, bits, beta, theta, threshold, to, *made[:-1], _ordered(made[-1]), n, step.scale,
            1 / step.scale, _gain(step), beta_is, theta_is, threshold_is, reset, _digit_bits(step), record,
            fires is not None, fires is not None and fires[1], made[0] is not None, GROUPS,
            enable_fp_fusion=False,
        )  # fmt: skip


def undo(state: Tensor, current: Tensor, bits: Tensor | None, step: Step, record: Tensor) -> Tensor:
    """See :func:`.grid.step.on_numpy.undo`. One launch."""
    reset = _NEXT[step.reset]
    digits, planes = (None, record) if step.reset in (BEFORE, AFTER) else (record, None)
    out = torch.empty_like(state)
    _undo((state, current, bits if step.reset != NONE else None, digits, planes), (out, None), step, reset)
    return out


def undo_charge_and_reset(
    after: Tensor,
    current: Tensor,
    bits: Tensor,
    step: Step,
    to: float | None,
    lost: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """The charged state and the one that :func:`charge_and_reset` started from, in one launch.

    ``lost``: the two records that it returned.
    """
    reset = _at_once(to)
    charged, out = torch.empty_like(after), torch.empty_like(after)
    _undo((after, current, bits, *lost), (out, charged), step, reset)
    return charged, out


def _undo(
    given: tuple[Tensor | None, ...], made: tuple[Tensor, Tensor | None], step: Step, reset: Any
) -> None:
    state, current, bits, digits, planes = given
    n = len(made[0])
    if not n:
        return
    with torch.cuda.device_of(state):
        beta, beta_is = _parameter(step.decay.beta)
        theta, theta_is = _parameter(step.theta)
        kernels.undo[programs(n)](
            state, current, bits, beta, theta, digits, planes, *made, n, step.scale, 1 / step.scale,
            _gain(step), beta_is, theta_is, reset, _digit_bits(step), GROUPS, enable_fp_fusion=False,
        )  # fmt: skip


def reset(
    h: Tensor, spikes: Tensor, theta: Any, to: float | None, scale: float, record: bool, out: Tensor
) -> tuple[list[Tensor], Tensor]:
    """See :func:`.grid.step.on_numpy.reset`. One launch."""
    n, reach = len(h), _new_reach(h.device)
    kind = _at_once(to)
    planes = _planes(h) if record and to is not None else None
    if n:
        with torch.cuda.device_of(h):
            value, where = _parameter(theta)
            kernels.reset[programs(n)](
                h, spikes, value, 0.0 if to is None else to, out, planes, _ordered(reach), n, scale,
                1 / scale, where, kind, record, GROUPS, enable_fp_fusion=False,
            )  # fmt: skip
    return [] if planes is None else [planes], reach


def unreset(v: Tensor, bits: Tensor, theta: Any, to: float | None, scale: float, record: Tensor) -> Tensor:
    """See :func:`.grid.step.on_numpy.unreset`. One launch."""
    n, out = len(v), torch.empty_like(v)
    kind = _at_once(to)
    if n:
        with torch.cuda.device_of(v):
            value, where = _parameter(theta)
            kernels.unreset[programs(n)](
                v, bits, value, record, out, n, 1 / scale, where, kind, GROUPS, enable_fp_fusion=False
            )
    return out


def gate(g: Tensor, factor: Any, bits: Tensor, out: Tensor) -> None:
    """See :func:`.grid.step.reference.gate`. One launch."""
    n = len(g)
    if n:
        with torch.cuda.device_of(g):
            value, where = _parameter(factor)
            gradients.gate[programs(n)](g, value, bits, out, n, where, GROUPS, enable_fp_fusion=False)


def add_past_reset(h: Tensor, threshold: float, g: Tensor, out: Tensor) -> None:
    """See :func:`.grid.step.reference.add_past_reset`. One launch."""
    n = len(h)
    if n:
        with torch.cuda.device_of(h):
            gradients.add_past_reset[programs(n)](h, threshold, g, out, n, SIZE, enable_fp_fusion=False)


def add_through_reset(h: Tensor, threshold: float, to: float | None, g_v: Tensor, g_s: Tensor) -> None:
    """See :func:`.grid.step.reference.add_through_reset`. One launch."""
    n = len(h)
    if n:
        with torch.cuda.device_of(h):
            value = 0.0 if to is None else to
            gradients.add_through_reset[programs(n)](
                h, threshold, value, g_v, g_s, n, to is None, SIZE, enable_fp_fusion=False
            )


class Formula(NamedTuple):
    """A surrogate as kernels take it: which, and its numbers."""

    kind: int
    a: float
    b: float = 0.0
    c: float = 0.0


_FORMULAS: dict[str, Callable[..., Formula]] = {
    "snntorch.atan": lambda alpha: Formula(gradients.ATAN.value, math.pi / 2 * alpha, alpha / 2),
    "snntorch.fast_sigmoid": lambda slope: Formula(gradients.FAST_SIGMOID.value, slope),
    "spikingjelly.ATan": lambda alpha: Formula(gradients.ATAN.value, math.pi / 2 * alpha, alpha / 2),
    "spikingjelly.PiecewiseQuadratic.backward": lambda alpha: Formula(
        gradients.PIECEWISE_QUADRATIC.value, alpha**2, alpha, 1 / alpha
    ),
    "spikingjelly.SoftSign.backward": lambda alpha: Formula(
        gradients.SOFT_SIGN.value, 2 * alpha, 1 / alpha
    ),
    "spikingjelly.SuperSpike.backward": lambda alpha: Formula(gradients.SUPER_SPIKE.value, alpha),
    "snntorch.sigmoid": lambda slope: Formula(gradients.SIGMOID_BY_EXP.value, slope, -slope),
    "spikingjelly.Sigmoid.backward": lambda alpha: Formula(gradients.SIGMOID.value, alpha),
    "spikingjelly.PiecewiseExp": lambda alpha: Formula(gradients.PIECEWISE_EXP.value, -alpha, alpha / 2),
    "spikingjelly.Erf.backward": lambda alpha: Formula(
        gradients.ERF.value, alpha, alpha / math.sqrt(math.pi)
    ),
}


def formula_of(surrogate: Any) -> Formula:
    """That of a surrogate which has one, see :func:`in_one_pass`."""
    return _FORMULAS[surrogate.name](**dict(surrogate.parameters))


def in_one_pass(name: str, parameters: dict[str, float]) -> Callable[..., None] | None:
    """See :func:`.grid.step.on_numba.in_one_pass`. One launch."""
    if name not in _FORMULAS:
        return None
    return functools.partial(_through, _FORMULAS[name](**parameters))


def _through(formula: Formula, h: Tensor, theta: Any, grad: Tensor, out: Tensor) -> None:
    n = len(h)
    if n:
        kind, *numbers = formula
        with torch.cuda.device_of(h):
            value, where = _parameter(theta)
            gradients.surrogate[programs(n)](
                h, value, grad, out, n, *numbers, where, kind, SIZE, enable_fp_fusion=False
            )


def gradient(
    h: Tensor,
    given: tuple[Tensor | None, Tensor | None],
    rule: Any,
    surrogate: Any,
    factors: tuple[Any, float | None],
    made: tuple[Tensor | None, Tensor],
    undo: Undo | None = None,
) -> None:
    """Write the gradients of a step that resets at once, by a surrogate of :func:`in_one_pass`. One launch.

    Args:
        h: the charged membrane; the membrane after the step where that is to be undone with it.
        given: the gradients of the spikes and of the membrane after, not both None: [n], or [1] of all.
        rule: the threshold, the reset and whether that is detached.
        surrogate: its name and parameters.
        factors: the decay, a number or a tensor, and the current's gain.
        made: places for the gradients of the membrane before, if wanted, and of the current.
        undo: how the step is undone, where it isn't yet.
    """
    n = len(h)
    if not n:
        return
    kind_of_h, scale, digit_bits = gradients.CHARGED.value, 1.0, 0
    x = bits = digits = planes = before = None
    if undo is not None:
        step, bits, planes, digits, x, before = undo
        scale, digit_bits = step.scale, _digit_bits(step)
        kind_of_h = (gradients.AFTER if before is None else gradients.TO_BEFORE).value
    (g_s, g_v), (beta, gain), (by_v, by_x) = given, factors, made
    kind, *numbers = formula_of(surrogate)
    strides = (int(g is not None and len(g) == n and n > 1) for g in given)
    with torch.cuda.device_of(h):
        value, where = _parameter(beta)
        gradients.step[programs(n)](
            h, x, bits, digits, planes, before, g_s, g_v, by_v, by_x, n, *strides, rule.v_threshold,
            rule.rest, value, 1.0 if gain is None else gain, scale, 1 / scale, *numbers, where,
            g_s is not None, g_v is not None, by_v is not None, gain is not None, rule.v_reset is None,
            rule.detach_reset, kind, kind_of_h, digit_bits, GROUPS, enable_fp_fusion=False,
        )  # fmt: skip


def _at_once(to: float | None) -> int:
    return (kernels.MINUS_THETA_AT_ONCE if to is None else kernels.VALUE_AT_ONCE).value  # type: ignore


def _parameter(value: Any) -> tuple[Any, int]:
    """A number or a tensor as kernels take it, and where they find it."""
    if not isinstance(value, Tensor):
        return float(value), kernels.NUMBER.value
    where = kernels.ONE if value.numel() == 1 else kernels.EACH
    return value.float(), where.value  # no copy of what is float32


def _digit_bits(step: Step) -> int:
    """How many bits a digit of the step's radix takes."""
    return (step.decay.radix - 1).bit_length()


def _gain(step: Step) -> float:
    return 1.0 if step.gain is None else step.gain


def _bytes_for(n: int, each: int, like: Tensor) -> Tensor:
    return torch.empty((n * each + 7) // 8, dtype=torch.uint8, device=like.device)


def _planes(like: Tensor) -> Tensor:
    return torch.empty(kernels.PLANES.value * len(like), dtype=torch.uint8, device=like.device)


def _room(u: Tensor, step: Step, record: Record | None) -> tuple[Tensor | None, Tensor | None]:
    """Room for the digits of a step, and for what a reset to zero loses with them."""
    if record is None:
        return None, None
    if step.reset in (BEFORE, AFTER):
        return None, _planes(u)
    each = _digit_bits(step)
    return (_bytes_for(len(u), each, u) if each else None), None


# NOTE [A zero for each reach]
#
# A reach is accumulated, so it has to start at 0, and a fill is a launch. So many are filled together, in a
# place of each thread and stream: what follows on a stream finds them filled. While a graph is captured
# each is filled by itself: a replay fills it again, and its place lives as long as the graph.
_local = threading.local()


def _reach_of(record: Record | None, device: torch.device) -> Tensor:
    return _new_reach(device) if record is None or record.reach is None else record.reach


def _new_reach(device: torch.device) -> Tensor:
    """A float32 scalar that is 0, made with one launch in AT_A_TIME calls."""
    if devices.is_capturing():
        return torch.zeros((), device=device)
    filled = _local.__dict__.setdefault("filled", {})
    place = torch.cuda.current_stream(device) if device.type == "cuda" else device
    if not filled.get(place):
        filled[place] = list(torch.zeros(AT_A_TIME, device=device).unbind())
    return filled[place].pop()  # type: ignore[no-any-return]


def _ordered(reach: Tensor | None) -> Tensor:
    assert reach is not None
    return reach.view(torch.int32)
