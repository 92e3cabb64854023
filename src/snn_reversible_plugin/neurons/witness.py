"""What is proved of functions that somebody else wrote: by a sample, and by watching each operation.

The one idea: another version of a framework may compute something else, and a user's surrogate may do
anything. So nothing is taken on trust: a formula of ours is used where it gave the bits of theirs once
(:func:`agree`), and a surrogate of the user's counts as element-wise where every operation of it was
(:class:`Witness`). Neither may be noticed by what the user does around it (:func:`alone`).

Source: the operators of PyTorch's ``aten/src/ATen/native/native_functions.yaml``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
    _pop_mode,
    _push_mode,
)

from snn_reversible_plugin.ops.interrupts import surely
from snn_reversible_plugin.tape.surroundings import OwnMode

# NOTE [What a test of ours must not show]
#
# 1. The first call of a neuron may stand anywhere: in a user's checkpoint, which counts what is saved;
#    under hooks that move saved tensors elsewhere; under a mode that counts or fakes operations; in
#    inference mode or autocast. A test run there would be counted, moved, and computed otherwise.
# 2. What is a thread's own is put aside in `alone`: hooks, modes of both kinds (a default device is one),
#    autocast, grad and inference mode.
# 3. What is the process's own can't be, for other threads would see it. So a sample names its dtype and its
#    device, and is computed, not drawn.


@contextmanager
def alone() -> Iterator[None]:
    """Inside, autograd runs as in a fresh process: nothing that the user has on sees it, or changes it."""
    modes = _get_current_dispatch_mode_stack()
    try:
        _set_modes([])
        with ExitStack() as stack:
            stack.enter_context(torch._C.DisableTorchFunction())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
                stack.enter_context(saved_tensors_hooks(_as_it_is, _as_it_is))
            yield
    finally:
        surely(partial(_set_modes, modes))


def _set_modes(modes: list[Any]) -> None:
    while _len_torch_dispatch_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def agree(ours: Callable[[], Sequence[Tensor]], theirs: Callable[[], Sequence[Tensor]]) -> bool:
    """Whether two computations give the same tensors, bit for bit, where nobody sees them.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.neurons.witness import agree
        >>> agree(lambda: [torch.zeros(3)], lambda: [torch.full((3,), -0.0)])
        False
    """
    with alone():
        pairs = zip(ours(), theirs(), strict=True)
        return all(same_bits(a.detach(), b.detach()) for a, b in pairs)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: the sign of a zero counts, that of a NaN doesn't."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    words, none = _WORDS[a.element_size()], a.isnan()
    bits = [z.masked_fill(none, 0).contiguous().view(words) for z in (a, b)]
    return torch.equal(none, b.isnan()) and torch.equal(*bits)


# NOTE [The same proof on every version of torch]
#
# What counts as element-wise is written down here, by name, and not read from the tags of the installed
# torch: versions tag differently, and take different operators for one line of Python. An operator that
# reduces under one of its overloads (`max`, `equal`) is not in the lists. `lift_fresh` is where a number
# that Python wrote becomes a tensor; some versions show it to a mode, and some don't.

# Correctly rounded, or not rounding at all.
_ROUNDED = {
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "reciprocal", "sqrt", "square", "ge", "gt", "le",
    "lt", "eq", "ne", "where", "clamp", "clamp_min", "clamp_max", "relu", "threshold",
    "threshold_backward", "hardtanh", "hardtanh_backward", "sign", "sgn", "signbit", "minimum", "maximum",
    "fmin", "fmax", "floor", "ceil", "round", "trunc", "logical_and", "logical_or", "logical_not",
    "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "isnan", "isinf",
    "isfinite", "positive", "copysign", "nan_to_num", "hardshrink", "heaviside",
}  # fmt: skip
# Copies, casts and constants.
_COPYING = {
    "detach", "alias", "_to_copy", "clone", "zeros_like", "ones_like", "full_like", "copy", "fill",
    "zero", "scalar_tensor", "lift_fresh", "masked_fill",
}  # fmt: skip
# Element-wise too, but a result's last bit may depend on where its element lies.
_OTHER_POINTWISE = {
    "acos", "acosh", "addcdiv", "addcmul", "asin", "asinh", "atan", "atan2", "atanh", "celu", "cos",
    "cosh", "digamma", "elu", "elu_backward", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "fmod",
    "frac", "gelu", "gelu_backward", "hardshrink_backward", "hardsigmoid", "hardsigmoid_backward",
    "hardswish", "hardswish_backward", "hypot", "i0", "leaky_relu", "leaky_relu_backward", "lerp",
    "lgamma", "log", "log10", "log1p", "log2", "logaddexp", "logit", "logit_backward", "mish",
    "mish_backward", "pow", "remainder", "rsqrt", "selu", "sigmoid", "sigmoid_backward", "silu",
    "silu_backward", "sin", "sinc", "sinh", "softplus", "softplus_backward", "softshrink",
    "softshrink_backward", "tan", "tanh", "tanh_backward", "xlogy",
}  # fmt: skip
_POINTWISE = _ROUNDED | _COPYING | _OTHER_POINTWISE
# What these make of zeros and ones is zeros and ones.
MOVING = {
    "detach", "alias", "_to_copy", "clone", "view", "_unsafe_view", "stack", "cat", "select", "slice",
    "unbind", "unsqueeze", "squeeze", "permute", "transpose", "t", "expand",
}  # fmt: skip


class Witness(OwnMode, TorchDispatchMode):
    """Watches operations: which tensors hold zeros and ones, and whether all were pointwise on ``inputs``.

    ``trace`` is what was run, to be compared with another run.
    """

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
        name = func._schema.name.partition("::")[2].rstrip("_")
        tensors = list(_tensors((*args, *kwargs.values())))
        binary = name in MOVING and bool(tensors) and all(map(self._zero_or_one, tensors))
        out = func(*args, **kwargs)
        outputs = list(_tensors((out,)))
        if self.shape is not None and self.pointwise:
            known = [_is_number(name, tensor) or _storage(tensor) in self._made for tensor in tensors]
            self.pointwise = (
                # A tensor that the surrogate brings along could be per channel, or learn.
                all(known)
                and all(tensor.shape in (self.shape, ()) for tensor in (*tensors, *outputs))
                and (name in _POINTWISE or self._masks(name, args))
            )
            self.uniform = self.uniform and is_uniform(name, args, kwargs)
            self._made.update((_storage(tensor), tensor) for tensor in outputs)
            number = [tensor.item() for tensor in tensors if _is_number(name, tensor)]
            self.trace.append((func, *number, *(_constant(arg) for arg in (*args, *kwargs.items()))))
        for tensor in outputs:
            if (binary or tensor.dtype is torch.bool) and not func._schema.is_mutable:
                self._binary[id(tensor)] = weakref.ref(tensor), tensor._version
        return out

    def _zero_or_one(self, tensor: Tensor) -> bool:
        return tensor.dtype is torch.bool or self.is_binary(tensor)

    def _masks(self, name: str, args: tuple[Any, ...]) -> bool:
        """``x[mask] = number``, which works element by element."""
        if name != "index_put" or args[2].dim() or len(args[1]) != 1:
            return False
        mask = args[1][0]
        return isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == self.shape


def element_wise(name: str) -> bool:
    """Whether the operator of this name, without a trailing underscore, works element by element."""
    return name in _POINTWISE


def is_uniform(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the bits of its elements don't depend on where they lie."""
    if name in _ROUNDED:
        return kwargs.get("alpha", 1) == 1
    return name in _COPYING or name == "index_put" or (name == "pow" and args[1] == 2)


