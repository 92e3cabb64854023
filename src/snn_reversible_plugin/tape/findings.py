"""What a recording found: which tensors are bits, and which are kept in full, and why.

The one idea: a network of unknown neurons needs no list of them to see where its memory goes. Each tensor
that is stored is the result of an operation, and what the tape decided about that one is written down.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from snn_reversible_plugin.ops.layouts import is_plain, parts_in_memory, shape_of, storage_key
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.operators import Kind, Operator
from snn_reversible_plugin.tape.origins import look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.recipes import Refused, tensors_among
from snn_reversible_plugin.tape.unseen import Unseen

OTHER = "computed where nothing is recorded: inside of a neuron, or of an operation that others run"
OPAQUE = "draws random numbers, or is an operator that can't be known to give the same again"
SAVED_BY_OWN = "saved by an autograd function that computes a block of layers, or written to from elsewhere"
UNSEEN = "made inside of an autograd function, where a kernel that torch doesn't see may fill it"
OF_NEURON = "a neuron's spikes"
LIFTED = "made from numbers of Python's or numpy's, which nobody can ask for again"
FROM_ELSEWHERE = ("lift_fresh", "lift", "lift_fresh_copy")
_NOTHING = "nothing to change"
REMEDIES = {
    LIFTED: "make it once, and keep it as a buffer",
    Refused.WORK: 'mode="memory" computes more again than "speed"; neurons between layers make it bits',
    Refused.DEPTH: f"one step of a long loop in many is kept: {_NOTHING}",
    Refused.OPERANDS: "compute it from what is stored anyway, in fewer operations on new tensors",
    Refused.SMALL: f"it is small: {_NOTHING}",
    Refused.ATOMIC: "on a GPU the order of its additions changes: use an operation without atomics",
    Refused.LAYOUT: "sparse and other special layouts are kept",
    OPAQUE: "draw masks by torch.bernoulli or compare random numbers: those are bits",
    SAVED_BY_OWN: "leave the block to this package: without the function its spikes are stored as bits",
    UNSEEN: "let the function save what it is given, and no copy of it",
    OTHER: "register_reversible(type) says how a neuron of your own runs",
}


class Observer(Protocol):
    """Is told of every operation, and of every tensor that autograd saves. See ``memory_report``."""

    def computed(self, where: str | None, operator: Operator, out: Any, refused: str | None) -> None: ...

    def packed(self, where: str | None, tensor: torch.Tensor, handle: Handle) -> None: ...

    def unseen(self, finding: Unseen) -> None: ...


@dataclass(frozen=True)
class FoundBits:
    """Tensors of one module of which a few bits an element are stored. ``operation`` made them."""

    module: str
    operation: str
    tensors: int
    elements: int
    bytes: int

    def __str__(self) -> str:
        each = 8 * self.bytes / max(self.elements, 1)
        return f"the output of {self.operation}, {self.tensors} times: {each:.2g} bits an element"


LEAST_PART = 0.01  # of what is held, for a tensor to be worth a line


@dataclass(frozen=True)
class KeptInFull:
    """A tensor that is stored as it is: the operation that made it, why, and what one may change."""

    module: str
    operation: str
    shape: tuple[int, ...]
    bytes: int
    why: str
    remedy: str

    def matters(self, held: int) -> bool:
        """Whether a reader could want to know: it is a part of the bytes held that shows, and can be
        changed.

        Example:
            >>> one = KeptInFull("fc", "rand", (8,), 32, "it draws", "draw masks")
            >>> one.matters(1000), one.matters(1_000_000)
            (True, False)
        """
        return self.bytes >= LEAST_PART * held and not self.remedy.endswith(_NOTHING)

    def __str__(self) -> str:
        made = f"the output of {self.operation}" if self.operation else "a tensor"
        return f"{shown(self.bytes)}, {made}: {self.why}. {self.remedy}"


@dataclass
class Findings:
    """An observer's notebook: is told of each operation, and asked about the handles that are stored."""

    _made: dict[int, tuple[str, str]] = field(default_factory=dict)  # by storage: operation and reason
    _bits: weakref.WeakKeyDictionary[Handle, tuple[str | None, str]] = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def computed(self, where: str | None, operator: Operator, out: Any, refused: str | None) -> None:
        """An operation has run under the tape; ``refused``: why it has no recipe."""
        if operator.kind is Kind.VIEW:
            return
        for tensor in tensors_among((out,)):
            handle = look_up(tensor)
            if isinstance(handle, Packed):
                self._bits[handle] = where, operator.name
                continue
            why = refused or (_why_kept(operator) if is_plain(tensor) else Refused.LAYOUT)
            self._made |= dict.fromkeys(map(storage_key, parts_in_memory(tensor)), (operator.name, why))

    def made_by(self, tensor: torch.Tensor) -> str:
        """The operation that filled a tensor's storage; empty for none that was recorded."""
        return self._made[storage_key(tensor)][0] if storage_key(tensor) in self._made else ""

    def unseen(self, finding: Unseen) -> None:
        """Check mode has found what no operation of torch did."""

    def kept(self, module: str, handle: Handle, size: int) -> KeptInFull | None:
        """What to say of a handle that holds this many bytes; None: it is no tensor in full."""
        if not isinstance(handle, Kept) or not size:
            return None
        tensor: torch.Tensor = handle.tensor
        operation, why = "", OTHER
        if is_plain(tensor):
            operation, why = self._made.get(storage_key(tensor), (operation, why))
        return KeptInFull(handle.where or module, operation, shape_of(tensor), size, why, REMEDIES[why])

    def bits(self, stored: list[tuple[str, Packed, int]]) -> list[FoundBits]:
        """A line for each module and operation that made bits; ``stored``: module, handle, bytes."""
        lines: dict[tuple[str, str], tuple[int, int, int]] = {}
        for module, handle, size in stored:
            where, operation = self._bits.get(handle, (None, OF_NEURON))
            key = where or module, operation
            tensors, elements, total = lines.get(key, (0, 0, 0))
            lines[key] = tensors + 1, elements + handle.size.numel(), total + size
        return [FoundBits(*key, *numbers) for key, numbers in lines.items()]


def _why_kept(operator: Operator) -> str:
    if operator.name in FROM_ELSEWHERE:
        return LIFTED
    if operator.allocates or operator.name.startswith(("empty", "new_empty")):
        return UNSEEN
    return OPAQUE if operator.kind is Kind.OPAQUE else SAVED_BY_OWN
