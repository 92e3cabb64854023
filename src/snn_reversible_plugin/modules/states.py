"""What modules hold besides parameters, above all states: found, copied, put back, cut from a graph.

The one idea: a state is found by comparing. Copies of the modules' tables before a run and the tables after
it tell what the run replaced, without a list of names. Source: the state tables of SpikingJelly's
``MemoryModule`` and snnTorch's buffers (:mod:`.kinds`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from snn_reversible_plugin.modules.kinds import (
    Table,
    framework_of,
    is_neuron,
    is_spiking,
)
from snn_reversible_plugin.ops.layouts import numbers_in

# NOTE [Which tables]
#
# 1. A state is what the framework's table of states holds, and any tensor or number among a module's
#    attributes that is another object after the run (a user's `self.v`).
# 2. A neuron's other attributes are scratch: nothing in there is read by its next step.
# 3. Other modules' buffers are statistics. A run as it was writes to copies of them (a branch that runs
#    again) or puts them back, if they are asked for.

Key = tuple[int, str]
Change = tuple[Table, str, Any]  # where, and the value then
MISSING: Any = object()
OF_TORCH = frozenset(nn.Module().__dict__)  # attributes that every module has
_STATE = (Tensor, int, float, type(None))


def states_of(module: nn.Module) -> Table | None:
    """The table in which a module of a known framework keeps its states; None if it keeps none."""
    framework = framework_of(module)
    return None if framework is None else framework.states_of(module)


def holds_states(module: nn.Module) -> bool:
    """Whether a module is a neuron, or another of a framework's modules with states."""
    return is_neuron(module) or states_of(module) is not None


def tables_of(module: nn.Module) -> list[Table]:
    """Where a module holds what is no parameter and no module."""
    states = states_of(module)
    # The buffers of a scripted module are in no dictionary: they change in place only.
    tables = [table for table in (module._buffers, module.__dict__) if isinstance(table, dict)]
    return tables if states is None or states is module._buffers else [*tables, states]


def stored_buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers of a model and its modules without those that are promised: they are nobody's yet."""
    for module in model.modules():
        table = module._buffers
        values = dict.values(table) if isinstance(table, dict) else module.buffers(recurse=False)
        yield from (value for value in values if isinstance(value, Tensor))


class Snapshot:
    """Tables of modules as they are now; with ``buffers`` also those of modules that are no neurons."""

    __slots__ = ("_tables",)

    def __init__(self, modules: Iterable[nn.Module], *, buffers: bool = False) -> None:
        # As they are stored: a final membrane that nobody has read need not be computed.
        self._tables = [
            (table, dict(table.items() if kind == "attributes" else dict.items(table)), kind)
            for table, kind in _tables(modules, buffers)
        ]

    def changes(self) -> tuple[list[Change], list[Change]]:
        """What is another object now, with its value then: states and attributes, and scratch."""
        changed: list[Change] = []
        scratch: list[Change] = []
        for table, values, kind in self._tables:
            if list(table) == list(values) and all(map(operator.is_, table.values(), values.values())):
                continue
            for key in {**values, **table}:
                then, now = values.get(key, MISSING), table.get(key, MISSING)
                if then is not now and (isinstance(then, _STATE) or isinstance(now, _STATE)):
                    (scratch if kind == "scratch" else changed).append((table, key, then))
        return changed, scratch

    def read(self, changes: Sequence[Change]) -> list[Change]:
        """What may have been read and is still the same: a dropout mask for all time steps, say."""
        changed = {(id(table), key) for table, key, _ in changes}
        return [
            (table, key, value)
            for table, values, kind in self._tables
            for key, value in values.items()
            if (isinstance(value, Tensor) or (kind == "states" and isinstance(value, _STATE)))
            and (id(table), key) not in changed
        ]

    def put_back(self) -> None:
        """Give every table the objects that it held."""
        for table, values, _ in self._tables:
            if list(table) == list(values) and all(map(operator.is_, dict.values(table), values.values())):
                continue
            for key in [key for key in table if key not in values]:
                dict.__delitem__(table, key)
            table.update(values)


