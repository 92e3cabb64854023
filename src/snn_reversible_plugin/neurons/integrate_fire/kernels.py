"""What numba compiles of a neuron over a short sequence, there and back: every step in one call.

The one idea: of few neurons over few steps, calling an operation takes longer than its arithmetic. The
arithmetic is that of :mod:`.neurons.integrate_fire.in_place`, which is the specification.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from snn_reversible_plugin.neurons.integrate_fire.reference import Rule
from snn_reversible_plugin.ops.compiled import compiled

# NOTE [The same bits]
#
# 1. A product with a spike, or with one minus a spike, is exact, so it doesn't matter whether a product and
#    a sum are fused. There are no other products here: what a surrogate multiplies is left to torch.
# 2. Single precision all through: a literal would promote, so numbers come as float32.
NO_LEAK, LEAK, LEAK_AND_INPUT = range(3)  # what is divided by tau: nothing, the membrane, the input as well


@compiled
def _charge(h: Any, v: Any, rest: Any, tau: Any, leak: int) -> None:
    """From the current to the charged membrane, in place."""
    if leak == NO_LEAK:
        for i in range(len(h)):
            h[i] = v[i] + h[i]
    elif leak == LEAK:
        for i in range(len(h)):
            h[i] = (v[i] - (v[i] - rest) / tau) + h[i]
    else:
        for i in range(len(h)):
            h[i] = (h[i] - (v[i] - rest)) / tau + v[i]


@compiled
def _reset(h: Any, threshold: Any, soft: bool, to: Any, v: Any) -> None:
    """From the charged membrane to the one after the step."""
    zero, one = np.float32(0), np.float32(1)
    if soft:
        for i in range(len(h)):
            s = one if h[i] >= threshold else zero
            v[i] = h[i] - s * threshold
    else:
        for i in range(len(h)):
            s = one if h[i] >= threshold else zero
            v[i] = s * to + (one - s) * h[i]


@compiled
def _forward(
    x: Any, v: Any, threshold: Any, soft: bool, to: Any, tau: Any, leak: int, h: Any, s: Any
) -> None:
    """Spikes into s [T, n]; v [n] becomes the final membrane; h [n] is room to work in."""
    zero, one = np.float32(0), np.float32(1)
    for t in range(len(x)):
        h[:] = x[t]
        _charge(h, v, to, tau, leak)
        fired = s[t]
        for i in range(len(h)):
            fired[i] = one if h[i] >= threshold else zero
        _reset(h, threshold, soft, to, v)


@compiled
def _again(h: Any, v: Any, threshold: Any, soft: bool, to: Any, tau: Any, leak: int) -> None:
    """h [T, n] holds currents and gets charged membranes; v [n] becomes the final membrane."""
    for t in range(len(h)):
        _charge(h[t], v, to, tau, leak)
        _reset(h[t], threshold, soft, to, v)


@compiled
def _back(
    h: Any, through: Any, carry: Any, carries: bool, threshold: Any, soft: bool, tau: Any, leak: int
) -> None:
    """h [T, n] holds charged membranes and gets the currents' gradients, carry [n] holds the final
    membrane's, if it has one: see :func:`backward`."""
    zero, one = np.float32(0), np.float32(1)
    for t in range(len(h) - 1, -1, -1):
        now, spike = h[t], through[t]
        if not carries:
            for i in range(len(now)):
                carry[i] = spike[i]
        elif soft:
            for i in range(len(now)):
                carry[i] = carry[i] + spike[i]
        else:
            for i in range(len(now)):
                s = one if now[i] - threshold >= zero else zero
                carry[i] = spike[i] + (one - s) * carry[i]
        carries = True
        if leak == NO_LEAK:
            now[:] = carry
        elif leak == LEAK:
            for i in range(len(now)):
                now[i] = carry[i]
                carry[i] = carry[i] - carry[i] / tau
        else:
            for i in range(len(now)):
                now[i] = carry[i] / tau
                carry[i] = carry[i] - now[i]


def forward(x: torch.Tensor, v: torch.Tensor, s: torch.Tensor, rule: Rule) -> None:
    """Spikes of the currents x [T, n] into s; v [n], the membrane before, becomes the one after."""
    _forward(_array(x), _array(v), *_numbers(rule), _array(torch.empty_like(v)), _array(s))


def charge(x: torch.Tensor, v: torch.Tensor, rule: Rule) -> None:
    """The same, but x becomes the charged membranes."""
    _again(_array(x), _array(v), *_numbers(rule))


def backward(
    h: torch.Tensor, through: torch.Tensor, carry: torch.Tensor, carries: bool, rule: Rule
) -> None:
    """Charged membranes h become gradients of the currents. The reset is detached.

    ``through`` is the spikes' gradient times the surrogate's. ``carry`` holds the gradient of the membrane
    after these steps if it ``carries`` one, and gets that of the membrane before.
    """
    threshold, soft, _, tau, leak = _numbers(rule)
    _back(_array(h), _array(through), _array(carry), carries, threshold, soft, tau, leak)


def _numbers(rule: Rule) -> tuple[Any, ...]:
    leak = NO_LEAK if rule.tau is None else LEAK_AND_INPUT if rule.decay_input else LEAK
    tau = np.float32(1 if rule.tau is None else rule.tau)
    return np.float32(rule.v_threshold), rule.v_reset is None, np.float32(rule.rest), tau, leak


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().numpy()
