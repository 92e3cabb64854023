"""Handles: what the tape stores in place of a tensor, and how each gives the tensor back.

Three treatments. ``Kept`` is the tensor itself, ``Packed`` (:mod:`.tape.packed`) few bits an element,
``Replayed`` (:mod:`.tape.replayed`) a recipe. A handle knows nothing of neurons, modules or the recording;
it only rebuilds. Source: the pack / unpack contract of
``torch.autograd.graph.saved_tensors_hooks``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from snn_reversible_plugin.ops.autocast import without_autocast
from snn_reversible_plugin.ops.layouts import (
    NO_DISPATCH,
    STRIDED,
    is_plain,
    parts_in_memory,
    shape_of,
    storage_key,
)
from snn_reversible_plugin.tape.unseen import Unseen, WrittenUnseen, checksum, of_value


class Label:
    """What check mode and reports write down of a handle, at bytes that no other run pays for."""

    __slots__ = ("checksum", "where")

    def __init__(self) -> None:
        self.where: str | None = None
        self.checksum: torch.Tensor | None = None


_labels: weakref.WeakKeyDictionary[Handle, Label] = weakref.WeakKeyDictionary()
_UNLABELLED = Label()


labelled: dict[Any, Label] = _labels.data  # type: ignore[attr-defined]
"""What has a label: asked for each value that is rebuilt, whether there is any."""


def _label_of(handle: Handle) -> Label:
    return _labels.get(handle, _UNLABELLED) if labelled else _UNLABELLED


class Handle:
    """Stands for one tensor. ``get`` returns the tensor, and whether the caller owns its storage.

    ``counts``: whether :meth:`need` and :meth:`release` do anything. ``cheap``: a rebuild is hardly more
    than a copy.
    """

    __slots__ = ("__weakref__",)

    treatment: str
    counts = False
    cheap = False

    @property
    def where(self) -> str | None:
        """The module in which it was made, where that is written down: in check mode, for reports."""
        return _label_of(self).where

    @where.setter
    def where(self, name: str | None) -> None:
        if name is not None:
            _labels.setdefault(self, Label()).where = name

    @property
    def checksum(self) -> torch.Tensor | None:
        """Of the value that the forward saw, in check mode."""
        return _label_of(self).checksum

    @checksum.setter
    def checksum(self, of_value: torch.Tensor | None) -> None:
        _labels.setdefault(self, Label()).checksum = of_value

    def get(self, last: bool) -> tuple[torch.Tensor, bool]:
        raise NotImplementedError

    def need(self) -> None:
        """One more will ask for the value."""

    def release(self) -> None:
        """One of those who announced a need is served."""

    def peek(self) -> torch.Tensor:
        """The value for somebody who announced no need: nothing is counted, nothing cached."""
        return self.get(False)[0]

    def stored(self, seen: set[int]) -> int:
        """Bytes that it holds and nobody who was asked before: what is counted goes into ``seen``."""
        return 0

    def relies_on(self) -> Iterable[Handle]:
        """The handles that its value is rebuilt from."""
        return ()

    def unpack(self) -> torch.Tensor:
        """Serve one need of autograd's."""
        value, owned = self.get(True)
        note_ownership(value, owned)
        return value

    def verified(self, value: torch.Tensor, how: str) -> torch.Tensor:
        """In check mode, compare with the checksum that the forward left."""
        if labelled and self.checksum is not None and not torch.equal(checksum(value), self.checksum):
            raise WrittenUnseen(
                Unseen(
                    self.where or "the model",
                    f"{how} gave another value than the forward did (shape {shape_of(value)}, "
                    f"{value.dtype}). It is not deterministic, or something it reads has changed",
                    "Leave that module out with skip=, or make it deterministic.",
                )
            )
        return value


def stored_once(key: int, size: int, seen: set[int]) -> int:
    """The size of what has this key, if that is not in ``seen`` yet."""
    if key in seen:
        return 0
    seen.add(key)
    return size


def storage_once(tensor: torch.Tensor, seen: set[int]) -> int:
    """Bytes of a tensor's storage, or of those that it is made of, if they are not in ``seen`` yet."""
    if tensor.layout is STRIDED and type(tensor).__torch_dispatch__ is NO_DISPATCH:
        return stored_once(storage_key(tensor), tensor.untyped_storage().nbytes(), seen)
    return sum(storage_once(part, seen) for part in parts_in_memory(tensor))


