"""Running a model as if it had not run: buffers, neuron states, gradients and random numbers put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context manager: on leaving, the model is as it was on entering.

    Inside, states that carry a graph are cut from it: it may have been freed by a backward.
    Put back are buffers, tensors among the attributes, SpikingJelly's ``_memories``, gradients, and the
    random number generators. Parameters are taken to be only read.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        tables = [module._buffers, module.__dict__]
        if isinstance(module.__dict__.get("_memories"), dict):
            tables.append(module.__dict__["_memories"])
        for table in tables:
            saved.append((table, {key: _copied(value) for key, value in table.items()}))
            for key, value in table.items():
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    table[key] = value.detach()
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for table, values in saved:
            for key in [key for key in table if key not in values]:
                del table[key]
            for key, (original, copy) in values.items():
                if copy is not None and not torch.equal(original.detach(), copy):
                    with torch.no_grad():
                        original.copy_(copy)
                table[key] = original
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _copied(value: Any) -> tuple[Any, torch.Tensor | None]:
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        return value, value.detach().clone()
    return value, None
