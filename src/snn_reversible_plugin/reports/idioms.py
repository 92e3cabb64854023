"""Which of the user's own idioms the tape can't see, found in one step in check mode.

The one idea: what no operation of torch does leaves a trace in Python: another state of a random number
generator, another value of an attribute, a tensor that came from nowhere, a value that is not what its
checksum says. None of it is wrong by itself; a part that runs a second time (a reversible block, a
checkpoint) or a value that is rebuilt would not repeat it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin.modules.states import OF_TORCH, holds_states
from snn_reversible_plugin.modules.tracking import tracked
from snn_reversible_plugin.ops.layouts import is_plain, storage_key
from snn_reversible_plugin.reports.saved import SavedByTape
from snn_reversible_plugin.reports.trial import Step, tensors_in
from snn_reversible_plugin.tape.findings import FROM_ELSEWHERE, UNSEEN, KeptInFull
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.unseen import Unseen, of_value

RANDOM = "Draw by torch (torch.rand, torch.bernoulli), whose generators are put back for a second run."
ATTRIBUTE = (
    "Make it a buffer or a function of the input, or change it outside of the forward: a part that runs a "
    "second time (a reversible block, a checkpoint) meets the later value."
)
ELSEWHERE = "memory of numpy's or another library's, made during the forward"
FROM_OUTSIDE = "Copy it (torch.tensor, .clone()): nobody sees what that library writes there."
ALLOCATED = "Let the function save what it is given, and no copy of it: what a kernel may fill is kept."


class Idioms(SavedByTape):
    """An observer of a recording in check mode, and of the modules that run in it."""

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._model = step.model
        self._found: dict[Unseen, None] = {}
        attributes = [vars(module) for module in step.model.modules()]
        self._own = {storage_key(one) for one in (*step.alive(), *tensors_in(attributes)) if is_plain(one)}

    def unseen(self, finding: Unseen) -> None:
        """Whoever finds one says so, once for all of its like."""
        self._found[finding] = None

    def idioms(self) -> list[Unseen]:
        """What was found."""
        return list(self._found)

    def packed(self, where: str | None, tensor: torch.Tensor, handle: Handle) -> None:
        super().packed(where, tensor, handle)
        waiting, seen = [handle], {handle}
        while waiting:
            one = waiting.pop()
            if isinstance(one, Kept) and (one.outside or self.made_by(one.tensor) in FROM_ELSEWHERE):
                self._memory_of(one.where or where, one.tensor)
            new = [other for other in one.relies_on() if other not in seen]
            seen.update(new)
            waiting += new

    def kept(self, module: str, handle: Handle, size: int) -> KeptInFull | None:
        found = super().kept(module, handle, size)
        if found is not None and found.why == UNSEEN and "empty" in found.operation:
            what = f"{found.operation} of an autograd function's forward is room that a kernel may fill"
            self.unseen(Unseen(found.module, what, ALLOCATED))
        return found

    def _memory_of(self, where: str | None, tensor: torch.Tensor) -> None:
        """Whether somebody else than torch has allocated it, and it was not handed in.

        What torch allocated can't be resized either once somebody has looked at it by numpy.
        """
        if not is_plain(tensor) or tensor.untyped_storage().resizable():
            return
        by_torch = self.made_by(tensor) not in ("", *FROM_ELSEWHERE)
        if not by_torch and storage_key(tensor) not in self._own:
            self.unseen(Unseen(where or "model", f"{of_value(tensor)} lies in {ELSEWHERE}", FROM_OUTSIDE))

    def watching(self) -> AbstractContextManager[None]:
        """Context manager: compare what Python holds before and after each module's forward."""
        return tracked(self._model, _Comparing(self._model, self.unseen))


class _Comparing:
    """Is told of each module that begins and ends, and compares."""

    def __init__(self, model: nn.Module, unseen: Callable[[Unseen], None]) -> None:
        self.where: str | None = None
        self._modules = {name or "model": module for name, module in model.named_modules()}
        self._unseen = unseen
        self._before: list[tuple[Any, dict[str, Any]]] = []
        self._by_children: list[set[str]] = [set()]

    def entered(self, name: str) -> None:
        self._before.append((_generators(), _attributes(self._modules[name])))
        self._by_children.append(set())

    def left(self, name: str, _output: Any) -> None:
        generators, attributes = self._before.pop()
        told = self._by_children.pop()
        moved = {one for one, state in _generators().items() if state != generators.get(one, state)}
        for one in moved - told:
            self._unseen(Unseen(name, f"draws random numbers by {one}", RANDOM))
        self._by_children[-1] |= moved | told
        now = _attributes(self._modules[name])
        for key in sorted(now.keys() | attributes.keys()):
            if now.get(key) != attributes.get(key):
                self._unseen(Unseen(name, f"its forward changes the attribute {key!r}", ATTRIBUTE))


def _generators() -> dict[str, Any]:
    """The states of the random number generators that are not torch's."""
    found: dict[str, Any] = {"random": hash(random.getstate())}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, words, *rest = numpy.random.get_state()
        found["numpy.random"] = words.tobytes(), *rest
    return found


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds in Python: values, the lengths of lists, the states of generators.

    A neuron's are its framework's, tensors are the tape's.
    """
    if holds_states(module):
        return {}
    return {
        key: of_python
        for key, value in vars(module).items()
        if key not in OF_TORCH and (of_python := _value(value)) is not None
    }


def _value(value: Any) -> Any:
    if isinstance(value, bool | int | float | complex | str):
        return value
    if isinstance(value, list | tuple | dict | set):
        return type(value).__name__, len(value), tuple(map(id, value))
    generator = getattr(value, "bit_generator", None)  # of numpy
    if generator is not None:
        return str(generator.state)
    if isinstance(value, random.Random):
        return hash(value.getstate())
    return None
