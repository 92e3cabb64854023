"""What a network carries from one time step to the next: cut from its graph, put back, watched.

The one idea: a state is whatever a step leaves in a module, a SpikingJelly memory, a snnTorch membrane or
an attribute of the user's own, with a graph behind it; cutting it there is the same for all of them. The
watch makes sure that the steps are steps: a forward that starts its states anew, or that loops over time
by itself, would train on something else without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import framework_of, is_multi_step, is_neuron
from snn_reversible_plugin.modules.states import (
    OF_TORCH,
    Contents,
    Snapshot,
    cut_inside,
    has_graph,
    holds_states,
    states_of,
)

# What a module holds: for each place and name the value, and a stamp that changes with its content.
_Held = dict[tuple[int, str], tuple[Any, Any]]

_CUT = (Tensor, list, tuple, dict)

_EITHER_WAY = (
    "Take the start of the states out of forward, or write forward(x, *states) -> (output, *states) and "
    "give the first states with states="
)


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._buffers, module.__dict__


def _entries(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in table.items() if key not in OF_TORCH)


class CarriedStates:
    """The states that the modules of a model hold between two calls."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._tables = [table for module in self._modules for table in _tables(module)]
        # A value that someone computed before the sequence (a weight that was quantized once, say) is no
        # state of a step; a neuron's is.
        self._before: dict[int, Any] = {}
        for module in self._modules:
            if not holds_states(module):
                for table in _tables(module):
                    for _, value in _entries(table):
                        if has_graph(value):
                            self._before[id(value)] = value

    def cut(self) -> None:
        """Cut every state from the graph of the steps before."""
        for table in self._tables:
            for key, value in _entries(table):
                if isinstance(value, _CUT) and id(value) not in self._before:
                    cut_inside(table, key)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """An exception inside leaves the states that were there on entering."""
        before, contents = Snapshot(self._modules, buffers=True), Contents(self._modules)
        try:
            yield
        except BaseException:
            before.put_back()
            contents.put_back()
            raise


def refuse_time_mixing(model: nn.Module, states_given: bool) -> None:
    """Refuse modules whose result at one step needs the other steps' inputs."""
    for name, module in model.named_modules():
        framework = framework_of(module)
        if (framework is not None and framework.is_never_stepped(module)) or (
            isinstance(module, nn.RNNBase) and not states_given
        ):
            raise ValueError(
                f"{name or 'the model'}: a {type(module).__name__} computes a whole sequence at once, and "
                "back-propagation step by step gives it one step at a time. Replace it, or train with an "
                "ordinary backward on srp.convert_to_reversible(model)."
            )


class Watch:
    """Context manager for one of the first two steps: each neuron must take one step, from its own state.

    Two steps tell; nothing of this stays in the model after them.
    """

    def __init__(self, model: nn.Module, states_given: bool) -> None:
        self._neurons = {m: name or "the model" for name, m in model.named_modules() if holds_states(m)}
        self._states_given = states_given
        self._left: dict[nn.Module, _Held] = {}
        self._storages: set[int] = set()
        self._calls: dict[nn.Module, int] = {}

    def __enter__(self) -> None:
        self._calls = dict.fromkeys(self._neurons, 0)
        self._entered = {module: self._held(module) for module in self._neurons}
        self._hooks = [
            module.register_forward_pre_hook(self._about_to_run, with_kwargs=True)
            for module in self._neurons
        ]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is not None:
            return
        for module, name in self._neurons.items():
            if not self._calls[module] or self._states_given:
                continue
            if is_neuron(module) and not self._changed(module):
                raise ValueError(
                    f"{name}: a {type(module).__name__}"
                    f"{_in_step_mode(module)} carries no state from one call to the next, so "
                    "it can't be run step by step. Replace it, or train with an ordinary backward."
                )

    def note_states(self, model: nn.Module) -> None:
        """After the cut: what the next step has to start from."""
        self._left = {module: self._changed(module) for module in self._neurons}
        self._storages = {
            value.untyped_storage().data_ptr()
            for module in model.modules()
            for table in _tables(module)
            for _, value in _entries(table)
            if isinstance(value, Tensor)
        }

    @staticmethod
    def _held(module: nn.Module) -> _Held:
        held: _Held = {}
        for place, table in enumerate((*_tables(module), states_of(module) or {})):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    held[place, key] = value, 0 if value.is_inference() else value._version
                elif place == 2:  # a list of tensors, a number of steps
                    held[place, key] = value, [*map(id, value)] if isinstance(value, list) else None
        return held

    def _changed(self, module: nn.Module) -> _Held:
        """What the step has put into a module."""
        before = self._entered[module]
        return {key: held for key, held in self._held(module).items() if not _same(held, before.get(key))}

    def _about_to_run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._neurons[module]
        self._calls[module] += 1
        inputs = args[0] if args else None
        steps = inputs.shape[0] if isinstance(inputs, Tensor) and inputs.dim() else 1
        if steps != 1 and is_multi_step(module):
            raise ValueError(
                f"{name} got {steps} time steps where x_seq had one: the model's forward makes "
                "a sequence of its own. Give the sequence as x_seq, to a model that takes one."
            )
        if self._states_given:
            return
        if self._calls[module] > 1:
            raise ValueError(
                f"{name} ran more than once in one step of x_seq: the model's forward loops over time "
                "itself. If it takes a sequence [T, N, ...] and carries its states over to the next call, "
                f"give step_mode='m'. {_EITHER_WAY}."
            )
        held = self._held(module)
        given = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)]
        framework = framework_of(module)
        if framework is not None and framework.takes_states and given:
            anew = self._left and any(
                value.numel() and value.untyped_storage().data_ptr() not in self._storages
                for value in given
            )
        else:
            left = self._left.get(module, {})
            anew = not all(_same(held.get(key), value) for key, value in left.items())
        if anew:
            raise ValueError(
                f"{name} did not start from the state that the step before left: the model's forward "
                f"starts its states anew. {_EITHER_WAY}."
            )


def _same(a: tuple[Any, Any] | None, b: tuple[Any, Any] | None) -> bool:
    return a is not None and b is not None and a[0] is b[0] and a[1] == b[1]


def _in_step_mode(module: nn.Module) -> str:
    mode = getattr(module, "step_mode", None)
    return "" if mode is None else f" in step mode {mode!r}"
