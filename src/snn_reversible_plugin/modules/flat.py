"""Nested ``nn.Sequential`` run as one, so that a layer's input can go as soon as its output stands.

The one idea: a call holds its arguments until it returns, so a Sequential that is called by another one
keeps its first layer's input alive until its last layer has run. Where nobody hooks into that call, its
layers may as well be called by the outer one, which holds nothing but what the next layer needs. What that
is, and that nobody hooks into that layer's call, it says to whoever asked for it.

Source: the forward of ``nn.Sequential``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as of_modules

from snn_reversible_plugin.modules.swap import Mark, SwappedClass, swap, swapped_class
from snn_reversible_plugin.modules.tracking import is_tracking


class Between(Protocol):
    """Is told what a layer is about to take; its layer is None where somebody looks on."""

    def hand_on(self, value: Any, layer: nn.Module | None) -> None: ...


BETWEEN: Mark[Callable[[], Between | None]] = Mark("between")  # of a flat Sequential: whom it tells


class Flat(SwappedClass):
    """In front of a Sequential: those inside of it run as parts of it."""

    def forward(self, input: Any) -> Any:
        """As the stock forward, layer by layer."""
        if torch.compiler.is_compiling():
            return super().forward(input)  # type: ignore[misc]
        between = told() if (told := BETWEEN.of(self)) is not None else None  # type: ignore[arg-type]
        entered: list[nn.Sequential] = []
        try:
            for module, ends in _layers(self, entered):  # type: ignore[arg-type]
                if not ends:
                    if between is not None:
                        between.hand_on(input, module if _is_unwatched(module) else None)
                    input = module(input)
                    continue
                entered.pop()
                for hook in module._forward_hooks.values():
                    hook(module, (), input)
            return input
        finally:
            if between is not None:
                between.hand_on(input, None)
            for module in reversed(entered):  # left by an exception
                for hook in module._forward_hooks.values():
                    hook(module, (), None)


def make_flat(modules: Iterable[nn.Module], between: Callable[[], Between | None] | None = None) -> None:
    """Let the Sequentials among modules run flat; ``between`` gives whom to tell what is handed on."""
    for module in modules:
        if _is_plain(module):
            swap(module, swapped_class(Flat, type(module)))
            if between is not None:
                BETWEEN.set(module, between)


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
    return _is_plain(module) and _is_unwatched(module)


def _is_unwatched(module: nn.Module) -> bool:
    """Whether nobody but a layer itself sees what it is called with."""
    if "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__:
        return False
    if module._compiled_call_impl is not None or of_modules._has_any_global_hook():
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return all(map(is_tracking, hooks))
