"""What is known of a neuron's surrogate function, and its derivative in one buffer.

The one idea: a neuron may be worked on in chunks, and its output packed to bits, only where its
surrogate provably works element by element, and provably gives zeros and ones. For SpikingJelly's own
surrogates that is known from their source. A user's is watched once: every aten operation of its
forward and of its backward must be pointwise, and its output the cast of a comparison. What can't be
proved is None here, and the neuron is replayed as a black box.

Source: ``spikingjelly/activation_based/surrogate.py`` and the torch reference of SpikingJelly's
neuron kernels, version 2.0.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from snn_reversible_plugin.modules import tracking
from snn_reversible_plugin.neurons.integrate_fire.reference import Surrogate
from snn_reversible_plugin.ops.autocast import Autocast

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


def fused_alpha(function: Any) -> tuple[str, float] | None:
    """Name and alpha of a surrogate that SpikingJelly has kernels for in float32, else None."""
    if function is None:
        return "Sigmoid", 4.0
    cls = type(function)
    if cls.__module__ != surrogate.__name__ or cls.__name__ not in _DERIVATIVES:
        return None
    alpha = function.alpha
    if not function.spiking or not isinstance(alpha, (int, float)):
        return None
    return cls.__name__, float(alpha)


def derivative(name: str, alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``vjp(grad, u)`` of one of those surrogates, with the rounding of SpikingJelly's reference."""
    formula = _DERIVATIVES[name]

    def vjp(grad: Tensor, u: Tensor) -> Tensor:
        factor = formula(u, alpha)
        # Stock's product is laid out as the gradient is.
        return factor.mul_(grad) if grad.stride() == factor.stride() else grad * factor

    return vjp


def by_autograd(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``vjp(grad, u)`` of any function, as autograd computes it."""
    autocast = Autocast()

    def vjp(grad: Tensor, u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        with torch.enable_grad(), autocast.again():
            s = function(u)
        return torch.autograd.grad(s, u, grad)[0]

    return vjp


def as_autograd(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``vjp(grad, u)`` of one of SpikingJelly's own surrogates, with the bits of :func:`by_autograd`.

    A closed form is taken where one is known, and gives these bits on a sample.
    """
    known = fused_alpha(function)
    vjp = None if known is None else _equal_to_autograd(*known)
    return by_autograd(function) if vjp is None else vjp


@functools.cache
def _equal_to_autograd(name: str, alpha: float) -> Callable[[Tensor, Tensor], Tensor] | None:
    cls = getattr(surrogate, name)

    def by_its_own(grad: Tensor, u: Tensor) -> Tensor:
        return cls.backward(grad, u, alpha)  # type: ignore[no-any-return]

    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is),
    ):
        generator = torch.Generator().manual_seed(0)
        u, grad = torch.randn(2, 4096, generator=generator, device="cpu", dtype=torch.float32)
        expected = by_autograd(cls(alpha=alpha))(grad, u)
        for vjp in (derivative(name, alpha), by_its_own):
            if torch.equal(vjp(grad, u.clone()), expected):
                return vjp
    return None


def proved(
    function: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device, chunk: int
) -> Surrogate | None:
    """The surrogate of a neuron whose steps are tensors of this kind, or None without a proof.

    ``chunk``: how many elements at a time it would be called with.
    """
    if function is None:
        function = surrogate.Sigmoid()
    known = _library(function)
    uniform = known is not None and is_uniform(function)
    if known is None:
        known, uniform = _watched_once(function, shape, dtype, device, chunk)
    if known is None:
        return None
    return Surrogate(None if known == "heaviside" else function, by_autograd(function), uniform)


def is_uniform(function: Any) -> bool:
    """Whether a surrogate of SpikingJelly's own is ``uniform`` in the sense of :class:`Surrogate`."""
    name = "Sigmoid" if function is None else type(function).__name__
    return name in _UNIFORM and function.spiking


