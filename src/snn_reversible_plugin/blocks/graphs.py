"""The graph of a module's forward, traced with its parts as they are called, and nothing touched.

The one idea: what is traced is a replica with the same classes and settings, whose tensors have no values.
A forward that changes anything while it is traced says more than its graph does, and has none.

Source: ``torch.fx``, Reed et al., MLSys 2022.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from snn_reversible_plugin.modules.kinds import framework_of


def _modes() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


class Tracer(fx.Tracer):
    """Takes parts as leaves. ``opens``: but those that are of no library."""

    def __init__(self, opens: bool) -> None:
        super().__init__(autowrap_functions=())
        self._opens = opens
        self._modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:  # no_grad and autocast leave nothing in a graph
            raise RuntimeError("a forward that changes a mode is more than a graph")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not (self._opens and is_of_a_user(m))


_STATISTICS = frozenset(
    ["running_mean", "running_var", "buffers", "named_buffers", "_buffers", "state_dict"]
)


class _OfTwo(fx.Proxy):
    def __len__(self) -> int:
        return 2


class TracerOfCalls(Tracer):
    """For the order of calls alone: a sequence of unknown length is taken to have two parts."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _OfTwo(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            return iter([obj[0], obj[1]])  # type: ignore[index]


def graph_of(block: nn.Module, training: bool, tracer: fx.Tracer) -> fx.Graph | None:
    """The graph of a forward that takes one thing, traced without values; None where it can't be traced.

    But for the order of calls, a forward that changes anything but what it computes can't.
    """
    kind = type(block)
    try:
        needed = [
            parameter
            for parameter in list(inspect.signature(kind.forward).parameters.values())[1:]
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
    except (TypeError, ValueError):
        return None
    if len(needed) != 1:
        return None
    of_calls = isinstance(tracer, TracerOfCalls)
    twin = _replica(block, {}, may_reset=of_calls)
    twin.__class__ = type(kind.__name__, (kind,), {"forward": lambda self, x: kind.forward(self, x)})
    for module in twin.modules():
        module.training = training
    before = _settings(twin)
    try:
        with torch.random.fork_rng(devices=[]):
            graph = tracer.trace(twin)
    except Exception:  # whatever somebody's forward does with what is no tensor
        return None
    return graph if of_calls or _settings(twin) == before else None


def is_of_a_user(module: nn.Module) -> bool:
    """Whether a module's class is neither torch's nor a framework's."""
    return framework_of(module) is None and not _is_of_a_library(type(module))


def _is_of_a_library(cls: type) -> bool:
    return cls.__module__.startswith(("torch.", "snn_reversible_plugin.", "builtins"))


@functools.cache
def reads_statistics(cls: type) -> bool:
    """Whether a method of a user's class names a norm's running statistics, or all buffers.

    Example:
        >>> class Centred(nn.BatchNorm1d):
        ...     __module__ = "my_norms"
        ...     def forward(self, x):
        ...         return super().forward(x) + self.running_mean
        >>> reads_statistics(Centred), reads_statistics(nn.BatchNorm1d)
        (True, False)
    """
    methods = (one for base in cls.__mro__ if not _is_of_a_library(base) for one in vars(base).values())
    codes = (one.__code__ for one in methods if inspect.isfunction(one))
    return any(_STATISTICS & {*code.co_names, *code.co_consts} for code in codes)


def _settings(twin: nn.Module) -> list[tuple[Any, ...]]:
    """All that a forward could change of modules, their tensors' versions among it."""
    tables = (
        (key, value)
        for module in twin.modules()
        for table in (module.__dict__, *(one for one in module.__dict__.values() if isinstance(one, dict)))
        for key, value in table.items()
    )
    return [(key, *_as_it_is(value)) for key, value in tables]


def _as_it_is(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (int, float, str)):
        return (value,)
    size = len(value) if isinstance(value, (dict, list, set)) else 0
    return id(value), size, getattr(value, "_version", 0)


def _no_reset(*_args: Any, **_kwargs: Any) -> None:
    raise RuntimeError("a forward that resets its neurons is more than a graph")


def _replica(module: nn.Module, memo: dict[int, nn.Module], may_reset: bool) -> nn.Module:
    """Modules of the same classes and settings, without values and hooks."""
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    table = {key: _without_values(value) for key, value in module.__dict__.items()}
    table["_modules"] = {
        name: None if child is None else _replica(child, memo, may_reset)
        for name, child in module._modules.items()
    }
    if not may_reset and framework_of(module) is not None:
        table |= {name: _no_reset for name in ("reset", "reset_mem") if hasattr(type(module), name)}
    twin.__dict__.update(table)
    return twin


def _without_values(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, dict):
        twin = copy.copy(value)
        for key, inner in value.items():
            twin[key] = _without_values(inner)
        return twin
    return copy.copy(value) if isinstance(value, (list, set)) else value
