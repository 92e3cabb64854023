"""What is known of a neuron's surrogate function, and its derivative in one buffer.

The one idea: a neuron may be worked on in chunks, and its output packed to bits, only where its
surrogate provably works element by element, and provably gives zeros and ones. For SpikingJelly's own
surrogates that is known from their source. A user's is watched once: every aten operation of its
forward and of its backward must be pointwise, and its output the cast of a comparison. What can't be
proved is None here, and the neuron is replayed as a black box.

Source: ``surrogate.py`` of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12, and the torch reference of 2.0's
neuron kernels.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.modules.tracking import is_tracking
from snn_reversible_plugin.neurons.surrogates import Surrogate, Vjp, by_autograd, describes
from snn_reversible_plugin.neurons.witness import Watched, watched
from snn_reversible_plugin.ops.autocast import Autocast
from snn_reversible_plugin.spikingjelly.copies import LOADED, Copy, copy_of

# What a surrogate derivative multiplies the gradient with, in place of u. SpikingJelly runs these in
# float32 for the surrogates named here, and the surrogate's own backward otherwise; the operations are
# the same as there, and in the same order. `a / tensor` is `tensor.reciprocal() * a` in torch.


def _sigmoid(u: Tensor, alpha: float) -> Tensor:
    s = u.mul_(alpha).sigmoid_()
    return torch.rsub(s, 1).mul_(s).mul_(alpha)


def _atan(u: Tensor, alpha: float) -> Tensor:
    u.mul_(math.pi / 2 * alpha)
    return u.mul_(u).add_(1).reciprocal_().mul_(alpha / 2)


def _piecewise_quadratic(u: Tensor, alpha: float) -> Tensor:
    return u.abs_().mul_(alpha * alpha).neg_().add_(alpha).clamp_min_(0)


def _piecewise_exp(u: Tensor, alpha: float) -> Tensor:
    return u.abs_().mul_(-alpha).exp_().mul_(alpha / 2)


def _soft_sign(u: Tensor, alpha: float) -> Tensor:
    z = u.abs_().add_(1 / alpha)
    return (z * (2 * alpha)).mul_(z).reciprocal_()


def _super_spike(u: Tensor, alpha: float) -> Tensor:
    z = u.abs_().add_(1)
    return z.mul_(z).reciprocal_().mul_(alpha)


def _erf(u: Tensor, alpha: float) -> Tensor:
    u.mul_(alpha)
    return u.mul_(u).neg_().exp_().mul_(alpha / math.sqrt(math.pi))


_DERIVATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Sigmoid": _sigmoid,
    "ATan": _atan,
    "PiecewiseQuadratic": _piecewise_quadratic,
    "PiecewiseExp": _piecewise_exp,
    "SoftSign": _soft_sign,
    "SuperSpike": _super_spike,
    "Erf": _erf,
}
# Their gradients, here and in the surrogates themselves, take no more than correctly rounded operations.
_UNIFORM = {
    "ATan", "PiecewiseQuadratic", "SoftSign", "SuperSpike", "NonzeroSignLogAbs", "PiecewiseLeakyReLU",
    "LeakyKReLU", "FakeNumericalGradient", "LogTailedReLU", "DeterministicPass", "MultiLevelSpikeCount",
    "Rect",
}  # fmt: skip
_NOT_HEAVISIDE = ("MultiLevelSpikeCount",)
_RANDOM = ("PoissonPass",)


def fused(function: Any) -> Surrogate | None:
    """A surrogate that SpikingJelly has kernels for in float32, with their rounding; None for others."""
    known = _alpha(function)
    return None if known is None else _closed_form(type(function).__name__, known)


def _alpha(function: Any) -> float | None:
    """The slope of one of SpikingJelly's that there is a closed form of; None for any other."""
    cls = type(function)
    if _copy_with(cls) is None or cls.__name__ not in _DERIVATIVES:
        return None
    alpha = function.alpha
    if not function.spiking or not isinstance(alpha, (int, float)):
        return None
    return float(alpha)


def _copy_with(cls: type) -> Copy | None:
    """The copy of SpikingJelly that a surrogate's class is defined in."""
    copy = copy_of(cls)
    return copy if copy is not None and cls.__module__ == copy.surrogate.__name__ else None


@functools.lru_cache(maxsize=256)
def _closed_form(name: str, alpha: float) -> Surrogate:
    formula = _DERIVATIVES[name]

    def vjp(grad: Tensor, u: Tensor) -> Tensor:
        factor = formula(u, alpha)
        # Stock's product is laid out as the gradient is.
        return factor.mul_(grad) if grad.stride() == factor.stride() else grad * factor

    return _named(f"spikingjelly.{name}", vjp, name, alpha)


@functools.lru_cache(maxsize=256)
def _own_backward(cls: Any, alpha: float) -> Surrogate:
    """The order of operations of the surrogate's own class, which is not that of the kernels."""
    backward, name = getattr(cls, "backward", None), cls.__name__

    def vjp(grad: Tensor, u: Tensor) -> Tensor:
        return backward(grad, u, alpha)  # type: ignore[no-any-return, misc]

    # In 0.0.0.0.12 only autograd can call it.
    own = by_autograd(cls(alpha=alpha)) if backward is None else vjp
    return _named(f"spikingjelly.{name}.backward", own, name, alpha)


