"""Short sequences of few neurons, in one compiled call there and two back.

The one idea: a small layer's step is a dozen operations of which each takes longer to call than to compute.
Which sequences are small enough, and known well enough, is decided here; all others, and all without
numba, are swept by :mod:`.neurons.integrate_fire.in_place`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, OutputGradients
from snn_reversible_plugin.ops.forms import SHORT_SEQUENCE, form_of

MOST = 1 << 16  # elements: beyond, arithmetic takes the time, and torch has threads for it
AT_ONCE = 3  # time steps of surrogate gradients: with them, no more buffers than `sweeps` has


def forward(x2: Tensor, v: Tensor | float, s2: Tensor, v1: Tensor, neuron: Neuron) -> bool:
    """Spikes of the currents x2 [T, n] into s2, the final membrane into v1 [n]; whether that was done."""
    kernels = _kernels(x2, neuron)
    if kernels is None:
        return False
    kernels.forward(x2, _start(v1, v), s2, neuron.rule)
    return True


def backward(
    x2: Tensor,
    v: Tensor | float,
    grads: OutputGradients,
    g_x: Tensor,
    v_last: Tensor | None,
    neuron: Neuron,
) -> bool:
    """The currents' gradient into g_x, which may be x2, and the final membrane into v_last; whether that
    was done. Gradients of all membranes are not covered."""
    rule, surrogate, (g_s, g_v, g_v_seq) = neuron.rule, neuron.surrogate, grads
    if g_s is None or g_v_seq is not None or not rule.detach_reset or not surrogate.uniform:
        return False
    kernels = _kernels(x2, neuron)
    if kernels is None:
        return False
    if g_x.data_ptr() != x2.data_ptr():
        g_x.copy_(x2)
    steps = len(x2)
    carry = _start(torch.empty_like(x2[0]) if v_last is None else v_last, v)
    kernels.charge(g_x, carry, rule)
    if v_last is not None:
        carry = torch.empty_like(v_last)
    if g_v is not None:
        carry.copy_(g_v)
    room = torch.empty_like(x2[:AT_ONCE])
    for end in range(steps, 0, -AT_ONCE):
        part = slice(max(end - AT_ONCE, 0), end)
        h = g_x[part]
        u = torch.sub(h, rule.v_threshold, out=room[: len(h)])
        through = surrogate.vjp(g_s[part], u).contiguous()
        kernels.backward(h, through, carry, g_v is not None or end < steps, rule)
    return True


def _kernels(x2: Tensor, neuron: Neuron) -> Any:
    surrogate, threshold = neuron.surrogate, neuron.rule.v_threshold
    small = 0 < x2.numel() <= MOST and x2.device.type == "cpu" and x2.dtype is torch.float32
    # A difference to a tiny threshold may be flushed to zero.
    exact = math.isfinite(threshold) and (threshold == 0 or abs(threshold) > 1e-30)
    known = neuron.q is None and surrogate.fire is None and not surrogate.strict and exact
    # Which terms are added first shows where v_seq or the reset has a gradient, which is left to torch.
    known = known and not neuron.rule.scales and not (neuron.rule.order.selects and len(x2) > 1)
    if not small or not known or not x2.is_contiguous() or torch.compiler.is_compiling():
        return None
    return form_of(SHORT_SEQUENCE, x2.device)


def _start(buffer: Tensor, v: Tensor | float) -> Tensor:
    return buffer.copy_(v) if isinstance(v, Tensor) else buffer.fill_(v)