def is_heaviside(function: Any) -> bool:
    """Whether one of SpikingJelly's surrogates gives zeros and ones by construction."""
    return function is None or function is surrogate.heaviside or _library(function) == "heaviside"


def is_known(function: Any) -> bool:
    """Whether it is one of SpikingJelly's own, in a state in which it works element by element."""
    return function is None or _library(function) is not None


def _library(function: Any) -> str | None:
    """'heaviside' or 'pointwise' for a surrogate of SpikingJelly's own, None otherwise."""
    cls = type(function)
    if (
        cls.__module__ != surrogate.__name__
        or not isinstance(function, surrogate.SurrogateFunctionBase)
        or cls.__name__ in _RANDOM
        or _is_hooked(function)
        or any(isinstance(value, Tensor) for value in vars(function).values())
    ):
        return None
    return "heaviside" if function.spiking and cls.__name__ not in _NOT_HEAVISIDE else "pointwise"


def _is_hooked(module: torch.nn.Module) -> bool:
    tables = ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
              "_backward_pre_hooks")  # fmt: skip
    values = [value for table in tables for value in (module.__dict__.get(table) or {}).values()]
    # What a report or check mode hangs on every module changes nothing.
    return "forward" in module.__dict__ or any(
        getattr(value, "__module__", "") != tracking.__name__ for value in values
    )


# -- watching a surrogate that a user wrote ----------------------------------------------------------

aten = torch.ops.aten
_ELEMENTWISE = {
    aten.detach.default, aten.alias.default, aten._to_copy.default, aten.clone.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.copy_.default,
    aten.fill_.Scalar, aten.zero_.default, aten.scalar_tensor.default, aten.lift_fresh.default,
    aten.masked_fill_.Scalar, aten.masked_fill.Scalar,
}  # fmt: skip
# Correctly rounded, or not rounding at all.
_ROUNDED = {
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "reciprocal", "sqrt", "square", "ge", "gt",
    "le", "lt", "eq", "ne", "where", "clamp", "clamp_min", "clamp_max", "relu",
    "threshold_backward", "hardtanh", "hardtanh_backward", "sign", "sgn", "minimum", "maximum",
    "floor", "ceil", "round", "trunc", "logical_and", "logical_or", "logical_not", "logical_xor",
    "bitwise_and", "bitwise_or", "bitwise_not", "isnan", "index_put",
}  # fmt: skip
# What these make of zeros and ones is zeros and ones.
_BINARY = {
    aten.detach.default, aten.alias.default, aten._to_copy.default, aten.clone.default,
    aten.view.default, aten._unsafe_view.default, aten.stack.default, aten.cat.default,
    aten.select.int, aten.slice.Tensor, aten.unbind.int, aten.unsqueeze.default, aten.squeeze.dim,
    aten.permute.default, aten.transpose.int, aten.expand.default,
}  # fmt: skip


