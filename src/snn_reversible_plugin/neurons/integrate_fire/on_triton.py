"""Sequences of the integrate-and-fire family on GPUs: one launch there, one back, and nothing kept between.

The one idea: the forward writes no charged membranes, since the backward makes them anew of the currents.
Currents and states are rows of [T, n] views (:func:`.ops.layouts.as_rows`), whatever their strides. The
arithmetic is that of SpikingJelly 2.0's own Triton kernels, bit for bit; nothing waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire import triton_kernels as kernels
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule

ROWS = 64  # groups of eight neurons a program of the forward
SIZE = 256  # neurons a program of the backward
MOST_BYTES = 1 << 25  # of membranes that programs of a backward in half precision keep, as long as
FEWEST, MOST = 128, 2048  # there are so many programs: enough for the device, and few enough for its cache
_SURROGATES = {
    "Sigmoid": kernels.SIGMOID.value,
    "ATan": kernels.ATAN.value,
    "PiecewiseQuadratic": kernels.PIECEWISE_QUADRATIC.value,
    "PiecewiseExp": kernels.PIECEWISE_EXP.value,
    "SoftSign": kernels.SOFT_SIGN.value,
    "SuperSpike": kernels.SUPER_SPIKE.value,
    "Erf": kernels.ERF.value,
}
SURROGATES = frozenset(_SURROGATES)


class Made(NamedTuple):
    """What a forward writes: spikes [T, n] of the currents' dtype, the rest float32.

    Rows are dense. ``v_seq`` [T, n], the membranes after each step: None where nobody wants them.
    """

    spikes: Tensor
    v_last: Tensor
    v_seq: Tensor | None = None


class Given(NamedTuple):
    """The gradients that a backward starts from, with any strides; None: there is none.

    ``spikes`` [T, n]; float32 ``v_last`` [n] or ``v_seq`` [T, n], not both.
    """

    spikes: Tensor | None
    v_last: Tensor | None = None
    v_seq: Tensor | None = None


class Wanted(NamedTuple):
    """What a backward writes: ``x`` [T, n] with dense rows, and float32 [n] of what is not None.

    ``x`` may be the currents themselves, but not where ``q`` is wanted of a neuron that decays its input.
    ``start``: the starting membrane's gradient. ``q``: that of 1 / tau, neuron by neuron. ``v_last``: the
    final membrane.
    """

    x: Tensor
    start: Tensor | None = None
    q: Tensor | None = None
    v_last: Tensor | None = None


def forward(x: Tensor, v: Tensor | float, rule: Rule, q: Tensor | None, made: Made) -> None:
    """Spikes and membranes of currents x [T, n] from the membrane v. One launch.

    Args:
        x: float32, float16 or bfloat16, of any strides.
        v: float32 [n], or one value for all neurons.
        rule: the neuron's settings.
        q: 1 / tau as a float32 scalar, of a neuron that learns it; else None.
        made: what to write.
    """
    steps, n = x.shape
    each = isinstance(v, Tensor)
    if n:
        with torch.cuda.device_of(x):
            kernels.forward[(triton.cdiv(n, 8 * ROWS),)](
                x, v, _leak(rule, q), made.spikes, made.v_seq, made.v_last, steps, n, *x.stride(),
                made.spikes.stride(0), 0 if made.v_seq is None else made.v_seq.stride(0), *_fires(rule),
                _leaks(rule, q), q is not None, rule.v_reset is None, each, made.v_seq is not None,
                ROWS, enable_fp_fusion=False,
            )  # fmt: skip


def backward(
    x: Tensor,
    v: Tensor | float,
    rule: Rule,
    q: Tensor | None,
    surrogate: tuple[str, float],
    given: Given,
    wanted: Wanted,
) -> None:
    """The gradients of :func:`forward`, written into ``wanted``. One launch.

    Args:
        x, v, rule, q: what the forward took.
        surrogate: its name, one of ``SURROGATES``, and its alpha.
        given: the gradients of what came out.
        wanted: what to write; ``wanted.x`` is float32 or of the gradients' dtype.

    Raises:
        ValueError: the currents would be overwritten before they are used for the last time.
    """
    name, alpha = surrogate
    steps, n = x.shape
    if wanted.q is not None and rule.decay_input and torch._C._is_alias_of(x, wanted.x):  # type: ignore[attr-defined]
        raise ValueError("the gradient of q asks for the currents once more: give x a place of its own")
    if not n:
        return
    g_v = given.v_last if given.v_seq is None else given.v_seq
    own, programs = _places(wanted.x, steps, n)
    with torch.cuda.device_of(x):
        kernels.backward[(programs,)](
            x, v, _leak(rule, q), given.spikes, g_v, wanted.x, own, wanted.start, wanted.q, wanted.v_last,
            steps, n, triton.cdiv(n, SIZE), *x.stride(), *_strides(given.spikes), *_strides(g_v),
            wanted.x.stride(0), *_fires(rule), alpha, _leaks(rule, q), q is not None, rule.v_reset is None,
            rule.detach_reset, _SURROGATES[name], isinstance(v, Tensor), given.spikes is not None,
            0 if g_v is None else g_v.dim(), wanted.start is not None, wanted.q is not None,
            wanted.v_last is not None, own is not None, SIZE, enable_fp_fusion=False,
        )  # fmt: skip


def _places(g_x: Tensor, steps: int, n: int) -> tuple[Tensor | None, int]:
    """Where membranes are kept that don't fit the gradient's place, and how many programs there are."""
    blocks = triton.cdiv(n, SIZE)
    if g_x.dtype is torch.float32:
        return None, blocks
    programs = min(blocks, max(FEWEST, min(MOST, MOST_BYTES // (4 * SIZE * steps))))
    return torch.empty(programs * steps * SIZE, dtype=torch.float32, device=g_x.device), programs


def _leak(rule: Rule, q: Tensor | None) -> Tensor | float:
    """tau, or a place of 1 / tau."""
    return q if q is not None else 1.0 if rule.tau is None else rule.tau


def _leaks(rule: Rule, q: Tensor | None) -> int:
    if q is None and rule.tau is None:
        return kernels.NO_LEAK.value  # type: ignore[no-any-return]
    return (kernels.LEAK_AND_INPUT if rule.decay_input else kernels.LEAK).value  # type: ignore[no-any-return]


def _fires(rule: Rule) -> tuple[float, float]:
    return rule.v_threshold, rule.rest


def _strides(g: Tensor | None) -> tuple[int, int]:
    """From a step to the next, and from a neuron to the next."""
    if g is None:
        return 0, 0
    return (g.stride(0), g.stride(1)) if g.dim() == 2 else (0, g.stride(0))
