"""Tensors that came from outside of a tape: parameters, inputs, and their views, kept by reference.

The one idea: somebody else holds them anyway, so one handle serves all who rely on one of them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from snn_reversible_plugin.ops.layouts import NO_DISPATCH, STRIDED
from snn_reversible_plugin.tape.handles import Kept


class Outsiders:
    """The handles of a recording's outsiders.

    A loop over time takes the same view of a weight at each step: one handle serves them all. Each view is
    looked up twice, as an operand and for autograd.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, weakref.ref[Kept]] = {}
        self._latest_view: tuple[torch.Tensor | None, Kept | None] = None, None

    def known(self, tensor: torch.Tensor) -> Kept | None:
        """The handle that a tensor, or an equal view, has."""
        if tensor.is_leaf:
            earlier = self._kept.get(id(tensor))
            leaf = None if earlier is None else earlier()
            same = leaf is not None and leaf.tensor is tensor and leaf.version == tensor._version
            return leaf if same else None
        view, kept = self._latest_view
        if view is not tensor:
            earlier = self._kept.get(_key(tensor))
            kept = earlier() if earlier is not None else None
            self._latest_view = tensor, kept
        if kept is not None and kept.version == tensor._version:
            # Whether what is kept is this view, and was not copied away since.
            mine = kept.tensor
            plain = tensor.layout is STRIDED and type(tensor).__torch_dispatch__ is NO_DISPATCH
            if (mine.data_ptr() == tensor.data_ptr()) if plain else (mine is tensor):
                return kept
        self._latest_view = None, None
        return None

    def keep(self, tensor: torch.Tensor) -> Kept:
        """A new handle."""
        # A leaf can be held as it is; another tensor would tie its graph into a cycle.
        kept = Kept(tensor if tensor.is_leaf else alias(tensor))
        kept.outside, kept.parameter = True, tensor.requires_grad or not tensor.is_leaf
        if kept.version >= 0:
            self._kept[_key(tensor)] = weakref.ref(kept)
        return kept

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()
        self._latest_view = None, None


def _key(tensor: torch.Tensor) -> Any:
    plain = tensor.layout is STRIDED and type(tensor).__torch_dispatch__ is NO_DISPATCH
    if tensor.is_leaf or tensor.is_nested or not plain:
        return id(tensor)
    bits = tensor.is_conj(), tensor.is_neg()
    # The storage's key, as this is asked for each operand of each step: without another call.
    return (
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        bits,
    )


_VIEWS = torch._C.DispatchKey.ADInplaceOrView  # what gives a view its base's version counter
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_Unseen, _Set = torch._C._DisableTorchDispatch, torch._C._SetExcludeDispatchKeyGuard


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage and version counter, without the tensor's place in the graph."""
    if type(tensor).__torch_dispatch__ is not NO_DISPATCH:
        with _disable_current_modes():  # its class says what it is without that place
            return tensor.detach()
    if _is_excluded(_VIEWS):
        with _Unseen(), _Set(_VIEWS, False):
            return tensor.detach()
    with _Unseen():
        return tensor.detach()
