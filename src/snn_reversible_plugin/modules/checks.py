"""What a user hands in, looked at before anything is changed: the model, and names of its modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def check_model(model: Any) -> None:
    """Refuse what the tape can't record."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, not {type(model).__name__}")
    # A part that is scripted is ordinary autograd to the tape.
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(model).__name__} is a scripted module: the tape works on eager operations. Convert the "
            "Python model it was scripted from."
        )
    for name, module in model.named_modules():
        where = repr(name) if name else type(model).__name__
        if is_compiled(module):
            raise TypeError(
                f"{where} is compiled: the tape works on eager operations. Convert the model without "
                "torch.compile."
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether it is a module that ``torch.compile`` made, or that was compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def skipped_modules(model: nn.Module, skip: Sequence[str | type[nn.Module]]) -> list[nn.Module]:
    """The modules that ``skip`` names, or whose type it does."""
    if isinstance(skip, (str, type)):
        skip = (skip,)
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped: list[nn.Module] = []
    for item in skip:
        if isinstance(item, str) and item not in modules:
            raise ValueError(f"skip names {item!r}, and the model has no module of that name")
        if isinstance(item, str):
            skipped.append(modules[item])
        elif isinstance(item, type):
            skipped += [module for module in modules.values() if isinstance(module, item)]
        else:
            raise TypeError(f"skip takes module names and types, not {item!r}")
    return list(dict.fromkeys(skipped))
