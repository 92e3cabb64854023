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
from torch.utils._pytree import tree_map

from snn_reversible_plugin.modules.kinds import is_spiking

_OF_TORCH = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, tuple, dict)

# What a module holds: for each place and name the value, and a stamp that changes with its content.
_Held = dict[tuple[int, str], tuple[Any, Any]]

_EITHER_WAY = (
    "Take the start of the states out of forward, or write forward(x, *states) -> (output, *states) and "
    "give the first states with states="
)


def cut(value: Any) -> Any:
    """A state, or a nested one, without its graph. A leaf (a learned initial state) stays as it is."""
    return tree_map(lambda leaf: leaf.detach() if _has_graph(leaf) else leaf, value)


def _has_graph(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._buffers, module.__dict__


def _entries(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in table.items() if key not in _OF_TORCH)


class CarriedStates:
    """The states that the modules of a model hold between two calls."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = [table for module in model.modules() for table in _tables(module)]
        # A value that someone computed before the sequence (a weight that was quantized once, say) is no
        # state of a step; a neuron's is.
        self._before: dict[int, Any] = {}
        for module in model.modules():
            if not holds_states(module):
                for table in _tables(module):
                    for _, value in _entries(table):
                        if _has_graph(value):
                            self._before[id(value)] = value

    def cut(self) -> None:
        """Cut every state from the graph of the steps before."""
        for table in self._tables:
            for key, value in table.items():
                if isinstance(value, Tensor):
                    if value.grad_fn is not None and id(value) not in self._before:
                        table[key] = value.detach()
                elif isinstance(value, _CONTAINERS) and key not in _OF_TORCH:
                    _cut_inside(table, key)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """An exception inside leaves the states that were there on entering."""
        saved = [
            (table, {key: (value, _shallow(value)) for key, value in _entries(table)})
            for table in self._tables
        ]
        try:
            yield
        except BaseException:
            for table, entries in saved:
                for key in [key for key, _ in _entries(table) if key not in entries]:
                    del table[key]
                for key, (value, content) in entries.items():
                    if isinstance(value, list):
                        value[:] = content
                    elif isinstance(value, dict):
                        value.clear()
                        value.update(content)
                    table[key] = value
            raise


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else None


def _cut_inside(container: Any, key: Any) -> None:
    """Cut what ``container[key]`` holds, in place, since others may hold the same list."""
    value = container[key]
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            container[key] = value.detach()
    elif isinstance(value, list):
        for index in range(len(value)):
            _cut_inside(value, index)
    elif isinstance(value, dict):
        for inner in value:
            _cut_inside(value, inner)
    elif isinstance(value, tuple):
        container[key] = cut(value)


def holds_states(module: nn.Module) -> bool:
    """Whether a module is a neuron, or another of SpikingJelly's modules with a memory."""
    return _is_neuron(module) or isinstance(module.__dict__.get("_memories"), dict)


def _is_neuron(module: nn.Module) -> bool:
    """Also those of SpikingJelly's that are not derived from one of its base neurons."""
    home = "spikingjelly.activation_based.neuron."
    return is_spiking(module) or any(cls.__module__.startswith(home) for cls in type(module).__mro__)


def refuse_time_mixing(model: nn.Module, states_given: bool) -> None:
    """Refuse modules whose result at one step needs the other steps' inputs."""
    for name, module in model.named_modules():
        modes = getattr(module, "supported_step_mode", lambda: ())()
        container = isinstance(module, nn.Sequential) or "ThresholdDependent" in type(module).__name__
        if (tuple(modes) == ("m",) and not container) or (
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
            if _is_neuron(module) and not self._changed(module):
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
        for place, table in enumerate((*_tables(module), module.__dict__.get("_memories") or {})):
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
        multi_step = getattr(module, "step_mode", "s") == "m"
        if multi_step and isinstance(inputs, Tensor) and inputs.dim() and inputs.shape[0] != 1:
            raise ValueError(
                f"{name} got {inputs.shape[0]} time steps where x_seq had one: the model's forward makes "
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
        if is_spiking(module) and hasattr(module, "init_hidden") and given:
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
