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

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from snntorch import surrogate
from torch import Tensor

from snn_reversible_plugin.neurons.surrogates import Surrogate, describes


def _atan(grad: Tensor, u: Tensor, alpha: float) -> Tensor:
    u.mul_(math.pi / 2 * alpha).pow_(2).add_(1)
    return u.reciprocal_().mul_(alpha / 2).mul_(grad)


def _fast_sigmoid(grad: Tensor, u: Tensor, slope: float) -> Tensor:
    u.abs_().mul_(slope).add_(1.0).pow_(2)
    # Where layouts differ, the original's result has the gradient's.
    return torch.div(grad, u, out=u) if _alike(grad, u) else grad.clone() / u


def _sigmoid(grad: Tensor, u: Tensor, slope: float) -> Tensor:
    u.mul_(-slope).exp_()
    above = (grad if _alike(grad, u) else grad.clone()) * slope
    return above.to(u.dtype).mul_(u).div_(u.add_(1).pow_(2))


def _straight_through_estimator(grad: Tensor, u: Tensor) -> Tensor:
    return grad.clone()


def _alike(grad: Tensor, u: Tensor) -> bool:
    return grad.stride() == u.stride()


class _Context:
    """What an autograd function's static methods see of their context."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _by_stock(function: Any, *names: str) -> Callable[..., Tensor]:
    def derivative(grad: Tensor, u: Tensor, **parameters: float) -> Tensor:
        context = _Context()
        function.forward(context, u, *(parameters[name] for name in names))
        result = function.backward(context, grad)
        return result[0] if isinstance(result, tuple) else result

    return derivative


class _Known(NamedTuple):
    """One of snnTorch's own: its name there, its derivative, and :attr:`Surrogate.uniform`."""

    name: str
    derivative: Callable[..., Tensor]
    uniform: bool = False


_KNOWN: dict[CodeType, _Known] = {
    surrogate.atan().__code__: _Known("atan", _atan, uniform=True),
    surrogate.fast_sigmoid().__code__: _Known("fast_sigmoid", _fast_sigmoid, uniform=True),
    surrogate.sigmoid().__code__: _Known("sigmoid", _sigmoid),
    surrogate.straight_through_estimator().__code__: _Known(
        "straight_through_estimator", _straight_through_estimator, uniform=True
    ),
    surrogate.triangular().__code__: _Known("triangular", _by_stock(surrogate.Triangular, "threshold")),
    surrogate.heaviside().__code__: _Known("heaviside", _by_stock(surrogate.Heaviside)),
    surrogate.spike_rate_escape().__code__: _Known(
        "spike_rate_escape", _by_stock(surrogate.SpikeRateEscape, "beta", "slope")
    ),
    surrogate.SFS().__code__: _Known("SFS", _by_stock(surrogate.SparseFastSigmoid, "slope", "B")),
}


_CONTENTS = operator.attrgetter("cell_contents")


def known_surrogate(spike_grad: Any) -> Surrogate | None:
    """What is known of a surrogate that fires where ``u > 0``; None if it isn't one of snnTorch's.

    As there, its outputs, and so the gradients that come to it, are float32 in any network.
    """
    code = getattr(spike_grad, "__code__", None)
    if code not in _KNOWN:
        return None
    values = tuple(map(_CONTENTS, spike_grad.__closure__ or ()))
    for value in values:
        if type(value) is not float and type(value) is not int:
            return None
    # The types are part of the key: 25 and 25.0 are equal, but a kernel may round them apart.
    return _trusted(spike_grad.__code__, values, tuple(map(type, values)), _Unkeyed(spike_grad))


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
) -> Surrogate | None:
    name, derivative, uniform = _KNOWN[code]
    parameters = tuple(zip(code.co_freevars, values, strict=True))
    if parameters:
        derivative = functools.partial(derivative, **dict(parameters))
    found = Surrogate(
        derivative, strict=True, uniform=uniform, name=f"snntorch.{name}", parameters=parameters
    )
    return found if describes(found, spike_grad.value, torch.float32) else None


def in_dtype(known: Surrogate, dtype: torch.dtype) -> Surrogate:
    """The same for gradients in a network's own dtype, which snnTorch casts to float32 and back."""
    if dtype is torch.float32:
        return known

    def vjp(grad: Tensor, u: Tensor) -> Tensor:
        return known.vjp(grad.to(torch.float32), u).to(dtype)

    return dataclasses.replace(known, vjp=vjp, name=None, parameters=())
