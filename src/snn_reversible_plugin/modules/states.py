"""What modules hold besides parameters: neuron states, and whatever else a run may change.

The one idea: a state is found by comparing. Copies of the modules' tables before a run and the tables after
it tell what the run replaced, without a list of names. Source: design section 5.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import is_spiking

# NOTE [Which tables]
#
# 1. A state is what SpikingJelly's `_memories` and the buffers of snnTorch's neurons hold, and any
#    tensor or number among a module's attributes that is another object after the run (a user's
#    `self.v`).
# 2. A neuron's other attributes are scratch: nothing in there is read by its next step.

Key = tuple[int, str]
Table = dict[str, Any]
Change = tuple[Table, str, Any]  # where, and the value then
MISSING: Any = object()
_STATE = (Tensor, int, float, type(None))


class Snapshot:
    """Tables of modules as they are now."""

    __slots__ = ("_tables",)

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tables = [(table, table.copy(), kind) for table, kind in _tables(modules)]

    def changes(self) -> tuple[list[Change], list[Change]]:
        """What is another object now, with its value then: states and attributes, and scratch."""
        changed: list[Change] = []
        scratch: list[Change] = []
        for table, values, kind in self._tables:
            same = list(table) == list(values) and all(map(operator.is_, table.values(), values.values()))
            if same:
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


def _tables(modules: Iterable[nn.Module]) -> Iterator[tuple[Table, str]]:
    for module in modules:
        memories = module.__dict__.get("_memories")
        spiking = is_spiking(module)
        yield module.__dict__, "scratch" if spiking else "attributes"
        if isinstance(memories, dict):
            yield memories, "states"
        if spiking:
            yield module._buffers, "states"


def put(table: Table, key: str, value: Any) -> None:
    """Give a table back what it held."""
    if value is MISSING:
        table.pop(key, None)
    else:
        table[key] = value


def reset_states(module: nn.Module) -> None:
    """Make the neurons of both frameworks fresh."""
    for inner in module.modules():
        if isinstance(inner.__dict__.get("_memories"), dict):
            inner.reset()  # type: ignore[operator]
        elif is_spiking(inner):
            for name in ("mem", "syn", "syn_exc", "syn_inh", "spk"):
                if isinstance(state := inner._buffers.get(name), Tensor):
                    inner._buffers[name] = state.new_zeros(())


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
        for table, kind in _tables(module.modules())
        if kind != "scratch"
        for key, value in table.items()
        if differentiable(value) and value.requires_grad
    ]


def differentiable(value: Any) -> bool:
    """Whether a state can have a gradient."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point()
