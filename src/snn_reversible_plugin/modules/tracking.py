"""Which module runs: names for errors and reports, by hooks that are there only while needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Tracker(Protocol):
    """Whoever wants to know: ``where`` is the name of the module that runs."""

    where: str | None


@contextmanager
def tracked(model: nn.Module, tracker: Tracker) -> Iterator[None]:
    """Keep ``tracker.where`` at the name of the module whose forward runs.

    A tracker with a method ``entered`` is also given the name of each module, one with ``left`` its name
    and output. What others hang on a surrogate function makes it one that nobody knows; these hooks don't.
    """
    entered, left = getattr(tracker, "entered", None), getattr(tracker, "left", None)
    outer: list[str | None] = []
    hooks = []

    def entering(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            outer.append(tracker.where)
            tracker.where = name
            if entered is not None:
                entered(name)

        return hook

    def leaving(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if left is not None:
                left(name, output)
            tracker.where = outer.pop() if outer else None

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks; its work counts as its parent's
        hooks.append(module.register_forward_pre_hook(entering(name or "model"), prepend=True))
        hooks.append(module.register_forward_hook(leaving(name or "model"), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_tracking(hook: Any) -> bool:
    """Whether a module's hook is one of these, which look at no input and change nothing."""
    return getattr(hook, "__module__", "") == __name__
