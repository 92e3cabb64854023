"""Sequences of the integrate-and-fire family on GPUs: one launch there, one back, and nothing kept between.

The one idea: the forward writes no charged membranes, since the backward makes them anew of the currents.
Currents and states are rows of [T, n] views (:func:`.ops.layouts.as_rows`), whatever their strides. The
arithmetic is that of SpikingJelly 2.0's own Triton kernels, bit for bit; of releases which are torch code,
:func:`backward_as_autograd` has theirs. Nothing waits for the device, but once to see how torch divides.
"""

from __future__ import annotations

import functools
from ctypes import c_float
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from snn_reversible_plugin.grid.step.on_triton import formula_of
from snn_reversible_plugin.neurons.integrate_fire import triton_autograd_kernels as as_autograd
from snn_reversible_plugin.neurons.integrate_fire import triton_kernels as kernels
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, Order, Rule, number_pulling

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

    ``spikes`` [T, n]; float32 ``v_last`` [n] or ``v_seq`` [T, n], both in autograd's order only.
    """

    spikes: Tensor | None
    v_last: Tensor | None = None
    v_seq: Tensor | None = None


class Wanted(NamedTuple):
    """What a backward writes: ``x`` [T, n] with dense rows, and float32 [n] of what is not None.

    ``x`` may be the currents themselves, but not where ``q`` is wanted of a neuron that decays its input.
    ``start``: the starting membrane's gradient. ``q``: that of 1 / tau, neuron by neuron. ``v_last``: the
    final membrane. In autograd's order ``start`` may come in two terms, the second one in ``leak``, and
    ``q`` is [T, n], what adds up to the gradient of each step; ``x`` may always be the currents.
    """

    x: Tensor
    start: Tensor | None = None
    q: Tensor | None = None
    v_last: Tensor | None = None
    leak: Tensor | None = None


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
                x, v, _leak(rule, q, x.device), made.spikes, made.v_seq, made.v_last, steps, n, *x.stride(),
                made.spikes.stride(0), 0 if made.v_seq is None else made.v_seq.stride(0), *_fires(rule),
                _leaks(rule, q), q is not None, _multiplies(rule, q, x.device), rule.v_reset is None, each,
                made.v_seq is not None, ROWS, enable_fp_fusion=False,
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
            x, v, _leak(rule, q, x.device), given.spikes, g_v, wanted.x, own, wanted.start, wanted.q,
            wanted.v_last, steps, n, triton.cdiv(n, SIZE), *x.stride(), *_strides(given.spikes),
            *_strides(g_v), wanted.x.stride(0), *_fires(rule), alpha, _leaks(rule, q), q is not None,
            rule.v_reset is None,
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
    return torch.empty(programs * steps, SIZE, dtype=torch.float32, device=g_x.device), programs


def backward_as_autograd(
    x: Tensor, v: Tensor | float, neuron: Neuron, given: Given, wanted: Wanted
) -> None:
    """The gradients of :func:`forward` as autograd records them of torch code. One launch.

    Args:
        x, v: what the forward took.
        neuron: with a surrogate that the grid's kernels have a formula of.
        given: the gradients of what came out.
        wanted: what to write.
    """
    rule, q = neuron.rule, neuron.q
    steps, n = x.shape
    order, g_x = rule.order, wanted.x
    if not n:
        return
    if wanted.q is None:
        own, programs = _places(g_x, steps, n)
        membranes = g_x if own is None else own
    else:
        own, programs, membranes = None, triton.cdiv(n, SIZE), wanted.q
    kind, *numbers = formula_of(neuron.surrogate)
    starts = 0 if wanted.start is None else 1 if wanted.leak is None else 2
    at_reset = as_autograd.TOGETHER if order.reset_together else as_autograd.IN_TURN
    at_reset = as_autograd.VALUE_FIRST if order.v_reset_first else at_reset
    with torch.cuda.device_of(x):
        as_autograd.backward[(programs,)](
            x, v, _leak(rule, q, x.device), given.spikes, given.v_last, given.v_seq, g_x, membranes,
            wanted.start, wanted.leak, wanted.v_last, steps, n, triton.cdiv(n, SIZE), *x.stride(),
            *_strides(given.spikes), _strides(given.v_last)[1], *_strides(given.v_seq), g_x.stride(0),
            membranes.stride(0),
            *_fires(rule), *numbers, _leaks(rule, q), q is not None, _multiplies(rule, q, x.device),
            rule.v_reset is None, rule.detach_reset, at_reset.value,
            order.v_seq_last or order.charge_together, order.selects and steps > 1, kind,
            isinstance(v, Tensor), number_pulling(v, rule) is not None, given.spikes is not None,
            given.v_last is not None, given.v_seq is not None, starts, wanted.q is not None,
            wanted.v_last is not None, own is not None, SIZE, enable_fp_fusion=False,
        )  # fmt: skip


# NOTE [How torch divides by a number]
#
# SpikingJelly 2.0's kernels divide by tau. torch code divides as torch does on the device: on CUDA it
# multiplies by the number's reciprocal, rounded to float32 (BinaryDivTrueKernel.cu), which may be another
# last bit. A neuron in torch's order asks torch once.


@functools.cache
def divides(device: torch.device) -> bool:
    """Whether torch divides by a number there, and doesn't multiply by its reciprocal. Waits once."""
    some = torch.arange(1, 257, device=device, dtype=torch.float32)
    return torch.equal(some / 1.7, some / torch.full_like(some, 1.7))


def _multiplies(rule: Rule, q: Tensor | None, device: torch.device) -> bool:
    return q is not None or not (rule.order == Order() or rule.tau is None or divides(device))


def _leak(rule: Rule, q: Tensor | None, device: torch.device) -> Tensor | float:
    """tau or what stands for it, or a place of 1 / tau."""
    if q is not None or rule.tau is None:
        return 1.0 if q is None else q
    if rule.scales:
        return 1.0 - 1.0 / rule.tau
    return 1.0 / c_float(rule.tau).value if _multiplies(rule, q, device) else rule.tau


def _leaks(rule: Rule, q: Tensor | None) -> int:
    if q is None and rule.tau is None:
        return kernels.NO_LEAK.value  # type: ignore[no-any-return]
    if rule.scales:
        return kernels.KEEP.value  # type: ignore[no-any-return]
    return (kernels.LEAK_AND_INPUT if rule.decay_input else kernels.LEAK).value  # type: ignore[no-any-return]


def _fires(rule: Rule) -> tuple[float, float]:
    return rule.v_threshold, rule.rest


def _strides(g: Tensor | None) -> tuple[int, int]:
    """From a step to the next, and from a neuron to the next."""
    if g is None:
        return 0, 0
    return (g.stride(0), g.stride(1)) if g.dim() == 2 else (0, g.stride(0))
