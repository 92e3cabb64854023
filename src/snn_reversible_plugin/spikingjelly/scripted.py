"""Neurons whose charge or reset TorchScript compiles (SpikingJelly 0.0.0.0.14), run twice with one graph.

The one idea: TorchScript runs a function as it is written at first, and later in a graph of its own, which
saves other tensors for the backward. A second run stands in for the first only if both have the same nodes,
so a function is run on a few numbers until that has settled, or runs as it is written both times.

Source: the profiling executor of TorchScript, ``torch/csrc/jit/runtime/profiling_graph_executor_impl.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import is_multi_step, spikingjelly_root
from snn_reversible_plugin.modules.states import states_of
from snn_reversible_plugin.neurons.rerun import shadow
from snn_reversible_plugin.neurons.witness import alone

Call = Callable[..., Any]

# NOTE [When a function has settled]
#
# 1. It depends on which inputs have a gradient, and on nothing else on a CPU: the first step of a sequence
#    (no gradient into the membrane) is another case than the later ones; three steps are run, five times.
# 2. Of a user's subclass nobody knows which cases there are: it runs as it is written.
# 3. Whatever was missed shows in the names of the nodes, which are compared; a difference is an error.
_settled: set[Any] = set()


def same_graph(module: nn.Module, call: Call, args: tuple[Any, ...]) -> Call:
    """``call``, so that its graph is the same whenever it is run."""
    if not _settle(module, call, args):
        call = _as_written(call)
    return _Compared(call)


class _Compared:
    """A call whose graph has the same nodes each time."""

    __slots__ = ("_call", "_nodes")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._nodes: int | None = None

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values(), *(states_of(module) or {}).values())
        ends = {value.grad_fn for value in given if isinstance(value, Tensor)}
        out = self._call(module, *args, **kwargs)
        nodes = _nodes(out, ends)
        if self._nodes not in (None, nodes):
            raise RuntimeError(
                f"{type(module).__name__}: TorchScript ran its code in another graph when it was run "
                "again; leave the module out with skip=."
            )
        self._nodes = nodes
        return out


def _as_written(call: Call) -> Call:
    def plain(*args: Any, **kwargs: Any) -> Any:
        with torch.jit.optimized_execution(False):
            return call(*args, **kwargs)

    return plain


def _settle(module: nn.Module, call: Call, args: tuple[Any, ...]) -> bool:
    """Let TorchScript come to its final graph for a neuron as it is set; whether that can be done."""
    known = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("snn_reversible_plugin.")]
    if not spikingjelly_root(known[0]) or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    (x,) = args
    states = states_of(module) or {}
    settings = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
    )
    learns = tuple(isinstance(value, Tensor) and value.requires_grad for value in states.values())
    key = (known[0], settings, x.requires_grad, x.dtype, x.device, learns, torch.is_grad_enabled())
    if key in _settled:
        return True
    with alone():
        steps = (3, 2) if is_multi_step(module) else (2,)
        for _ in range(5):
            twin = shadow(module)
            inner = states_of(twin) or {}
            for name, value in inner.items():
                if isinstance(value, Tensor):
                    inner[name] = value.new_zeros(2).requires_grad_(value.requires_grad)
            for _ in range(1 if is_multi_step(module) else 3):
                call(twin, x.new_zeros(steps).requires_grad_(x.requires_grad))
    _settled.add(key)
    return True


def _nodes(out: Any, ends: set[Any]) -> int:
    """A hash of the names of the nodes between a call's output and what it was given."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    waiting = [first.grad_fn] if isinstance(first, Tensor) and first.grad_fn is not None else []
    met, names = {*ends, *waiting}, []
    while waiting:
        node = waiting.pop()
        if not node.name().endswith("AccumulateGrad"):  # an input is a leaf when the call is run again
            names.append(node.name())
        for following, _ in node.next_functions:
            if following is not None and following not in met:
                met.add(following)
                waiting.append(following)
    return hash(tuple(names))
