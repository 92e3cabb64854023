"""The gradients of membranes that no loss reads: one tensor of zeros for all of them.

The one idea: a region's backward is handed a gradient for each of its outputs, and autograd makes zeros
where nobody has one: as much as all the membranes, at the beginning of the backward, where its peak may be.
It only reads them, so they may all lie in the same memory, which an identity behind the region hands it.
Source:
``set_materialize_grads`` of ``torch.autograd.Function``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Form(NamedTuple):
    """What autograd would make zeros like, and their length in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    kind: tuple[torch.dtype, torch.device]

    @property
    def length(self) -> int:
        spans = ((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return 1 + sum(spans) if 0 not in self.shape else 0


def share_zeros(outputs: Any) -> None:
    """See to it that gradients that are zeros, of a region whose outputs these are, share their memory.

    The tensors stay the same objects with the same values and versions; only the graph behind them grows by
    an identity.
    """
    of_node: dict[Any, list[Tensor]] = {}
    for one in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
        if type(one) is Tensor and one.grad_fn is not None and not one._is_view():
            of_node.setdefault(one.grad_fn, []).append(one)
    for tensors in of_node.values():
        if len(tensors) > 1:
            with torch.autograd._unsafe_preserve_version_counter(tuple(tensors)):  # nothing is written
                _Identity.apply(*tensors)


class _Identity(torch.autograd.Function):
    """In place: a view would refuse what users may do with a network's output."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*tensors)
        ctx.forms = [_Form(one.shape, one.stride(), (one.dtype, one.device)) for one in tensors]
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        lengths: dict[Any, int] = {}
        for form, gradient in zip(ctx.forms, gradients, strict=True):
            if gradient is None:
                lengths[form.kind] = max(lengths.get(form.kind, 0), form.length)
        memory = {
            (dtype, device): torch.zeros(length, dtype=dtype, device=device)
            for (dtype, device), length in lengths.items()
        }
        return tuple(
            memory[form.kind].as_strided(form.shape, form.stride) if gradient is None else gradient
            for form, gradient in zip(ctx.forms, gradients, strict=True)
        )