class Witness(TorchDispatchMode):
    """Watches operations: which tensors hold zeros and ones, and whether all were pointwise on ``u``."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.shape = inputs[0].shape if inputs else None
        self.pointwise = self.uniform = True
        self.trace: list[Any] = []
        # By storage, for autograd hands out what it saved as new tensors; held, so that none is reused.
        self._made = {_storage(tensor): tensor for tensor in inputs}
        self._binary: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def is_binary(self, tensor: Any) -> bool:
        """Whether a tensor that was made under this mode holds zeros and ones by construction."""
        if not isinstance(tensor, Tensor):
            return False
        ref, version = self._binary.get(id(tensor), (None, 0))
        return ref is not None and ref() is tensor and tensor._version == version

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        binary = func in _BINARY and bool(tensors) and all(map(self._zero_or_one, tensors))
        out = func(*args, **kwargs)
        outputs = list(_tensors((out,)))
        if self.shape is not None and self.pointwise:
            self._check(func, args, kwargs, tensors, outputs)
        for tensor in outputs:
            if (binary or tensor.dtype is torch.bool) and not func._schema.is_mutable:
                self._binary[id(tensor)] = weakref.ref(tensor), tensor._version
        return out

    def _zero_or_one(self, tensor: Tensor) -> bool:
        return tensor.dtype is torch.bool or self.is_binary(tensor)

    def _check(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        # A tensor that the surrogate brings along could be per channel, or learn.
        self.pointwise = (
            all(_storage(tensor) in self._made for tensor in tensors)
            and all(tensor.shape in (self.shape, ()) for tensor in (*tensors, *outputs))
            and torch.Tag.nondeterministic_seeded not in func.tags
            and (torch.Tag.pointwise in func.tags or func in _ELEMENTWISE or self._masks(func, args))
        )
        name = func._schema.name.partition("::")[2].rstrip("_")
        self.uniform = self.uniform and (
            func in _ELEMENTWISE
            or (name in _ROUNDED and kwargs.get("alpha", 1) == 1)
            or (name == "pow" and args[1] == 2)
        )
        self._made.update((_storage(tensor), tensor) for tensor in outputs)
        self.trace.append((func, *(_constant(arg) for arg in (*args, *kwargs.items()))))

    def _masks(self, func: Any, args: tuple[Any, ...]) -> bool:
        """``x[mask] = number``, which works element by element."""
        if func is not aten.index_put_.default or args[2].dim() or len(args[1]) != 1:
            return False
        mask = args[1][0]
        return isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == self.shape


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _constant(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dim() == 0
    return tuple(map(_constant, arg)) if isinstance(arg, (tuple, list)) else arg


_Proof = tuple[str | None, bool]
_NO_PROOF: _Proof = (None, False)
_proofs: weakref.WeakKeyDictionary[Any, dict[Any, _Proof]] = weakref.WeakKeyDictionary()


def _watched_once(
    function: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device, chunk: int
) -> _Proof:
    if isinstance(function, torch.nn.Module) and _is_hooked(function):
        return _NO_PROOF
    settings = tuple(
        (name, value)
        for name, value in getattr(function, "__dict__", {}).items()
        if isinstance(value, (bool, int, float, str))
    )
    key = (settings, shape, dtype, device, chunk)
    try:
        proofs = _proofs.setdefault(function, {})
    except TypeError:  # no weak reference to it: it could be another function at the next call
        return _NO_PROOF
    if key not in proofs:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                proofs[key] = _watched(function, (shape, (chunk,)), dtype, device)
            except Exception:  # it does not take these numbers, or not these shapes
                proofs[key] = _NO_PROOF
    return proofs[key]


def _watched(function: Any, shapes: Any, dtype: torch.dtype, device: torch.device) -> _Proof:
    """Watch a surrogate on a step as it is, and on a chunk: the same pointwise operations, or None."""
    traces, binary, uniform = [], True, True
    for shape in shapes:
        u = torch.linspace(-2.0, 2.0, math.prod(shape), device=device).to(dtype)
        u = u.reshape(shape).requires_grad_()
        grad = torch.ones_like(u)
        witness = Witness(u, grad)
        # Autograd may keep what it saves here as it is; no tape should see it.
        hooks = torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is)
        with hooks, torch.enable_grad(), witness:
            s = function(u)
            if not (isinstance(s, Tensor) and s.requires_grad and s.shape == u.shape):
                return _NO_PROOF
            binary = binary and witness.is_binary(s)
            (g,) = torch.autograd.grad(s, u, grad, allow_unused=True)
        changed = u._version or grad._version
        if g is None or s.dtype != u.dtype or changed or not witness.pointwise:
            return _NO_PROOF
        uniform = uniform and witness.uniform
        traces.append(witness.trace)
    if traces[0] != traces[1]:
        return _NO_PROOF
    return "heaviside" if binary else "pointwise", uniform


def as_it_is(tensor: Tensor) -> Tensor:
    """A pack or unpack hook that does nothing, for graphs that are gone at once."""
    return tensor
