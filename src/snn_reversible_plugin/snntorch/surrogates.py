"""The derivatives of snnTorch's surrogates, in one buffer instead of eight.

The one idea: a surrogate of snnTorch is a closure over an autograd function. A closure whose code is
that of one of snnTorch's own factories has a known derivative, which is computed here in place, in the
order of operations of the original, and so with its rounding. Before a derivative is trusted it is
compared, once for each set of parameters, with what autograd gets from the closure itself: another
version of snnTorch may compute something else. Closures that a user wrote, random ones, and ones that
fail the comparison are unknown here: their neurons run stock's own step.

Source: the ``backward`` methods in ``snntorch/surrogate.py``, version 1.0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from snntorch import surrogate
from torch import Tensor

from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.leaky.call import Derivative


def _atan(shift: Tensor, grad: Tensor, alpha: float) -> Tensor:
    shift.mul_(math.pi / 2 * alpha).pow_(2).add_(1)
    return shift.reciprocal_().mul_(alpha / 2).mul_(grad)


def _fast_sigmoid(shift: Tensor, grad: Tensor, slope: float) -> Tensor:
    shift.abs_().mul_(slope).add_(1.0).pow_(2)
    # Where layouts differ, the original's result has the gradient's.
    return torch.div(grad, shift, out=shift) if _alike(grad, shift) else grad.clone() / shift


def _sigmoid(shift: Tensor, grad: Tensor, slope: float) -> Tensor:
    shift.mul_(-slope).exp_()
    above = (grad if _alike(grad, shift) else grad.clone()) * slope
    return above.to(shift.dtype).mul_(shift).div_(shift.add_(1).pow_(2))


def _straight_through_estimator(shift: Tensor, grad: Tensor) -> Tensor:
    return grad.clone()


def _alike(grad: Tensor, shift: Tensor) -> bool:
    return grad.stride() == shift.stride()


class _Context:
    """What an autograd function's static methods see of their context."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _by_stock(function: Any, *names: str) -> Callable[..., Tensor]:
    def derivative(shift: Tensor, grad: Tensor, **parameters: float) -> Tensor:
        context = _Context()
        function.forward(context, shift, *(parameters[name] for name in names))
        result = function.backward(context, grad)
        return result[0] if isinstance(result, tuple) else result

    return derivative


_KNOWN: dict[CodeType, Callable[..., Tensor]] = {
    surrogate.atan().__code__: _atan,
    surrogate.fast_sigmoid().__code__: _fast_sigmoid,
    surrogate.sigmoid().__code__: _sigmoid,
    surrogate.straight_through_estimator().__code__: _straight_through_estimator,
    surrogate.triangular().__code__: _by_stock(surrogate.Triangular, "threshold"),
    surrogate.heaviside().__code__: _by_stock(surrogate.Heaviside),
    surrogate.spike_rate_escape().__code__: _by_stock(surrogate.SpikeRateEscape, "beta", "slope"),
    surrogate.SFS().__code__: _by_stock(surrogate.SparseFastSigmoid, "slope", "B"),
}


def derivative_of(spike_grad: Any) -> Derivative | None:
    """The derivative of a surrogate that fires where ``shift > 0``; None if it isn't a known one."""
    code = getattr(spike_grad, "__code__", None)
    if code not in _KNOWN:
        return None
    values = tuple(cell.cell_contents for cell in spike_grad.__closure__ or ())
    for value in values:
        if type(value) is not float and type(value) is not int:
            return None
    # The types are part of the key: 25 and 25.0 are equal, but a kernel may round them apart.
    return _trusted(spike_grad.__code__, values, tuple(map(type, values)), _Unkeyed(spike_grad))


@functools.cache
def in_one_pass(derivative: Derivative) -> Callable[..., None] | None:
    """``write(mem, threshold, grad, out)`` for a derivative, flat and float32 on the CPU, to the same bits.

    None where nothing is compiled for it.
    """
    if not isinstance(derivative, functools.partial):
        return None
    form = steps_on(torch.device("cpu"))
    compiled = {_atan: "atan", _fast_sigmoid: "fast_sigmoid"}.get(derivative.func)
    write = getattr(form, compiled, None) if compiled is not None else None
    if write is None:
        return None
    write = functools.partial(write, **derivative.keywords)
    mem, grad = torch.linspace(-3, 4, 1001), torch.linspace(-1, 2, 1001).sin_()
    out = torch.empty_like(mem)
    write(mem, 0.7, grad, out)
    same = torch.equal(out, derivative(mem - 0.7, grad))
    return write if same else None


class _Unkeyed:
    """Carries an argument past a cache's key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unkeyed)

    def __hash__(self) -> int:
        return 0


@functools.lru_cache(maxsize=256)
def _trusted(
    code: CodeType, values: tuple[float, ...], types: tuple[type, ...], spike_grad: _Unkeyed
) -> Derivative | None:
    derivative = _KNOWN[code]
    if values:
        derivative = functools.partial(derivative, **dict(zip(code.co_freevars, values, strict=True)))
    with torch.inference_mode(False), torch.enable_grad():
        shift = torch.linspace(-3, 3, 101, dtype=torch.float32, device="cpu").requires_grad_()
        grad = torch.linspace(-1, 2, 101, dtype=torch.float32, device="cpu").sin_()
        spikes = spike_grad.value(shift)
        (expected,) = torch.autograd.grad(spikes, shift, grad)
    with torch.no_grad():
        same = torch.equal(derivative(shift.detach().clone(), grad), expected)
        return derivative if same and torch.equal(spikes, (shift > 0).float()) else None