class Exposure:
    """How a kept value is known that somebody may write to past the version counter."""

    __slots__ = ()

    def is_unchanged(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor holds what it did."""
        raise NotImplementedError

    def value(self, kept: Kept) -> torch.Tensor:
        """What it held.

        Raises:
            RuntimeError: it holds something else by now, and that was all that was known.
        """
        raise NotImplementedError

    def size(self) -> int:
        """Bytes held for it."""
        return 0


class Kept(Handle):
    """The tensor itself, by reference, with the version that it had."""

    treatment = "kept"
    __slots__ = (
        "anchored", "ended", "exposure", "for_stock", "goes", "outside", "parameter", "statistic", "tensor",
        "unpaid", "version",
    )  # fmt: skip

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = -1 if tensor.is_inference() else tensor._version
        self.anchored = False  # something relies on it, so that holding it costs nothing more
        self.outside = self.parameter = False  # whether it came from outside, and whether to be learned
        self.unpaid = 0.0  # bytes held for recipes of which autograd has saved none yet
        self.goes = False  # whether a backward writes over it when its turn has come
        self.ended = False  # whether it is a state whose history is no longer wanted
        self.statistic = False  # whether a batch norm counts in it, which moves no version
        self.exposure: Exposure | None = None  # how it is known, where somebody may write to it unseen
        self.for_stock: Callable[[], Kept | None] | None = None  # what stock's nodes are given in its place

    def spill(self, spared: bool = False) -> None:
        """Copy the value, because the tensor is about to be changed in place.

        ``spared``: it is wanted for the value that it will have.
        """
        if spared:
            if self.checksum is not None:
                self.checksum = None
            return
        if self.exposure is not None and not self.exposure.is_unchanged(self.tensor):
            return  # which then knows what it was, or that it is gone
        if self.tensor._version == self.version:
            self.tensor, self.exposure = self.tensor.clone(), None
            self.version = self.tensor._version

    def get(self, last: bool) -> tuple[torch.Tensor, bool]:
        if self.exposure is not None:
            return self.exposure.value(self), False
        if self.version >= 0 and self.tensor._version != self.version:
            self.check_version()
        tensor = self.tensor
        if (
            self.parameter
            and tensor.layout is STRIDED
            and tensor.numel()
            and not tensor.untyped_storage().nbytes()
            and is_plain(tensor)
        ):
            raise RuntimeError(
                f"{self.where or 'the model'}: a parameter of shape {tuple(tensor.shape)} was let go "
                "of when its layer had run, and a neuron's backward computes that layer again. Shard "
                "with fully_shard(layer, reshard_after_forward=False), or the converted model as a whole."
            )
        then = self.checksum if labelled else None
        if then is not None and not torch.equal(checksum(self.tensor), then):
            raise self.was_written()
        return self.tensor, False

    def was_written(self) -> WrittenUnseen:
        """The error for a value that is gone."""
        return WrittenUnseen(
            Unseen(
                self.where or "the model",
                f"{of_value(self.tensor)} that the backward needs was written to past its version counter "
                "(by .data, numpy, or a buffer that was filled again)",
                "Hand over a clone, write to a clone, or put snn_reversible_plugin.reversible(model) "
                "around the loop: inside, writes by .data are seen.",
            )
        )

    def check_version(self) -> None:
        """Refuse a value that was changed in place."""
        if self.version >= 0 and self.tensor._version != self.version:
            raise RuntimeError(
                f"{self.where or 'the model'}: a tensor of shape {shape_of(self.tensor)} "
                f"({self.tensor.dtype}) that the backward needs was modified by an inplace operation: "
                f"it is at version {self.tensor._version}, the forward saw version {self.version}. "
                "Call backward before changing parameters or inputs, or change a clone."
            )

    def stored(self, seen: set[int]) -> int:
        beside = 0 if self.exposure is None else stored_once(id(self), self.exposure.size(), seen)
        return storage_once(self.tensor, seen) + beside


class Passing(Handle):
    """Leads to a handle without keeping alive what that one needs.

    For tensors that outlive their graph, as the state that a neuron starts its next step from.
    ``is_state``: it is in the user's hands, who may write to it.
    """

    __slots__ = ()

    is_state = False

    def leads_to(self) -> Handle | None:
        """The handle to store; None where what it needs is gone."""
        raise NotImplementedError


class ComputedState(Passing):
    """Leads to the recipe of a state that operations computed."""

    __slots__ = ("_recipe",)

    is_state = True

    def __init__(self, recipe: Handle) -> None:
        self._recipe = recipe

    def leads_to(self) -> Handle:
        return self._recipe


class Watcher:
    """Who wants to know of rebuilds."""

    def begins(self, order: Sequence[Any], uses: Mapping[Handle, int]) -> None:
        """One begins: recipes in the order in which they run, and how often each value is used there."""


watchers: weakref.WeakValueDictionary[int | None, Watcher] = weakref.WeakValueDictionary()  # by graph task


def unpack(handle: Handle) -> torch.Tensor:
    """The unpack hook."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through a reversible model is not supported: the tape "
            "rebuilds values, not their graph. Run that part under snn_reversible_plugin.stock(model)."
        )
    if not torch._C._is_any_autocast_enabled():
        return handle.unpack()
    with without_autocast():  # what autocast cast in the forward was recorded as operations of its own
        return handle.unpack()


def peek(handle: Handle) -> torch.Tensor:
    """What a handle stands for, outside of a backward."""
    with without_autocast():
        return handle.peek()


_local = threading.local()


def note_ownership(value: torch.Tensor, owned: bool) -> None:
    """Remember for :func:`owns` whether the value that is about to be handed out is the caller's."""
    if value.layout is not STRIDED or type(value).__torch_dispatch__ is not NO_DISPATCH:
        return
    fresh = _local.__dict__.setdefault("fresh", {})
    if len(fresh) > 64:
        fresh.clear()
    pointer = value.data_ptr()
    if owned:
        fresh[pointer] = weakref.ref(value.untyped_storage())
    else:
        fresh.pop(pointer, None)


def owns(tensor: torch.Tensor) -> bool:
    """Whether a backward may overwrite ``tensor``, which it just got from ``ctx.saved_tensors``.

    True once, for a tensor that was rebuilt for this call and that nobody else refers to. The storage's
    identity is compared, because an address alone comes back after a free.
    """
    ref = _local.__dict__.setdefault("fresh", {}).pop(tensor.data_ptr(), None)
    return ref is not None and ref() is tensor.untyped_storage()