def _tables(modules: Iterable[nn.Module], buffers: bool) -> Iterator[tuple[Table, str]]:
    for module in modules:
        spiking, states = is_spiking(module), states_of(module)
        yield module.__dict__, "scratch" if spiking else "attributes"
        if states is not None:
            yield states, "states"
        if buffers and states is not module._buffers and isinstance(module._buffers, dict):
            yield module._buffers, "statistics"


def put(table: Table, key: str, value: Any) -> None:
    """Give a table back what it held."""
    if value is MISSING:
        table.pop(key, None)
    else:
        table[key] = value


class Contents:
    """What is inside the containers that modules hold, and with ``tensors`` inside their tensors."""

    __slots__ = ("_copies",)

    def __init__(self, modules: Iterable[nn.Module], *, tensors: bool = False) -> None:
        copies: dict[int, tuple[Any, Any]] = {}
        for module in modules:
            tables = tables_of(module)
            for table in tables:
                for key, value in table.items():
                    if key not in OF_TORCH and not any(value is other for other in tables):
                        _copy(value, copies, tensors)
            if not isinstance(module._buffers, dict):
                for buffer in module.buffers(recurse=False):
                    _copy(buffer, copies, tensors)
        self._copies = list(copies.values())

    def put_back(self) -> None:
        """Give every container and tensor the content that it had."""
        for value, content in self._copies:
            if isinstance(value, list):
                value[:] = content
            elif isinstance(value, dict):
                value.clear()
                value.update(content)
            elif not torch.equal(numbers_in(value.detach()), numbers_in(content)):
                with torch.no_grad():
                    value.copy_(content)


def _copy(value: Any, copies: dict[int, tuple[Any, Any]], tensors: bool) -> None:
    if id(value) in copies:
        return
    if isinstance(value, Tensor):
        if tensors and not isinstance(value, nn.Parameter):
            copies[id(value)] = value, value.detach().clone()
        return
    if isinstance(value, (list, dict)):
        copies[id(value)] = value, value.copy()
    if isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            _copy(inner, copies, tensors)


def has_graph(value: Any) -> bool:
    """Whether a value is a tensor that was computed from others."""
    return isinstance(value, Tensor) and value.grad_fn is not None


def cut(value: Any) -> Any:
    """A state, or a nested one, without its graph. A leaf (a learned initial state) stays as it is."""
    return tree_map(lambda leaf: leaf.detach() if has_graph(leaf) else leaf, value)


def cut_inside(container: Any, key: Any) -> None:
    """Cut what ``container[key]`` holds, in place, since others may hold the same list."""
    value = container[key]
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            container[key] = value.detach()
    elif isinstance(value, list):
        for index in range(len(value)):
            cut_inside(value, index)
    elif isinstance(value, dict):
        for inner in value:
            cut_inside(value, inner)
    elif isinstance(value, tuple):
        container[key] = cut(value)


def reset_states(module: nn.Module) -> None:
    """Make the modules inside that have states fresh."""
    for inner in module.modules():
        framework = framework_of(inner)
        if framework is not None and framework.states_of(inner) is not None:
            framework.reset(inner)


@contextmanager
def fresh_states(module: nn.Module) -> Iterator[None]:
    """Start the neurons fresh, and leave them fresh: a whole simulation inside."""
    reset_states(module)
    try:
        yield
    finally:
        reset_states(module)


def state_tensors(module: nn.Module) -> list[tuple[Key, Tensor]]:
    """The states, as they are, that have a gradient."""
    return [
        ((id(table), key), value)
        for table, kind in _tables(module.modules(), False)
        if kind != "scratch"
        for key, value in table.items()
        if differentiable(value) and value.requires_grad
    ]


def differentiable(value: Any) -> bool:
    """Whether a state can have a gradient."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point()
