"""``torch.utils.checkpoint`` applied by hand, as a careful user would.

A checkpointed part runs again in the backward. Its neurons must start that run from the states they had
before the first, its batch norms must not count the batch twice, and afterwards every state must be what
the forward left. States go in and come out as tensors of the graph, so that gradients pass
from part to part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from snntorch._neurons.neurons import SpikingNeuron
from spikingjelly.activation_based.base import MemoryModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Slot = tuple[dict[str, Any], str]


def checkpoint_with_states(owner: nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, checkpointed; ``owner`` holds the neurons that it steps."""
    slots = _states(owner)
    runs = 0

    def run(states: list[Any], *inputs: Any) -> tuple[Any, list[Any]]:
        nonlocal runs
        runs += 1
        with _second_run(owner, slots) if runs > 1 else nullcontext():
            for (table, key), state in zip(slots, states, strict=True):
                table[key] = state
            out = function(*inputs)
            return out, [table[key] for table, key in slots]

    out, states = checkpoint(run, [table[key] for table, key in slots], *inputs, use_reentrant=False)
    for (table, key), state in zip(slots, states, strict=True):
        table[key] = state
    return out


def checkpoint_blocks(model: nn.Module, types: tuple[type[nn.Module], ...]) -> nn.Module:
    """Checkpoint every outermost module of the given types, in place."""
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, types) and id(module) not in done:
            done |= {id(inner) for inner in module.modules()}
            module.forward = partial(checkpoint_with_states, module, module.forward)
    return model


def segments(x_seq: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A sequence in about sqrt(T) parts of about sqrt(T) steps: the least memory at one more forward."""
    return x_seq.split(math.isqrt(len(x_seq) - 1) + 1)


def _states(owner: nn.Module) -> list[Slot]:
    slots: list[Slot] = []
    for module in owner.modules():
        if isinstance(module, MemoryModule):
            slots += [(module._memories, key) for key in module._memories]
        elif isinstance(module, SpikingNeuron) and module.init_hidden:
            slots += [(module._buffers, key) for key in ("syn", "mem") if key in module._buffers]
    return slots


@contextmanager
def _second_run(owner: nn.Module, slots: list[Slot]) -> Iterator[None]:
    left = [table[key] for table, key in slots]
    norms = [module for module in owner.modules() if isinstance(module, _BatchNorm)]
    statistics = [dict(norm._buffers) for norm in norms]
    for norm in norms:  # the second run counts into copies
        norm._buffers = {key: None if b is None else b.clone() for key, b in norm._buffers.items()}
    try:
        yield
    finally:
        for norm, buffers in zip(norms, statistics, strict=True):
            norm._buffers = buffers
        for (table, key), state in zip(slots, left, strict=True):
            table[key] = state
