"""Recipes of tensors that one number fills."""

from __future__ import annotations

from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.operators import aten
from snn_reversible_plugin.tape.replayed import Replayed


def constant(func: Any, args: tuple[Any, ...], out: torch.Tensor) -> Replayed | None:
    """The recipe of a tensor that one number fills: it needs no example to be made again, but its shape."""
    if not (is_plain(out) and out.is_contiguous()):
        return None
    value = args[1] if func is aten.full_like.default else int(func is aten.ones_like.default)
    options = {"dtype": out.dtype, "device": out.device}
    return Replayed(aten.full.default, (list(out.shape), value), options)


def number_in(handle: Any) -> float | None:
    """The number that fills a tensor with this handle, where one does."""
    return (
        float(handle.args[1]) if isinstance(handle, Replayed) and handle.func is aten.full.default else None
    )
