"""What autograd saves in a step, counted once: by stock, and by the handles that it is given instead."""

from __future__ import annotations

from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from snn_reversible_plugin.ops.layouts import is_plain, parts_in_memory, storage_key
from snn_reversible_plugin.reports.trial import Step, tensors_in
from snn_reversible_plugin.tape.findings import Findings, FoundBits, KeptInFull
from snn_reversible_plugin.tape.handles import Handle, storage_once
from snn_reversible_plugin.tape.origins import OUTSIDE, look_up
from snn_reversible_plugin.tape.packed import Packed


def storages_alive(step: Step) -> set[int]:
    """The storages of what lives anyway."""
    return {storage_key(tensor) for tensor in step.alive()}


class SavedByStock:
    """A pack hook that keeps everything and counts it."""

    def __init__(self, step: Step) -> None:
        self.where: str | None = None
        self.held: Counter[str] = Counter()
        self._seen = storages_alive(step)
        # By address. A weak reference keeps it from being given to another storage.
        self._returned: dict[int, tuple[str, StorageWeakRef]] = {}

    def left(self, name: str, output: Any) -> None:
        """A module has run: what it returns is its own, unless a module inside of it said so before."""
        for tensor in filter(is_plain, tensors_in(output)):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._returned.setdefault(storage_key(tensor), (name, reference))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        size = storage_once(tensor, self._seen)
        if size:
            keys = map(storage_key, parts_in_memory(tensor))
            names = [self._returned[key][0] for key in keys if key in self._returned]
            name = names[0] if names else self.where or "model"
            self.held[name] += size
        return tensor.detach()


class SavedByTape(Findings):
    """Asks the handles that autograd was given what they hold, each thing once, when the forward is over: a
    stream is not undone before the sum after it is known."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.where: str | None = None
        self._seen = storages_alive(step)
        self._returned: WeakKeyDictionary[Handle, str] = WeakKeyDictionary()
        self._packed: list[tuple[str, Handle]] = []
        self._stored: list[tuple[str, Packed, int]] = []
        self._kept: list[KeptInFull] = []

    def found(self) -> tuple[list[FoundBits], list[KeptInFull]]:
        """What is bits, and what is kept in full, once it is counted."""
        return self.bits(self._stored), sorted(self._kept, key=lambda one: -one.bytes)

    def left(self, name: str, output: Any) -> None:
        """As for stock."""
        for tensor in tensors_in(output):
            if (handle := look_up(tensor)) is not None and handle is not OUTSIDE:
                self._returned.setdefault(handle, name)

    def packed(self, where: str | None, tensor: torch.Tensor, handle: Handle) -> None:
        self._packed.append((where or "model", handle))

    def count(self) -> tuple[Counter[str], dict[str, Counter[str]]]:
        """Bytes held, and the number of each treatment, by module."""
        treatments: dict[str, Counter[str]] = {}
        held: Counter[str] = Counter()
        seen = self._seen  # storages and handles: no two that live have one address
        for where, packed in self._packed:
            treatments.setdefault(where, Counter())[packed.treatment] += 1
            waiting = [packed]
            while waiting:
                handle = waiting.pop()
                if id(handle) not in seen:
                    seen.add(id(handle))
                    size = handle.stored(seen)
                    name = self._returned.get(handle, where)
                    held[name] += size
                    if isinstance(handle, Packed) and size:
                        self._stored.append((name, handle, size))
                    if kept := self.kept(name, handle, size):
                        self._kept.append(kept)
                    waiting += handle.relies_on()
        return held, treatments
