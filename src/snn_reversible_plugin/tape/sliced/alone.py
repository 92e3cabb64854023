"""Whether a gradient that reached a backward is nobody else's, so that it may be overwritten.

The one idea: everybody who holds a tensor counts in it, in its Python object or in its storage. How high
these counts are where nobody else holds it depends on the way that it came; so for each way that is
tried once, on a gradient of which nobody else can know, and only counts like those will do. Source:
autograd's own ``AccumulateGrad``, which takes a gradient over where its count says so.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from snn_reversible_plugin.ops.autocast import without_autocast
from snn_reversible_plugin.ops.layouts import is_dense
from snn_reversible_plugin.tape.operators import aten

# NOTE [Who else may hold a gradient]
#
# 1. Another node that gets it too, a capture of autograd.grad, a node's post-hook: one more in the tensor's
#    count. Somebody's Python variable: in its object's. A detached copy or a view (cat's backward hands out
#    views of one): in its storage's. What autograd reshaped is a view, whose base is looked at as well.
# 2. The counts are compared for equality. More is somebody else; less is a way that was not tried.
# 3. Counts are of the place where they are read: of an operator's arguments in one dispatch, of a variable
#    in one backward. Trials and what they are for read them there, by the same lines.
# 4. A debugger that looks at variables holds them, so that nothing counts while one traces.
# 5. A gradient that is a part of its storage, or overlaps itself, is never overwritten.


class References(NamedTuple):
    """Counts of a tensor, of its object and of its storage, and the first two of what it is a view of."""

    tensor: int
    object: int
    storage: int
    base: tuple[int, int] | None


def references(tensor: Tensor | None) -> References | None:
    """Who holds a tensor; None for one that may not be overwritten as a whole, or where nobody counts."""
    if tensor is None or not _COUNTS or sys.gettrace() is not None:
        return None
    if type(tensor) is not Tensor or not is_dense(tensor):
        return None
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes:
        return None
    of_storage = torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
    base = tensor._base
    of_base = None if base is None else (base._use_count(), sys.getrefcount(base))  # type: ignore[attr-defined]
    return References(tensor._use_count(), sys.getrefcount(tensor), of_storage, of_base)  # type: ignore[attr-defined]


_COUNTS = hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")
_alone: dict[Any, frozenset[References]] = {}  # by way


class _Noted(threading.local):
    """What a trial on this thread has found; None where none is on."""

    tensors: list[References | None] | None = None


_noted = _Noted()


def is_alone(way: Any, found: References | None) -> bool:
    """Whether counts are those of a gradient that nobody else holds.

    Args:
        way: how the gradient came; see :func:`try_out`.
        found: its counts.
    """
    if _noted.tensors is not None:
        _noted.tensors.append(found)
        return False
    return found is not None and found in _alone.get(way, ())


def try_out(way: Any, trial: Callable[[Tensor], Tensor]) -> None:
    """Learn the counts of a fresh gradient that comes in some way, as it is and reshaped; once.

    Not from inside of a dispatch, where autograd runs otherwise.

    Args:
        way: a name for it.
        trial: something whose backward asks :func:`is_alone`, of an input [2, 2, 2, 2].
    """

    def backward(x: Tensor) -> None:
        for reshape in (Tensor.clone, lambda out: out.flatten(0, 1) * 2):
            reshape(trial(x)).square().sum().backward()

    learn(way, backward)


def learn(way: Any, run: Callable[[Tensor], Any]) -> None:
    """Learn counts from something that asks :func:`is_alone` of tensors that nobody else holds; once.

    Args:
        way: a name for how they come.
        run: takes an input [2, 2, 2, 2] with a gradient.
    """
    if way in _alone or _noted.tensors is not None:  # another trial is on
        return
    noted: list[References | None] = []
    _noted.tensors = noted
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), without_autocast():
            # No random numbers, which would be missing from those of the training.
            run(torch.linspace(0, 1, 16, device="cpu").view(2, 2, 2, 2).requires_grad_())
    finally:
        _noted.tensors = None
    _alone[way] = frozenset(one for one in noted if one is not None)


# -- operators of a backward that get a stand-in -------------------------------------------------------

GRADIENT_AT = {
    aten.convolution_backward.default: 0,
    aten.native_batch_norm_backward.default: 0,
}


def spare_gradient(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The gradient that an operator was given, if it may be overwritten; for ``__torch_dispatch__``."""
    at = GRADIENT_AT.get(func)
    return args[at] if at is not None and is_alone(func, references(args[at])) else None


def try_out_operators() -> None:
    """Learn how gradients come to operators."""
    for func, trial in _TRIALS.items():
        try_out(func, trial)


class _Tried(Tensor):
    """Stands for an input of an operator that is tried."""

    @staticmethod
    def __new__(cls, like: Tensor) -> _Tried:
        return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in GRADIENT_AT:
            return _Tried(args[0])
        spare_gradient(func, args)
        return torch.zeros(args[0].shape, device="cpu"), None, None


def _with_stand_in(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def trial(x: Tensor) -> Tensor:
        def unpacked(kept: Tensor) -> Tensor:
            return _Tried(kept) if kept.dim() == x.dim() else kept

        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, unpacked):
            return run(x)

    return trial


_TRIALS: dict[Any, Callable[[Tensor], Tensor]] = {
    aten.convolution_backward.default: _with_stand_in(
        lambda x: functional.conv2d(x, torch.ones(2, 2, 1, 1, device="cpu"))
    ),
    aten.native_batch_norm_backward.default: _with_stand_in(
        lambda x: functional.batch_norm(x, None, None, training=True)
    ),
}
