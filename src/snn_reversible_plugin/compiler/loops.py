"""How long a model's loops over time are, seen before anything is traced.

The one idea: the compiler unrolls loops, so what it takes grows with the number of times a forward
calls the same module, and that can be counted in one eager forward without a graph, which is cut short
when it has seen enough.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin.modules.as_it_ran import unchanged

# Tracing alone takes about a third of a CPU second for a time step of two layers.
MOST_UNROLLED = 128


class _Enough(BaseException):
    """A module was called more than ``MOST_UNROLLED`` times."""


def is_too_long(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The name of a module that one call of the model calls more than ``MOST_UNROLLED`` times, if any.

    The model is left as it was.
    """
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            calls[name] += 1
            if calls[name] > MOST_UNROLLED:
                raise _Enough(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(counting(name or type(model).__name__))
        for name, module in model.named_modules()
    ]
    try:
        with unchanged(model), torch.no_grad():
            model(*args, **kwargs)
    except _Enough as enough:
        return str(enough)
    finally:
        for hook in hooks:
            hook.remove()
    return None
