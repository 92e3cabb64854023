"""What a user hands in, looked at before anything is changed: the model, and names of its modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def check_model(model: Any, instead: str = "") -> None:
    """Refuse what the tape can't record; ``instead`` is what to use for a model that is compiled."""
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
                f"{where} is compiled: the tape works on eager operations. Give the model without "
                f"torch.compile{f', or use {instead}' if instead else ''}."
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


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}


def bytes_of(budget: int | str) -> int:
    """A number of bytes: ``1 << 30``, ``"1GiB"``, ``"500 MB"``.

    Raises:
        ValueError: it is none.

    Example:
        >>> bytes_of("1.5 GiB"), bytes_of("500MB"), bytes_of(4096)
        (1610612736, 500000000, 4096)
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(budget).lower())
    try:
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1 or isinstance(budget, bool):
        raise ValueError(f'{budget!r} is no number of bytes: give one, or "10GiB", "500MB"')
    return size
