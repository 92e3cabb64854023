"""The largest batch that a budget of memory takes, from small ones that are measured.

The one idea: nearly all of a training step's memory is a number of bytes a sample, so that two small
batches, measured, say where the budget ends; what is said is then tried.

Source: this package's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from snn_reversible_plugin.convert import Recorded, settings_of
from snn_reversible_plugin.modules.checks import bytes_of, check_model
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.reports.growth import Growth, Taken, measure
from snn_reversible_plugin.reports.measure import time_step
from snn_reversible_plugin.reports.trial import Loss, Step
from snn_reversible_plugin.tape.choice import what_helps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# NOTE [Which batches are tried]
#
# 1. Two samples, then six; fewer where six might not fit, which take at most three times as much beside
#    parameters and gradients. One sample only where two don't fit, or three might not.
# 2. Then what the two largest that fit foresee, but at most MOST times the largest measured: kernels and
#    slices go other ways in larger batches, and what is foreseen from far below would be guessed.
# 3. What was foreseen, fits and uses ENOUGH of the budget is the answer. Where a trial was over the budget,
#    the next is between it and the largest that fits; where it left much, it is foreseen anew, from it.
#    Where two steps did not do the same, as slices are made by size, the aim is a little below the budget.
# 4. Without a budget of the user's, OF_FREE of the free memory is one: a heap has gaps, and other processes
#    live.

MakeInputs = Callable[[int], Any]
MOST = 8
_SECOND = 6
_TRIALS = 8  # all together
_ENOUGH, _AIM = 0.9, 0.98  # of the budget
OF_FREE = 0.9


@dataclass(frozen=True)
class Fit:
    """A batch that fits.

    Attributes:
        batch: how many samples; 0 where not even one fits.
        peak: bytes at the peak of a training step with that batch, measured: parameters, buffers, their
            gradients and the inputs included, an optimizer's state and other tensors of the process not.
            Where nothing fits, of the smallest that was tried.
        predicted: what smaller batches said of that peak.
        seconds: of a training step with it, forward and backward; the least of three.
        budget: bytes that there were.
        trials: what was measured on the way, in order: batch and bytes at its peak, None where the device
            ran out of memory.
    """

    batch: int
    peak: int
    predicted: int
    seconds: float
    budget: int
    trials: tuple[tuple[int, int | None], ...] = ()


def largest_batch(
    model: nn.Module, make_inputs: MakeInputs, budget: int | str | None = None, *, loss: Loss | None = None
) -> int:
    """How large a batch fits, foreseen from small ones and tried.

    The model is left as it was. One that is converted is measured as it is, any other as stock. Where an
    optimizer steps in the backward, gradients are freed as in training, and no parameter moves.

    Args:
        model: on the device where it is to be trained.
        make_inputs: gives, for a number of samples, what the model is called with: a tensor, a tuple or
            list of positional arguments, or a dict of keyword arguments. A list or dict that is itself the
            one argument goes into a tuple.
        budget: bytes for parameters, buffers, gradients, inputs and all that a step allocates, ``24 << 30``
            or ``"24GiB"``; nine tenths of what is free on the device by default. Leave room for the
            optimizer's state.
        loss: from the model's output to a scalar; the mean of squares of all outputs by default.

    Raises:
        ValueError: a budget that is no number of bytes, or not even one sample fits.
        TypeError: what ``make_inputs`` gives is nothing that a model is called with.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> def build():
        ...     neurons = neuron.LIFNode(step_mode="m")
        ...     return nn.Sequential(layer.Linear(64, 256), neurons, layer.Linear(256, 10))
        >>> def batch_of(size):
        ...     return torch.rand(16, size, 64)
        >>> stock = srp.largest_batch(build(), batch_of, "16MiB")
        >>> stock < srp.largest_batch(srp.convert_to_reversible(build()), batch_of, "16MiB")
        True
    """
    found = fit(model, make_inputs, budget, loss=loss)
    if not found.batch:
        raise ValueError(_refusal(model, found))
    return found.batch


def fit(
    model: nn.Module, make_inputs: MakeInputs, budget: int | str | None = None, *, loss: Loss | None = None
) -> Fit:
    """As :func:`largest_batch`, with what was measured; a batch of 0 where nothing fits."""
    check_model(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    limit = int(OF_FREE * free_memory(device)) if budget is None else bytes_of(budget)
    search = _Search(limit, lambda batch: measure(_step(model, make_inputs, batch, loss), batch, device))
    batch, predicted = search.run()
    if not batch:
        _, peak = min((one, peak) for one, peak in search.trials if peak is not None)
        return Fit(0, peak, peak, 0.0, limit, tuple(search.trials))
    step = _step(model, make_inputs, batch, loss)
    seconds = []
    for _ in range(3):
        with step.unchanged():
            seconds.append(time_step(step.run))
    return Fit(batch, search.fits[batch].peak, predicted, min(seconds), limit, tuple(search.trials))


class _Search:
    """The trials of one search. See the note above.

    Attributes:
        fits: what was measured and is within the limit, by batch.
        over: what is not; None where the device ran out of memory.
        trials: both, in order.
    """

    def __init__(self, limit: int, measured: Callable[[int], Taken]) -> None:
        self._limit, self._measured = limit, measured
        self.fits: dict[int, Taken] = {}
        self.over: dict[int, Taken | None] = {}
        self.trials: list[tuple[int, int | None]] = []

    def run(self) -> tuple[int, int]:
        """The largest batch, 0 where none fits, and what smaller ones said of its peak."""
        if not self._try(2):
            return (1, self.fits[1].peak) if self._try_one() else (0, 0)
        two = self.fits[2]
        second = min(_SECOND, 2 * (self._limit - two.fixed) // max(1, two.grows))
        self._try(second) if second > 2 else self._try_one()
        foreseen: dict[int, int] = {}
        while len(self.trials) < _TRIALS and (growth := self._growth()) is not None:
            largest = max(self.fits)
            wanted = growth.at_most(self._limit if growth.is_known else int(_AIM * self._limit))
            batch = int(min(wanted, MOST * largest, self._below()))
            if batch <= largest:
                break
            foreseen[batch] = growth.at(batch)
            was_far = batch == MOST * largest < wanted
            if self._try(batch) and not was_far and self.fits[batch].peak >= _ENOUGH * self._limit:
                break
        batch = max(self.fits)
        return batch, foreseen.get(batch, self.fits[batch].peak)

    def _try(self, batch: int) -> bool:
        """Whether a batch fits."""
        try:
            taken = self._measured(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            taken = None
        self.trials.append((batch, None if taken is None else taken.peak))
        if taken is None or taken.peak > self._limit:
            self.over[batch] = taken
            return False
        self.fits[batch] = taken
        return True

    def _try_one(self) -> bool:
        try:
            return self._try(1)
        except ValueError:  # a batch norm of one value a channel, which refuses it
            return False

    def _growth(self) -> Growth | None:
        """From the largest batch that fits on, by the smallest that doesn't or the next one below."""
        largest = max(self.fits)
        others = [self.over[min(self.over)]] if self.over else []
        others += [self.fits[one] for one in sorted(self.fits, reverse=True) if one < largest]
        other = next((one for one in others if one is not None), None)
        return None if other is None else Growth(self.fits[largest], other)

    def _below(self) -> float:
        """What a trial may be at most, as one that did not fit says."""
        if not self.over:
            return float("inf")
        batch = min(self.over)
        # How much was wanting nobody says where the device ran out of memory.
        return batch - 1 if self.over[batch] is not None else batch - max(1, batch // 10)


def _step(model: nn.Module, make_inputs: MakeInputs, batch: int, loss: Loss | None) -> Step:
    inputs = make_inputs(batch)
    if isinstance(inputs, torch.Tensor):
        return Step(model, (inputs,), {}, loss)
    if isinstance(inputs, (tuple, list)):
        return Step(model, tuple(inputs), {}, loss)
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return Step(model, (), inputs, loss)
    raise TypeError(
        f"make_inputs gave an object of type {type(inputs).__name__}: give what the model is called with, "
        "a tensor, a tuple or list of positional arguments, or a dict of keyword arguments. Any other "
        "single argument goes into a tuple: (inputs,)."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take, and what its allocator has in reserve."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(f"nobody says what memory is free on {device}: give budget=") from error


def _refusal(model: nn.Module, found: Fit) -> str:
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    steps = any(getattr(one, "_post_accumulate_grad_hooks", None) for one in model.parameters())
    mode = settings_of(model).mode if isinstance(model, Recorded) else None
    smallest = min(batch for batch, peak in found.trials if peak is not None)
    return (
        f"a batch of {smallest} takes {found.peak:,} bytes, and the budget is {found.budget:,}; parameters "
        f"and their gradients are {2 * parameters:,}. {what_helps(mode, steps)}"
    )


@dataclass
class Fits:
    """What :func:`fit` found, as ``(mode, time steps or None, Fit)``; the budget as it was written."""

    asked: str | None = None
    rows: list[tuple[str, int | None, Fit]] = field(default_factory=list)

    @property
    def title(self) -> str:
        free = max((one.budget for _, _, one in self.rows), default=0)
        return f"Largest batches in {self.asked or f'{shown(free)}, which are free'}"

    def table(self) -> Any:
        """As a table for the terminal."""
        from rich.table import Table

        table = Table(title=self.title)
        for column in ("mode", "T", "batch", "peak", "step", "a sample"):
            table.add_column(column, justify="left" if column == "mode" else "right")
        for mode, steps, one in self.rows:
            times = (
                (f"{1e3 * one.seconds:,.0f} ms", f"{1e3 * one.seconds / one.batch:,.2f} ms")
                if one.batch
                else ("", "")
            )
            batch = str(one.batch) if one.batch else "does not fit"
            table.add_row(mode, "" if steps is None else str(steps), batch, shown(one.peak), *times)
        return table

    def plot(self) -> Figure:
        """As bars, a group for each number of time steps. Needs the extra ``plot``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from snn_reversible_plugin.reports.pictures import picture_of_fits

        return picture_of_fits(self)
