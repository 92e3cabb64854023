"""Autocast as it was, and left: what is computed again has to be computed in the dtypes of the first time.

The one idea: autocast is a state of the thread that a backward, or a later run, does not inherit; so it is
written down where it matters. Source: ``torch.autocast``; ``torch.utils.checkpoint`` does the same.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

_DEVICES = ("cpu", "cuda")


class Autocast:
    """The autocast state at the time it is made, to be had again later.

    Args:
        device: the type of one more device whose state is written down, beside the CPU's and CUDA's.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     forward = Autocast()
        >>> with forward.again():
        ...     torch.is_autocast_enabled("cpu")
        True
    """

    __slots__ = ("_cache", "_devices", "_dtypes")

    def __init__(self, device: str = "cpu") -> None:
        more = device not in _DEVICES and torch.amp.is_autocast_available(device)
        self._devices = (*_DEVICES, device) if more else _DEVICES
        self._dtypes = {
            kind: torch.get_autocast_dtype(kind)
            for kind in self._devices
            if torch.is_autocast_enabled(kind)
        }
        self._cache = torch.is_autocast_cache_enabled()

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype in which each type of device computes, of those where autocast was on."""
        return self._dtypes

    def again(self, *, cache: bool = True) -> AbstractContextManager[Any]:
        """Context manager: autocast as it was; without ``cache`` no cast is kept for later operations."""
        kinds = [kind for kind in self._devices if kind in self._dtypes or torch.is_autocast_enabled(kind)]
        if not kinds:
            return nullcontext()
        stack = ExitStack()
        for kind in kinds:
            dtype = self._dtypes.get(kind)
            stack.enter_context(torch.autocast(kind, dtype, dtype is not None, cache and self._cache))
        return stack


def without_autocast() -> AbstractContextManager[Any]:
    """Context manager: operations keep their inputs' dtypes."""
    kinds = [kind for kind in _DEVICES if torch.is_autocast_enabled(kind)]
    if not kinds:
        return nullcontext()
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
