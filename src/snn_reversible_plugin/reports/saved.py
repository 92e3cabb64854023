"""What autograd saves in a step, counted once: by stock, and by the handles that it is given instead."""

from __future__ import annotations

from collections import Counter

import torch

from snn_reversible_plugin.ops.layouts import storage_key
from snn_reversible_plugin.reports.trial import Step
from snn_reversible_plugin.tape.findings import Findings, FoundBits, KeptInFull
from snn_reversible_plugin.tape.handles import Handle, Packed, storage_once


def storages_alive(step: Step) -> set[int]:
    """The storages of what lives anyway."""
    return {storage_key(tensor) for tensor in step.alive()}


class SavedByStock:
    """A pack hook that keeps everything and counts it."""

    def __init__(self, step: Step) -> None:
        self.where: str | None = None
        self.held: Counter[str] = Counter()
        self._seen = storages_alive(step)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.held[self.where or "model"] += storage_once(tensor, self._seen)
        return tensor.detach()


class SavedByTape(Findings):
    """Asks the handles that autograd was given what they hold, each thing once, when the forward is over: a
    stream is not undone before the sum after it is known."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._seen = storages_alive(step)
        self._packed: list[tuple[str, Handle]] = []
        self._stored: list[tuple[str, Packed, int]] = []
        self._kept: list[KeptInFull] = []

    def found(self) -> tuple[list[FoundBits], list[KeptInFull]]:
        """What is bits, and what is kept in full, once it is counted."""
        return self.bits(self._stored), sorted(self._kept, key=lambda one: -one.bytes)

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
                    held[where] += size
                    if isinstance(handle, Packed) and size:
                        self._stored.append((where, handle, size))
                    if kept := self.kept(where, handle, size):
                        self._kept.append(kept)
                    waiting += handle.relies_on()
        return held, treatments