def _named(full_name: str, vjp: Vjp, name: str, alpha: float) -> Surrogate:
    return Surrogate(vjp, uniform=name in _UNIFORM, name=full_name, parameters=(("alpha", alpha),))


def surrogate_of(module: Any) -> Any:
    """The surrogate function of a neuron; 2.0 may be told to take its default."""
    if module.surrogate_function is not None:
        return module.surrogate_function
    copy = copy_of(type(module))
    assert copy is not None
    return copy.default_surrogate


def as_autograd(function: Any, dtype: torch.dtype = torch.float32) -> Surrogate:
    """One of SpikingJelly's own spiking surrogates, with the gradient that autograd gives, to the bit.

    A closed form is taken where one is known, and gives these bits on a sample.
    """
    known = _alpha(function)
    cls: Any = type(function)
    found = None if known is None else _equal_to_autograd(cls, known, dtype)
    return found or Surrogate(by_autograd(function), uniform=is_uniform(function))


@functools.lru_cache(maxsize=256)
def _equal_to_autograd(cls: Any, alpha: float, dtype: torch.dtype) -> Surrogate | None:
    candidates = [_closed_form(cls.__name__, alpha)]
    if hasattr(cls, "backward") or dtype is torch.float32:  # others are not the same in every autocast
        candidates.append(_own_backward(cls, alpha))
    function = cls(alpha=alpha)
    return next((one for one in candidates if describes(one, function, dtype)), None)


def proved(
    function: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device, chunk: int
) -> Surrogate | None:
    """The surrogate of a neuron whose steps are tensors of this kind, or None without a proof.

    ``chunk``: how many elements at a time it would be called with.
    """
    known = _library(function)
    if known is not None:
        fire = None if known == "heaviside" else function
        return Surrogate(by_autograd(function), fire, uniform=is_uniform(function))
    pointwise, binary, uniform = _watched_once(function, shape, dtype, device, chunk)
    if not pointwise:
        return None
    # It may fire above the threshold, or from it on: only the function knows.
    return Surrogate(by_autograd(function), function, binary=binary, uniform=uniform)


def is_uniform(function: Any) -> bool:
    """Whether one of SpikingJelly's own is ``uniform`` in the sense of :class:`Surrogate`."""
    name = "Sigmoid" if function is None else type(function).__name__
    return name in _UNIFORM and function.spiking


def is_heaviside(function: Any) -> bool:
    """Whether one of SpikingJelly's surrogates gives zeros and ones by construction."""
    steps = (copy.surrogate.heaviside for copy in LOADED)
    return function is None or any(function is step for step in steps) or _library(function) == "heaviside"


def is_known(function: Any) -> bool:
    """Whether it is one of SpikingJelly's own, in a state in which it works element by element."""
    return function is None or _library(function) is not None


def _library(function: Any) -> str | None:
    """'heaviside' or 'pointwise' for a surrogate of SpikingJelly's own, None otherwise."""
    cls = type(function)
    copy = _copy_with(cls)
    if copy is None or not issubclass(cls, _bases(copy)) or cls.__name__ in _RANDOM or _is_hooked(function):
        return None
    for value in vars(function).values():  # asked in each step: without a generator's calls
        if isinstance(value, Tensor):
            return None
    return "heaviside" if function.spiking and cls.__name__ not in _NOT_HEAVISIDE else "pointwise"


def _bases(copy: Copy) -> tuple[type, ...]:
    names = ("SurrogateFunctionBase", "MultiArgsSurrogateFunctionBase")
    return tuple(getattr(copy.surrogate, name) for name in names if hasattr(copy.surrogate, name))


def hooks_of(module: torch.nn.Module) -> list[dict[Any, Any]]:
    """The tables of what may hang on a surrogate: empty, it is as it is defined."""
    tables = ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
              "_backward_pre_hooks")  # fmt: skip
    return [hung for table in tables if (hung := module.__dict__.get(table)) is not None]


def _is_hooked(module: torch.nn.Module) -> bool:
    for hung in hooks_of(module):
        # What a report or check mode hangs on every module changes nothing.
        if hung and not all(map(is_tracking, hung.values())):
            return True
    return "forward" in module.__dict__


# -- watching a surrogate that a user wrote ----------------------------------------------------------

_NO_PROOF: Watched = (False, False, False)
_proofs: weakref.WeakKeyDictionary[Any, dict[Any, Watched]] = weakref.WeakKeyDictionary()


def _watched_once(
    function: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device, chunk: int
) -> Watched:
    if isinstance(function, torch.nn.Module) and _is_hooked(function):
        return _NO_PROOF
    settings = tuple(
        (name, value)
        for name, value in getattr(function, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str))
    )
    autocast = Autocast()  # it may change what an operation computes in
    key = (settings, shape, dtype, device, chunk, *autocast.dtypes.items())
    try:
        proofs = _proofs.setdefault(function, {})
    except TypeError:  # no weak reference to it: it could be another function at the next call
        return _NO_PROOF

    def call(u: Tensor) -> Tensor:
        with autocast.again():
            return function(u)  # type: ignore[no-any-return]

    if key not in proofs:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                proofs[key] = watched(call, (shape, (chunk,)), dtype, device)
            except Exception:  # it does not take these numbers, or not these shapes
                proofs[key] = _NO_PROOF
    return proofs[key]
