"""Memory over one training step, by layer, and what stands at its peak.

The one idea: the allocator's events, with a mark among them wherever a module begins: in the forward by a
hook of the module's, in the backward by one of the graph node that computed its output, where the layer's
gradient begins. A block of memory that is alive at the peak is then told by its life: whether it was there
when the forward ended, is a parameter's gradient when all is over, or died inside the operator that asked
for it.

Source: this package's own.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin.modules.tracking import tracked
from snn_reversible_plugin.ops.allocations import Allocation, mark
from snn_reversible_plugin.ops.layouts import parts_in_memory
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.reports.trial import tensors_in
from snn_reversible_plugin.training.step_in_backward import SteppedGradient

_FORWARD, _TURN, _BACKWARD = "forward", "turn", "backward"


@dataclass
class Part:
    """What one module does at a time: ``curve`` are the bytes alive at each of the allocator's events in
    it.

    ``module`` is ``"model"`` in the model's own code, and empty in the loss's.
    """

    module: str
    backward: bool
    curve: list[int] = field(default_factory=list)


@dataclass
class Peak:
    """What is alive when the most is, in bytes.

    ``module`` runs then, or its backward does. ``held``: what lived, or goes on to live, from the forward
    into the backward. ``gradients``: the parameters' that stand already. ``tensors``: the rest, by the
    operator that made them, and ``workspaces``: what operators take for themselves while they run, by
    operator.
    """

    module: str
    backward: bool
    held: int
    gradients: int
    tensors: dict[str, int]
    workspaces: dict[str, int]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.causes().values())

    def causes(self) -> dict[str, int]:
        """Bytes by cause, for people, the largest first."""
        tensors = {f"{operator}'s result": size for operator, size in self.tensors.items()}
        workspaces = {f"{operator}'s workspace": size for operator, size in self.workspaces.items()}
        found = {"held": self.held, "parameters' gradients": self.gradients, **tensors, **workspaces}
        return dict(sorted(found.items(), key=lambda cause: -cause[1]))

    @property
    def where(self) -> str:
        """What runs, for people."""
        name = self.module or "the loss"
        return f"backward of {name}" if self.backward else name


@dataclass
class OverStep:
    """The parts of one training step in their order, and the peak of it. Made by :func:`over_step`."""

    parts: list[Part]
    peak: Peak


def over_step(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> OverStep:
    """Run one forward and backward of ``model`` on a CPU, and count.

    Args:
        model: whose modules are named. Parameters' gradients it has are set aside, and are back afterwards.
        loss_of: runs the forward and returns a scalar loss.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
        >>> found = over_step(net, lambda: net(torch.rand(512, 64)).sum())
        >>> [part.module for part in found.parts if part.backward], found.peak.backward
        (['', '2', '1', '0'], True)
    """
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    gc.collect()
    try:
        with _Recording() as recording, _Marks() as marks, tracked(model, marks):
            loss = loss_of()
            marks.turn()
            loss.backward()
            del loss
            assert recording.live >= 0  # brings the events up to date
            return recording.read([p.grad for p in gradients if p.grad is not None])
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


class _Recording(AllocationCounter):
    """Keeps every event with its birth, and the marks between them."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[Allocation] = []
        self._starts = [(0, "", False)]  # after how many events which module began, and whether backward
        self._turn = 0  # how many events there were when the forward was over

    def count(self, event: Allocation) -> None:
        super().count(event)
        if not event.size:
            direction, _, module = event.operator.partition(" ")
            self._starts.append((len(self._events), module, direction != _FORWARD))
            if direction == _TURN:
                self._turn = len(self._events)

    def _change(self, birth: int, size: int, event: Allocation) -> None:
        super()._change(birth, size, event)
        self._events.append(event)

    def read(self, gradients: list[torch.Tensor]) -> OverStep:
        """Parts and peak, at the end of a step that left these gradients."""
        curve, live = [], 0
        born: dict[int, int] = {}
        died: dict[int, int] = {}
        for at, (birth, size) in enumerate(self._changes):
            live += size
            curve.append(live)
            (born if size > 0 else died)[birth] = at
        top = max(range(len(curve)), key=curve.__getitem__, default=-1)
        starts = self._starts
        parts = []
        for (start, module, backward), (end, *_) in zip(
            starts, [*starts[1:], (len(curve), "", True)], strict=True
        ):
            before = curve[start - 1] if start else 0
            parts.append(Part(module, backward, [before, *curve[start:end]]))
        running = max((at for at, (start, *_) in enumerate(starts) if start <= top), default=0)
        peak = Peak(starts[running][1], starts[running][2], 0, 0, {}, {})
        left = {
            part.untyped_storage().data_ptr() for gradient in gradients for part in _dense_parts(gradient)
        }
        of_parameters = {self._blocks[address][0] for address in left if address in self._blocks}
        tensors: Counter[str] = Counter()
        workspaces: Counter[str] = Counter()
        for birth, at in born.items():
            end = died.get(birth, len(curve))
            if at > top or end <= top:
                continue
            size, event = self._changes[at][1], self._events[at]
            if birth in of_parameters:
                peak.gradients += size
            elif at < self._turn <= end:
                peak.held += size
            elif end < len(curve) and self._events[end].time <= event.operator_ends:
                workspaces[event.operator] += size
            else:
                tensors[event.operator or "outside of operators"] += size
        peak.tensors, peak.workspaces = dict(tensors.most_common()), dict(workspaces.most_common())
        return OverStep([part for part in parts if len(part.curve) > 1], peak)


class _Marks:
    """Marks where modules begin, forward and backward: a tracker, see :func:`tracked`."""

    def __init__(self) -> None:
        self._where: str | None = None
        self._backward = False
        self._hooks = ExitStack()

    @property
    def where(self) -> str | None:
        return self._where

    @where.setter
    def where(self, name: str | None) -> None:
        self._where = name
        if not self._backward:
            mark(f"{_FORWARD} {name or ''}")

    def __enter__(self) -> _Marks:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def turn(self) -> None:
        """The forward is over."""
        self._backward = True
        mark(f"{_TURN} ")

    def left(self, name: str, output: Any) -> None:
        """A module has run: its backward begins with the node of its output."""
        for tensor in () if self._backward else tensors_in(output):
            node: Any = tensor.grad_fn
            if node is not None and node.metadata.setdefault(_BACKWARD, name) is name:
                hook = node.register_prehook(lambda _: self._begin_backward(name))
                self._hooks.callback(hook.remove)

    def _begin_backward(self, name: str) -> None:
        if self._backward:  # a chain that tries its branches runs a backward in its forward
            mark(f"{_BACKWARD} {name}")


def _dense_parts(gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors with a storage that a gradient is made of."""
    is_freed = isinstance(gradient, SteppedGradient)
    return () if is_freed else parts_in_memory(gradient)