def _is_number(name: str, tensor: Tensor) -> bool:
    """Whether it was a number in Python just now."""
    return name == "lift_fresh" and not tensor.dim()


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


Watched = tuple[bool, bool, bool]
"""Of a function: element by element, gives zeros and ones, ``uniform``."""


def watched(
    function: Callable[[Tensor], Tensor],
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Watched:
    """What every operation of a function and of its backward shows, called with tensors of these shapes.

    Nothing is proved of one that runs other operations for one shape than for another.
    """
    with alone():
        seen = [_watched(function, shape, dtype, device) for shape in shapes]
    traces = [trace for _, _, trace in seen]
    if None in traces or any(trace != traces[0] for trace in traces):
        return False, False, False
    return True, all(binary for binary, _, _ in seen), all(uniform for _, uniform, _ in seen)


def _watched(
    function: Callable[[Tensor], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[bool, bool, list[Any] | None]:
    """Whether it gives zeros and ones, is uniform, and what it ran; None if not element by element."""
    u = torch.linspace(-2, 2, torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    u = u.to(device, dtype).reshape(shape).requires_grad_()
    grad = torch.ones_like(u)
    g = None
    with Witness(u, grad) as witness:
        s = function(u)
        if isinstance(s, Tensor) and s.requires_grad and s.shape == u.shape:
            binary = witness.is_binary(s)
            (g,) = torch.autograd.grad(s, u, grad, allow_unused=True)
    untouched = not u._version and not grad._version
    if g is None or s.dtype != u.dtype or not untouched or not witness.pointwise:
        return False, False, None
    return binary, witness.uniform, witness.trace
