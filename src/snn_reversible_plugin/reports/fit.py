"""The largest batch that a budget of memory takes, from two small ones.

The one idea: nearly all of a training step's memory is a number of bytes a sample, so that two small
batches, measured, say where the budget ends; what is said is then tried once. The peak is the largest of
several sums, one a layer, each growing by its own rate: a larger batch may take more than a line through
two small ones says. One whose layers are sliced may take less, as small batches are not. So where the trial
is over the budget, or leaves much of it, the line through it and the batch before says what to try next.

Source: this package's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from snn_reversible_plugin.modules.checks import bytes_of, check_model
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.reports.measure import count_step, time_step
from snn_reversible_plugin.reports.trial import Loss, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MakeInputs = Callable[[int], Any]
_SMALL = 2, 6  # the batches that the line goes through
_TRIALS = 6
_ENOUGH = 0.9  # of the budget
_MOST = 8  # times the batch before


@dataclass(frozen=True)
class Fit:
    """A batch that fits.

    Attributes:
        batch: how many samples; 0 where not even the smallest fits.
        peak: bytes at the peak of a training step with that batch, measured: parameters, buffers, their
            gradients and the inputs included, an optimizer's state and other tensors of the process not.
        predicted: what the two small batches said of that peak.
        seconds: of a training step with it, forward and backward; the least of three.
        budget: bytes that there were.
    """

    batch: int
    peak: int
    predicted: int
    seconds: float
    budget: int


def largest_batch(
    model: nn.Module, make_inputs: MakeInputs, budget: int | str | None = None, *, loss: Loss | None = None
) -> int:
    """How large a batch fits, predicted from two small ones and tried: once, where that was nearly right.

    The model is left as it was. One that is converted is measured as it is, any other as stock.

    Args:
        model: on the device where it is to be trained.
        make_inputs: gives, for a number of samples, what the model is called with: a tensor or a tuple.
        budget: bytes for parameters, buffers, gradients, inputs and all that a step allocates, ``24 << 30``
            or ``"24GiB"``; what is free on the device by default. Leave room for the optimizer's state.
        loss: from the model's output to a scalar; the mean of squares of all outputs by default.

    Raises:
        ValueError: a budget that is no number of bytes, or not even two samples fit.

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
        raise ValueError(
            f"a batch of {_SMALL[0]} takes {found.peak:,} bytes, and the budget is {found.budget:,}. "
            f"{_what_helps(model)}"
        )
    return found.batch


def fit(
    model: nn.Module, make_inputs: MakeInputs, budget: int | str | None = None, *, loss: Loss | None = None
) -> Fit:
    """As :func:`largest_batch`, with what was measured; a batch of 0 where nothing fits."""
    check_model(model)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    limit = free_memory(device) if budget is None else bytes_of(budget)
    small, larger = (_peak(model, make_inputs, batch, loss) for batch in _SMALL)
    if small > limit:
        return Fit(0, small, small, 0.0, limit)
    known: dict[int, int] = dict(zip(_SMALL, (small, larger), strict=True))
    line = _Line(_SMALL[0], small, _SMALL[1], larger)
    batch = line.at_most(limit)
    for _ in range(_TRIALS):
        try:
            if batch not in known:
                known[batch] = _peak(model, make_inputs, batch, loss)
        except torch.OutOfMemoryError:
            batch = max(_SMALL[0], batch - max(1, batch // 10))
            continue
        following = _following(batch, known, limit)
        if following == batch:
            break
        batch = following
    batch = max(one for one, size in known.items() if size <= limit)
    step = _step(model, make_inputs, batch, loss)
    seconds = []
    for _ in range(3):
        with step.unchanged():
            seconds.append(time_step(step.run))
    return Fit(batch, known[batch], line.at(batch), min(seconds), limit)


def _following(batch: int, known: dict[int, int], limit: int) -> int:
    """The batch to try after this one: a smaller one where it does not fit, a larger one where that left
    much unused, else the same."""
    fits = max(one for one, size in known.items() if size <= limit)
    if known[batch] > limit:
        return min(batch - 1, _Line(fits, known[fits], batch, known[batch]).at_most(limit))
    before = max((one for one in known if one < batch), default=None)
    if before is None or batch < fits or known[batch] >= _ENOUGH * limit:
        return batch
    over = min((one for one, size in known.items() if size > limit), default=batch * _MOST)
    return max(batch, min(over - 1, _Line(before, known[before], batch, known[batch]).at_most(limit)))


@dataclass(frozen=True)
class _Line:
    """Bytes over batches, through two points."""

    batch: int
    bytes: int
    other: int
    more: int

    def at(self, batch: int) -> int:
        rate = (self.more - self.bytes) / (self.other - self.batch)
        return round(self.bytes + (batch - self.batch) * rate)

    def at_most(self, limit: int) -> int:
        rate = max(1.0, (self.more - self.bytes) / (self.other - self.batch))
        return max(self.batch, self.batch + int((limit - self.bytes) / rate))


def _step(model: nn.Module, make_inputs: MakeInputs, batch: int, loss: Loss | None) -> Step:
    inputs = make_inputs(batch)
    return Step(model, inputs if isinstance(inputs, tuple) else (inputs,), {}, loss)


def _peak(model: nn.Module, make_inputs: MakeInputs, batch: int, loss: Loss | None) -> int:
    """Bytes at the peak of the second step with a batch: the first of a shape may choose for later ones."""
    step = _step(model, make_inputs, batch, loss)
    storages = [tensor.untyped_storage() for tensor in step.alive()]
    lives = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    with step.unchanged():
        step.run().backward()
    with step.unchanged():
        return lives + count_step(step.run)[1]


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take, and what its allocator has in reserve."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(f"nobody says what memory is free on {device}: give budget=") from error


def _what_helps(model: nn.Module) -> str:
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return (
        f"Parameters and their gradients are {2 * parameters:,} of them, which step_in_backward nearly "
        'halves; mode="memory", smaller inputs or fewer time steps lower the rest.'
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
