"""The states that a chain leaves in its neurons, promised: a chain of any depth holds none of them.

The one idea: a final membrane can be had again from what the chain holds for its backward anyway, so it
need not be held beside it. Source: :mod:`...tape.final_membrane`, for a single neuron.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.blocks.second_run import BranchRun, shared_tables
from snn_reversible_plugin.blocks.starts import Start
from snn_reversible_plugin.modules.kinds import framework_of
from snn_reversible_plugin.modules.states import Key
from snn_reversible_plugin.tape.final_membrane import FinalMembrane, Memories, promise_among

# NOTE [Which states are promised]
#
# 1. Those of a framework's table that says when it is read (SpikingJelly's `_memories`, a snnTorch neuron's
#    buffers), where the neuron started fresh, as in the note on final membranes, or from zeros.
# 2. Of a neuron that two branches share none: the second branch reads what the first one left.
# 3. Not inside a backward, where an outer chain runs this one again and reads its states at once, and not
#    where FSDP gathers parameters for the time of a run, since who reads a state is in no run.
# 4. The chain's backward meets every state on its way and keeps those that are still promised.
# 5. The first one that is read before makes all of the same call known: a walk costs a forward, and who
#    reads one state mostly reads others.


class Undoing:
    """What a walk back through a chain starts from; promises hold it, and nobody else does.

    ``streams`` are the chain's outputs, ``states`` the entry states of each branch that are tensors.
    """

    def __init__(self, walk: Callable[[Sequence[Tensor], list[list[Tensor]]], None]) -> None:
        self._walk = walk
        self._streams: list[Tensor] = []
        self._states: list[list[Tensor]] = []
        self._versions: list[int] = []

    def starts_from(self, streams: Iterable[Tensor], states: Iterable[Iterable[Tensor]]) -> None:
        """Aliases of the tensors: an output holds its graph, which holds the chain's run."""
        self._streams = [stream.detach() for stream in streams]
        self._states = [[state.detach() for state in of_branch] for of_branch in states]
        self._versions = self._versions_now()

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in sum(self._states, self._streams)]

    def walk(self) -> None:
        """Undo the chain, so that each state becomes known."""
        if self._versions_now() != self._versions:
            raise RuntimeError(
                "RevSSequence: its output, or a state that it started from, was modified by an inplace "
                "operation, and the membrane that is read now is computed from it. Read it before, or "
                "change a clone."
            )
        self._walk(self._streams, self._states)


class PromisedStates:
    """The promises of one forward of a chain."""

    def __init__(self, branches: Sequence[BranchRun], modules: Iterable[nn.Module]) -> None:
        self._promises: dict[Key, weakref.ref[FinalMembrane]] = {}
        self._starts: list[tuple[Memories, str, Any]] = []
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.places: dict[Key, Tensor] = {}
        self._tables = {id(table) for table in map(_table, modules) if table is not None}
        if self._tables:
            self._tables -= shared_tables(branches)

    def promise(self, branch: BranchRun, undoing: Undoing) -> None:
        """Put promises in place of the states that a branch has just left."""
        for table, key, start in branch.starts():
            v = table.get(key)
            if id(table) not in self._tables or not isinstance(v, Tensor) or not v.is_floating_point():
                continue
            where = id(table), key
            final = FinalMembrane(partial(self._read, undoing, where))
            zero = self._zeros.setdefault((v.dtype, v.device), v.new_zeros(()))
            self.places[where] = final.placeholder(v, zero)
            self._promises[where] = weakref.ref(final)
            self._starts.append((table, key, start))  # type: ignore[arg-type]
            table[key] = final
            branch.awaited = self.keep

    def _read(self, undoing: Undoing, where: Key) -> Tensor:
        undoing.walk()
        final = self._promises[where]()
        if final is None or final.membrane is None:
            raise RuntimeError(
                "RevSSequence: a neuron inside keeps its states in another table than at the time of the "
                "forward whose membrane is read now, so that they are not that forward's any more. Read it "
                "before the neuron is changed or reset."
            )
        return final.membrane

    def keep(self, where: Key, state: Tensor) -> None:
        """A state at exit is known: for its promise, if somebody may still read it."""
        final = self._promises[where]() if where in self._promises else None
        if final is not None and final.membrane is None:
            final.keep(state)

    def may_be_read(self, where: Key, place: Tensor) -> None:
        """``place``, an output of the autograd function, gets the state's gradient."""
        final = self._promises[where]()
        if final is not None:
            final.promise(place)

    def take_back(self) -> None:
        """The forward broke off: its neurons are left as if they had not run."""
        for table, key, start in self._starts:
            table[key] = start.make() if isinstance(start, Start) else start


def _table(module: nn.Module) -> Memories | None:
    framework = framework_of(module)
    if framework is None or framework.states_of(module) is None:
        return None
    to_zero = framework.resets_itself(type(module))  # type: ignore[arg-type]
    return promise_among(module, framework.states_in, framework.reset_by, to_zero)
