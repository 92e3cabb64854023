"""One training step of the user's model on the user's batch, run as often as a report needs.

The one idea: every run starts from the same state and the same random numbers, and leaves none behind.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from snn_reversible_plugin import convert
from snn_reversible_plugin.modules.as_it_ran import unchanged
from snn_reversible_plugin.reports.measure import StepCost, count_step, time_step
from snn_reversible_plugin.reports.timing import TimeRatio, in_turns

Loss = Callable[[Any], torch.Tensor]


@contextmanager
def as_converted(model: nn.Module) -> Iterator[convert.Settings]:
    """The settings of a converted model; another model is converted for the time being."""
    if isinstance(model, convert.Recorded):
        yield convert.settings_of(model)
        return
    convert.convert_to_reversible(model)
    try:
        yield convert.settings_of(model)
    finally:
        convert.restore(model)


@dataclass(frozen=True)
class Step:
    """A training step of a model: what it is called with, and its loss.

    Without a loss of the user's it is the mean of squares of all outputs that have a gradient.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss | None = None

    def forward(self) -> Any:
        """What the model returns."""
        return self.model(*self.inputs, **self.kwargs)

    def loss_of(self, output: Any) -> torch.Tensor:
        """The loss of what the model returned.

        Raises:
            ValueError: no output has a gradient.
        """
        if self.loss is not None:
            return self.loss(output)
        terms = [tensor.abs().float().square().mean() for tensor in differentiable(output)]
        if not terms:
            raise ValueError(
                "no output of the model has a gradient: are all parameters frozen, or is grad mode off?"
            )
        return torch.stack(terms).sum()

    def run(self) -> torch.Tensor:
        """Forward and loss."""
        return self.loss_of(self.forward())

    def leaves(self) -> list[torch.Tensor]:
        """The inputs that gather a gradient."""
        inputs = tensors_in((self.inputs, self.kwargs))
        return [tensor for tensor in inputs if tensor.requires_grad and tensor.is_leaf]

    @contextmanager
    def unchanged(self, *, reads_gradients: bool = False) -> Iterator[None]:
        """Context manager: afterwards the model is as it was, and so are gradients of inputs."""
        gradients = [(leaf, leaf.grad) for leaf in self.leaves()]
        for leaf, _ in gradients:
            leaf.grad = None
        try:
            with unchanged(self.model, reads_gradients=reads_gradients), _same_draws():
                yield
        finally:
            for leaf, gradient in gradients:
                leaf.grad = gradient

    def alive(self) -> Iterable[torch.Tensor]:
        """The tensors that live anyway: parameters, buffers, inputs."""
        return (*self.model.parameters(), *self.model.buffers(), *tensors_in((self.inputs, self.kwargs)))


@contextmanager
def _same_draws() -> Iterator[None]:
    """Context manager: afterwards the generators of Python and of numpy are where they were."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in what a model takes or returns: nested, in data classes too."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, one.name) for one in fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
    return found


def differentiable(output: Any) -> list[torch.Tensor]:
    """The tensors of a nested output that have a gradient."""
    return [tensor for tensor in tensors_in(output) if tensor.requires_grad]


def costs(step: Step, rounds: int | None = None) -> tuple[StepCost, StepCost, TimeRatio]:
    """The cost of a step, stock and converted, and the ratio of their times, see :func:`.timing.in_turns`.

    Stock's backward runs stock, too: a checkpoint runs its part of the network again in it.
    """
    around: list[Callable[[], AbstractContextManager[None]]] = [
        lambda: convert.stock(step.model),
        nullcontext,
    ]
    # The steps that are counted warm up those that are timed.
    bytes_of = [_within(step, one, count_step)() for one in around]
    stock, converted = in_turns([_within(step, one, time_step) for one in around], rounds)
    before, after = (
        StepCost(held, peak, statistics.median(seconds))
        for (held, peak), seconds in zip(bytes_of, (stock, converted), strict=True)
    )
    return before, after, TimeRatio.of(converted, stock)


def _within(
    step: Step, around: Callable[[], AbstractContextManager[None]], measure: Callable[..., Any]
) -> Callable[[], Any]:
    """Measures the step, as it runs inside of a context, and leaves the model as it was."""

    def measured() -> Any:
        with step.unchanged(), around():
            return measure(step.run)

    return measured
