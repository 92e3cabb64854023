"""What numba compiles of gradients on the grid: through a reset, and through a surrogate, in one pass each.

The one idea: the operations of autograd in autograd's order, an element at a time, so that their bits are
its bits and memory is read once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from snn_reversible_plugin.grid.step.kernels import element_of
from snn_reversible_plugin.ops.compiled import compiled


@compiled
def add_past_reset(h: Any, threshold: Any, g: Any, out: Any) -> None:
    """Add g times 0 where the potentials fire."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(len(h)):
        s = one if h[i] - threshold >= zero else zero
        out[i] = g[i] * (one - s) + out[i]


@compiled
def add_through_reset(h: Any, threshold: Any, to: Any, soft: bool, g_v: Any, g_s: Any) -> None:
    """Add to the spikes' gradients what comes to them through the reset."""
    for i in range(len(h)):
        if soft:
            g_s[i] = g_s[i] + -g_v[i] * threshold
        else:
            g_s[i] = g_s[i] + -(g_v[i] * h[i]) + g_v[i] * to


@compiled
def atan(h: Any, theta: Any, grad: Any, factor: Any, half: Any, out: Any) -> None:
    """The gradient through an arc tangent's slope, in the order of operations of snnTorch's ``ATan``."""
    one = np.float32(1)
    for i in range(len(h)):
        s = (h[i] - element_of(theta, i)) * factor
        out[i] = one / (s * s + one) * half * grad[i]


@compiled
def fast_sigmoid(h: Any, theta: Any, grad: Any, slope: Any, out: Any) -> None:
    """The same of snnTorch's ``FastSigmoid``."""
    for i in range(len(h)):
        s = abs(h[i] - element_of(theta, i)) * slope + np.float32(1)
        out[i] = grad[i] / (s * s)


@compiled
def step(
    h: Any, g_s: Any, g_v: Any, by_v: Any, by_x: Any, threshold: float, to: float, beta: float, gain: float,
    factor: float, half: float, soft: bool, detach: bool,
) -> None:  # fmt: skip
    """The gradients of the membrane before a step, and of its current, from those after it, through an arc
    tangent's slope. ``g_s``, ``g_v`` and ``by_v`` may be None: numba leaves out what asks for them."""
    one, theta, rest = np.float32(1), np.float32(threshold), np.float32(to)
    steep, top, decay, scale = np.float32(factor), np.float32(half), np.float32(beta), np.float32(gain)
    for i in range(len(h)):
        u = h[i] - theta
        s = u * steep
        slope, g = one / (s * s + one) * top, np.float32(0)
        if g_v is not None:
            kept = g_v[i] if soft else g_v[i] * (one - (one if u >= np.float32(0) else np.float32(0)))
            through = -g_v[i] * theta if soft else -(g_v[i] * h[i])
            if g_s is not None:
                through = g_s[i] + through
            if not soft:
                through = through + g_v[i] * rest
            if detach:
                if g_s is not None:
                    g = kept + slope * g_s[i]
                else:
                    g = kept
            else:
                g = kept + slope * through
        if g_v is None and g_s is not None:
            g = slope * g_s[i]
        if by_v is not None:
            by_v[i] = g * decay
        by_x[i] = g * scale
