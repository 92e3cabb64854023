"""The membranes that a compiled network leaves in its neurons, held only once somebody wants them.

The one idea: a compiled region is a function of its inputs, so what it left can be had again by calling it
again. After a call the memory of a final membrane is let go and a promise stands in the neuron's table of
states, as on the tape; reading it fills the very tensor that the region returned. Source:
:mod:`...tape.final_membrane`.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from snn_reversible_plugin import tape
from snn_reversible_plugin.compiler.zeros import share_zeros
from snn_reversible_plugin.modules.as_it_ran import RandomNumbers
from snn_reversible_plugin.modules.kinds import framework_of
from snn_reversible_plugin.modules.states import Table
from snn_reversible_plugin.tape.final_membrane import (
    FinalMembrane,
    ForgettingReset,
    Memories,
    compute_all,
    promise_among,
)

# NOTE [Which membranes are promised]
#
# 1. Those in a table that says when it is read (SpikingJelly's `_memories`), of neurons that started fresh,
#    with a graph, and whose tensor and memory nobody else has: what a user's forward also returned, or put
#    into a list, is held as it is.
# 2. From a region's second call on. The first one shows which of its inputs it changes (running statistics)
#    and whether it draws random numbers; from then on both are noted before a call, to call it as it ran.
# 3. Where calling it again holds less than the membranes take. Parameters and what the model was called
#    with live anyway; what crosses a graph break is held.
#    None of a region that talks to other processes, since one of them may read a membrane alone.
# 4. An optimizer's step is about to change the parameters: copies of them wait, if those are smaller, until
#    the states are reset.
# 5. Who reads a membrane once reads it every time: the first one that is read has all of its call made
#    known, and is held from the next call on.
# 6. Compiled code was traced with the framework's own tables, so these are back in place in every call.


class Region:
    """A compiled region, which writes down how it was called where somebody asked (:class:`Calls`)."""

    def __init__(self, run: Callable[..., Any], calls: Calls | None) -> None:
        self.run = run
        self._calls = calls
        self._changes: list[int] | None = None  # which inputs it changes; unknown before the first call
        self._is_random = False
        # Not functools.update_wrapper: torch 2.9 calls what a wrapper was made of, by an attribute of that.
        self.__name__ = getattr(run, "__name__", "region")

    def __call__(self, *inputs: Any) -> Any:
        outputs = self._run(inputs)
        share_zeros(outputs)
        return outputs

    def _run(self, inputs: tuple[Any, ...]) -> Any:
        noted = None if self._calls is None else self._calls.noted
        if noted is None:
            return self.run(*inputs)
        if self._changes is None:
            return self._first(inputs)
        kept = list(inputs)
        for index in self._changes:
            kept[index] = inputs[index].detach().clone()
        numbers = RandomNumbers(_devices(inputs)) if self._is_random else None
        outputs = self.run(*inputs)
        noted.append(Call(self, kept, numbers, outputs))
        return outputs

    def _first(self, inputs: tuple[Any, ...]) -> Any:
        versions, numbers = _versions(inputs), RandomNumbers(_devices(inputs))
        outputs = self.run(*inputs)
        after = _versions(inputs)
        self._changes = [index for index, version in enumerate(versions) if version != after[index]]
        self._is_random = not numbers.unused()
        return outputs


class Calls(threading.local):
    """The calls of compiled regions in this thread, while :meth:`note` is on."""

    noted: list[Call] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        # Lightning, once it is imported, copies what torch.compile is given: its backend, too.
        return self

    @contextmanager
    def note(self) -> Iterator[list[Call]]:
        """Context manager: gives the list in which the calls are noted."""
        before, self.noted = self.noted, []
        try:
            yield self.noted
        finally:
            self.noted = before


class Call:
    """How a region was called, and what it gave; it can be called again until its inputs change."""

    def __init__(
        self, region: Region, inputs: Sequence[Any], numbers: RandomNumbers | None, outputs: Any
    ) -> None:
        self._region, self._inputs, self._numbers = region, list(inputs), numbers
        self._versions = _versions(inputs)
        self.outputs = {
            id(one): (index, weakref.ref(one))
            for index, one in enumerate(outputs)
            if isinstance(one, Tensor)
        }
        self.promised: list[weakref.ref[OfRegion]] = []

    def held_beside(self, alive: set[int]) -> int:
        """Bytes of the inputs that nobody else holds."""
        others = (one for one in self._inputs if isinstance(one, Tensor) and id(one) not in alive)
        return sum(one.nbytes for one in others)

    def size(self) -> int:
        """Bytes of the membranes that are still promised."""
        return sum(one.size for one in (ref() for ref in self.promised) if one is not None)

    def keep_copies(self) -> bool:
        """Hold copies of the parameters, which are about to change, if that takes less; whether it does."""
        leaves = [
            index
            for index, one in enumerate(self._inputs)
            if isinstance(one, Tensor) and one.is_leaf and one.requires_grad
        ]
        if sum(self._inputs[index].nbytes for index in leaves) >= self.size():
            return False
        self._check()
        for index in leaves:
            self._inputs[index] = self._inputs[index].detach().clone().requires_grad_()
        self._versions = _versions(self._inputs)
        return True

    def fill(self) -> None:
        """Call the region again, and give every promised membrane its value."""
        self._check()
        drawn: AbstractContextManager[None] = (
            nullcontext() if self._numbers is None else self._numbers.again()
        )
        with tape.paused(), torch.inference_mode(False), torch.no_grad(), drawn:
            outputs = self._region.run(*self._inputs)
        for ref in self.promised:
            if (one := ref()) is not None and one.membrane is None:
                one.keep(outputs[one.index].detach())
        self.promised, self._inputs = [], []

    def _check(self) -> None:
        if _versions(self._inputs) != self._versions:
            raise RuntimeError(
                "a membrane that a compiled network left is read, and the region that computes it can't be "
                "called again: its parameters or inputs were modified by an inplace operation since its "
                "forward. Read the membrane before, or change a clone."
            )


class OfRegion(FinalMembrane):
    """The promise of a membrane that a region returned; ``index`` is its place among the outputs."""

    __slots__ = ("_call", "_found_out", "index", "size")

    def __init__(self, v: Tensor, call: Call, index: int, found_out: Callable[[], None]) -> None:
        super().__init__(call.fill)  # type: ignore[arg-type]
        self.index, self.size = index, v.nbytes
        self._call: Call | None = call
        self._found_out = found_out
        v.data = v.new_full((), torch.nan).expand(v.shape)
        self.promise(v)
        call.promised.append(weakref.ref(self))

    def keep(self, v: Tensor) -> None:
        self._place.data = v
        super().keep(v)
        self._call = None

    def compute(self) -> None:
        if self._call is not None:
            self._call.fill()

    def settle(self, lean: bool = False) -> bool:
        if self._call is None:
            return False
        if self._call.keep_copies():
            return True
        self._found_out()
        return False

    def read(self) -> Tensor:
        self._found_out()
        self.compute()
        return self._place


class FinalMembranes:
    """Puts promises into the neurons of one compiled model after its calls, and takes them out before."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self._model, self._calls = model, calls
        self._read: set[tuple[int, str]] = set()  # modules and states that somebody read
        self._loads_watched = False
        self._tables: list[tuple[nn.Module, str, Table]] = []  # where promises are, with the framework's

    @contextmanager
    def promised(self, *inputs: Any) -> Iterator[None]:
        """Context manager: what the call inside leaves in the neurons is promised, where it can be."""
        self._take_out()
        if not torch.is_grad_enabled():
            yield
            return
        fresh = {
            (id(module), key)
            for module, name in _modules(self._model)
            for key, value in dict.items(module.__dict__[name])
            if not isinstance(value, Tensor)
        }
        with self._calls.note() as calls:
            yield
        if calls:
            self._promise(calls, fresh - self._read, inputs)

    def _take_out(self) -> None:
        for module, name, table in self._tables:
            ours = module.__dict__.get(name)
            if isinstance(ours, Memories):
                table.clear()
                table.update(ours.items())  # what was not reset is read by the next step
                module.__dict__[name] = table
            if isinstance(module.__dict__.get("reset"), ForgettingReset):
                del module.__dict__["reset"]
        self._tables.clear()

    def _promise(self, calls: list[Call], fresh: set[tuple[int, str]], inputs: Any) -> None:
        found: dict[Call, list[tuple[nn.Module, str, str, int]]] = {}
        for module, name in _modules(self._model):
            table: Table = module.__dict__[name]
            for key in table:
                if (id(module), key) not in fresh or not _is_alone(table, key):
                    continue
                for call in calls:
                    index, ref = call.outputs.get(id(dict.__getitem__(table, key)), (-1, None))
                    if ref is not None and ref() is dict.__getitem__(table, key):
                        found.setdefault(call, []).append((module, name, key, index))
        alive = {
            id(one) for one in (*self._model.parameters(), *self._model.buffers(), *tree_leaves(inputs))
        }
        for call, places in found.items():
            size = sum(
                dict.__getitem__(module.__dict__[name], key).nbytes for module, name, key, _ in places
            )
            if call.held_beside(alive) >= size:
                continue
            for module, name, key, index in places:
                self._put(module, name, key, (call, index))

    def _put(self, module: nn.Module, name: str, key: str, where: tuple[Call, int]) -> None:
        table = module.__dict__[name]
        if not isinstance(table, Memories):
            self._tables.append((module, name, table))
        memories = promise_among(module, name)
        v = dict.__getitem__(memories, key)
        if table is not memories:
            table[key] = None
        memories[key] = OfRegion(v, *where, functools.partial(self._read.add, (id(module), key)))
        if not self._loads_watched:
            self._loads_watched = True
            self._model.register_load_state_dict_pre_hook(compute_all)


def _modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules with a table that says when it is read, and the attribute that it is."""
    for module in model.modules():
        framework = framework_of(module)
        if framework is None or framework.with_constants or framework.states_of(module) is None:
            continue
        yield module, framework.states_in


def _holders(table: Table, key: str) -> tuple[int, int]:
    """How many hold a tensor of a table, and how many its memory, this function among them."""
    v = dict.__getitem__(table, key)
    return sys.getrefcount(v), torch._C._storage_Use_Count(v.untyped_storage()._cdata)


_ALONE = _holders({"v": torch.zeros(1)}, "v")


def _is_alone(table: Table, key: str) -> bool:
    """Whether a state is an ordinary tensor whose memory only the table holds."""
    v = dict.__getitem__(table, key)
    if type(v) is not Tensor or v._is_view() or not v.is_floating_point():
        return False
    del v
    return _holders(table, key) == _ALONE


def _versions(inputs: Sequence[Any]) -> list[int]:
    return [one._version if isinstance(one, Tensor) and not one.is_inference() else -1 for one in inputs]


def _devices(inputs: Sequence[Any]) -> set[torch.device]:
    return {one.device for one in inputs if isinstance(one, Tensor)}
