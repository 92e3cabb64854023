"""Nested ``nn.Sequential`` run as one, so that a layer's input can go as soon as its output stands.

The one idea: a call holds its arguments until it returns, so a Sequential that is called by another one
keeps its first layer's input alive until its last layer has run. Where nobody hooks into that call, its
layers may as well be called by the outer one, which holds nothing but what the next layer needs.

Source: the forward of ``nn.Sequential``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin.modules.last_use import is_unwatched
from snn_reversible_plugin.modules.swap import SwappedClass, swap, swapped_class


class Flat(SwappedClass):
    """In front of a Sequential: those inside of it run as parts of it."""

    def forward(self, input: Any) -> Any:
        """As the stock forward, layer by layer."""
        if torch.compiler.is_compiling():
            return super().forward(input)  # type: ignore[misc]
        return run_flat(self, [input])  # type: ignore[arg-type]


def run_flat(sequential: nn.Sequential, inputs: list[Any]) -> Any:
    """The layers of a Sequential, one after the other, and those of the Sequentials inside of it.

    Args:
        inputs: one, which is taken out, so that a caller that has it nowhere else doesn't hold it.
    """
    entered: list[nn.Sequential] = []
    try:
        return _run(sequential, inputs.pop(), entered)
    finally:
        for module in reversed(entered):  # left by an exception
            for hook in module._forward_hooks.values():
                hook(module, (), None)


def _run(sequential: nn.Sequential, input: Any, entered: list[nn.Sequential]) -> Any:
    for module, ends in _layers(sequential, entered):
        if not ends:
            input = module(input)
            continue
        entered.pop()
        for hook in module._forward_hooks.values():
            hook(module, (), input)
    return input


def make_flat(modules: Iterable[nn.Module]) -> None:
    """Let the Sequentials among modules run flat."""
    for module in modules:
        if _is_plain(module):
            swap(module, swapped_class(Flat, type(module)))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module runs as ``nn.Sequential`` does."""
    cls: Any = type(module)
    if not isinstance(module, nn.Sequential) or isinstance(module, torch.jit.ScriptModule):
        return False
    runs = cls.forward in (nn.Sequential.forward, Flat.forward)
    return runs and cls.__call__ is nn.Module.__call__ and cls.__iter__ is nn.Sequential.__iter__


def _layers(sequential: nn.Sequential, entered: list[nn.Sequential]) -> Iterator[tuple[Any, bool]]:
    """What is to be called, in order; and, marked, each Sequential whose layers have been."""
    for module in sequential:
        if not isinstance(module, nn.Sequential) or not _is_transparent(module):
            yield module, False
            continue
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        entered.append(module)
        yield from _layers(module, entered)
        yield module, True


def _is_transparent(module: nn.Module) -> bool:
    """Whether nobody would see that a Sequential is not called."""
    return _is_plain(module) and is_unwatched(module)
