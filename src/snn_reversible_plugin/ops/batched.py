"""Several gradients in one walk through the graph: ``is_grads_batched=True``, ``jacobian(vectorize=True)``.

The one idea: autograd then hands a backward tensors that look like one gradient and are a batch of them,
for operations that have a rule for it. A backward in place, or by a kernel, has none; so it is run for
one gradient of the batch after the other. Source: ``torch.autograd.grad``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.ops.interrupts import Switch

is_batched: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda _tensor: False
)

_comes_again = Switch()


def comes_again() -> bool:
    """Whether the backward that runs here will be run again for the next gradient of a batch."""
    return _comes_again.is_on()


def one_by_one(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of an autograd function's backward: it gets one gradient of a batch at a time.

    Raises:
        RuntimeError: from the backward, for a batch of batches.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.ops.batched import one_by_one
        >>> class Double(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...
        ...     @staticmethod
        ...     @one_by_one
        ...     def backward(ctx, grad):
        ...         return 2 * torch.from_numpy(grad.numpy())
        >>> x = torch.zeros(2, requires_grad=True)
        >>> torch.autograd.grad(Double.apply(x), x, torch.eye(2), is_grads_batched=True)
        (tensor([[2., 0.],
                [0., 2.]]),)
    """

    @functools.wraps(backward)
    def each(ctx: Any, *grads: Tensor | None) -> Any:
        for grad in grads:
            if grad is not None and is_batched(grad):
                break
        else:
            return backward(ctx, *grads)
        torch._C._vmapmode_increment_nesting()
        level = torch._C._vmapmode_decrement_nesting()
        batches = [None if grad is None else _unwrapped(grad, level) for grad in grads]
        number = max(len(batch) for batch in batches if batch is not None)
        rows = []
        for index in range(number):
            row = [None if batch is None else batch[index if len(batch) > 1 else 0] for batch in batches]
            with _comes_again.on() if index < number - 1 else nullcontext():
                found = backward(ctx, *row)
            rows.append(found if isinstance(found, (tuple, list)) else (found,))
        return tuple(_wrapped(column, level) for column in zip(*rows, strict=True))

    return each


def _unwrapped(grad: Tensor, level: int) -> Tensor:
    """The gradients of a batch, along the first dimension; one, where all are the same."""
    batch: Tensor = torch._remove_batch_dim(grad, level, 1, 0)  # type: ignore[attr-defined]
    if is_batched(batch):
        raise RuntimeError(
            "a batch of batches of gradients (is_grads_batched=True inside another) through a reversible "
            "network is not supported. Run that part under snn_reversible_plugin.stock(model)."
        )
    return batch


def _wrapped(results: tuple[Any, ...], level: int) -> Any:
    if all(result is None for result in results):
        return None
    (example,) = [result for result in results if result is not None][:1]
    whole = [torch.zeros_like(example) if result is None else result for result in results]
    return torch._add_batch_dim(torch.stack(whole), 0, level)  # type: ignore[attr-defined]
