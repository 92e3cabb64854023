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

from snn_reversible_plugin.neurons.integrate_fire.reference import Rule, Surrogate
from snn_reversible_plugin.ops.forms import SHORT_SEQUENCE, form_of

MOST = 1 << 16  # elements: beyond, arithmetic takes the time, and torch has threads for it
AT_ONCE = 3  # time steps of surrogate gradients: with them, no more buffers than `sweeps` has


def forward(
    x2: Tensor, v: Tensor | float, s2: Tensor, v1: Tensor, rule: Rule, surrogate: Surrogate
) -> bool:
    """Spikes of the currents x2 [T, n] into s2, the final membrane into v1 [n]; whether that was done."""
    kernels = _kernels(x2, rule, surrogate)
    if kernels is None:
        return False
    kernels.forward(x2, _start(v1, v), s2, *_settings(rule))
    return True


def backward(
    x2: Tensor,
    v: Tensor | float,
    g_s: Tensor,
    g_v: Tensor | None,
    v_last: Tensor | None,
    g_x: Tensor,
    rule: Rule,
    surrogate: Surrogate,
) -> bool:
    """The currents' gradient into g_x, which may be x2, and the final membrane into v_last; whether that
    was done."""
    kernels = _kernels(x2, rule, surrogate) if rule.detach_reset and surrogate.uniform else None
    if kernels is None:
        return False
    if g_x.data_ptr() != x2.data_ptr():
        g_x.copy_(x2)
    steps, settings = len(x2), _settings(rule)
    carry = _start(torch.empty_like(x2[0]) if v_last is None else v_last, v)
    kernels.charge(g_x, carry, *settings)
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
        kernels.backward(h, through, carry, g_v is not None or end < steps, *settings)
    return True


def _kernels(x2: Tensor, rule: Rule, surrogate: Surrogate) -> Any:
    small = 0 < x2.numel() <= MOST and x2.device.type == "cpu" and x2.dtype is torch.float32
    threshold = rule.v_threshold  # a difference to a tiny one may be flushed to zero
    known = (
        surrogate.fire is None and math.isfinite(threshold) and (threshold == 0 or abs(threshold) > 1e-30)
    )
    if not small or not known or not x2.is_contiguous() or torch.compiler.is_compiling():
        return None
    return form_of(SHORT_SEQUENCE, x2.device)


def _start(buffer: Tensor, v: Tensor | float) -> Tensor:
    return buffer.copy_(v) if isinstance(v, Tensor) else buffer.fill_(v)


def _settings(rule: Rule) -> tuple[float, float | None, float | None, bool]:
    return rule.v_threshold, rule.v_reset, rule.tau, rule.decay_input
