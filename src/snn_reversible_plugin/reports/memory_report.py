"""``memory_report``: what each module holds for the backward, stock and converted.

The one idea: *held* are bytes that live between forward and backward. For a module they are those of the
storages that autograd, or a handle in place of a tensor, keeps alive: what lives anyway (parameters,
buffers, inputs) is free. What a module returned is its own, whoever saves it: spikes stand with the neurons
that fired them, not with the pool or the convolution behind. The rest stands where it is saved first. For
the whole step the allocator counts, so there what modules return is in, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from snn_reversible_plugin import convert
from snn_reversible_plugin.compiler.entry import look_of
from snn_reversible_plugin.modules.checks import is_compiled
from snn_reversible_plugin.modules.swap import stock_type
from snn_reversible_plugin.modules.tracking import tracked
from snn_reversible_plugin.neurons.own.call import why_taped
from snn_reversible_plugin.ops.units import shown
from snn_reversible_plugin.reports.compiled import verify_compiled
from snn_reversible_plugin.reports.measure import StepCost
from snn_reversible_plugin.reports.over_step import OverStep, over_step
from snn_reversible_plugin.reports.saved import SavedByStock, SavedByTape
from snn_reversible_plugin.reports.timing import TimeRatio
from snn_reversible_plugin.reports.trial import Loss, Step, as_converted, costs
from snn_reversible_plugin.tape.findings import FoundBits, KeptInFull

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_CAUSES = 5  # of a peak that are printed, and names of modules
OUTSIDE = "(outputs, loss)"  # the row of what is held beyond what the modules' forward saves


@dataclass
class ModuleReport:
    """One module's row: ``stock_bytes`` and ``bytes`` held, stock and converted: what it returns, whoever
    saves that, and what its forward computes and saves.

    ``treatment`` counts the saved tensors by what became of them. ``neuron`` says how a spiking neuron
    runs and with which guarantee, or why it stayed stock; it is empty for other modules. ``grid_bits``:
    binary digits behind the point, where it runs on a grid. The row ``(outputs, loss)`` is what the step
    holds beyond that, by the allocator's count: what the model returns, and what its loss saves.
    """

    name: str
    type: str
    neuron: str
    treatment: dict[str, int]
    stock_bytes: int
    bytes: int
    grid_bits: int | None = None


@dataclass
class MemoryReport:
    """Bytes held by module, and the price of a whole training step. Made by :func:`memory_report`.

    ``time_ratio`` is how many times stock's time a step takes, with its quartiles. ``stock_over_step`` and
    ``converted_over_step`` are the allocator's count over the step, by module, with what stands
    at the peak and why; None where the step ran on a GPU. ``bits`` are the tensors of which a few bits an
    element are stored, and ``kept`` those that are stored in full, the largest first: the operation that
    made each, why it is kept, and what one may change.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = nn.Sequential(layer.Linear(64, 64), neuron.LIFNode(), layer.Linear(64, 10))
        >>> report = srp.memory_report(model, torch.rand(32, 64))
        >>> [row.name for row in report.modules if row.type == "LIFNode"], report.mode
        (['1'], 'memory')
        >>> report.converted_over_step.peak.bytes > 0
        True
    """

    modules: list[ModuleReport]
    stock: StepCost
    converted: StepCost
    time_ratio: TimeRatio
    mode: str
    stock_over_step: OverStep | None = None
    converted_over_step: OverStep | None = None
    bits: list[FoundBits] = field(default_factory=list)
    kept: list[KeptInFull] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def print(self) -> None:
        """Print a table of the modules that save something, the totals, and a line for what needs words."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Held for the backward, mode {self.mode!r}")
        for heading in ("module", "type", "treatment", "neuron"):
            table.add_column(heading, overflow="fold")
        table.add_column("stock", justify="right", no_wrap=True)
        table.add_column("converted", justify="right", no_wrap=True)
        said: dict[str, list[str]] = {}  # of neurons, to their names
        for row in self.modules:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row.treatment.items())
            neuron = re.split("[:,]", row.neuron)[0]
            if neuron != row.neuron:
                said.setdefault(row.neuron, []).append(row.name)
            if row.grid_bits is not None:
                neuron = f"{neuron}, 2^-{row.grid_bits}"
            table.add_row(row.name, row.type, kinds, neuron, shown(row.stock_bytes), shown(row.bytes))
        table.add_section()
        for label in ("held", "peak"):
            before, after = getattr(self.stock, label), getattr(self.converted, label)
            times = f"{before / max(after, 1):.1f}x less"
            table.add_row(f"[bold]{label}", "", times, "", shown(before), shown(after))
        console = Console()
        console.print(table)
        console.print(f"time of a training step, of stock's: {self.time_ratio}")
        for about, names in said.items():
            more = f" and {len(names) - MOST_CAUSES} more" if len(names) > MOST_CAUSES else ""
            console.print(f"{', '.join(names[:MOST_CAUSES])}{more}: {about}", markup=False)
        for one in [one for one in self.kept if one.matters(self.converted.held)][:MOST_CAUSES]:
            console.print(f"kept in full in {one.module}: {one}")
        for label, run in (("stock", self.stock_over_step), ("converted", self.converted_over_step)):
            if run is not None:
                largest = [f"{shown(size)} {cause}" for cause, size in run.peak.causes().items() if size]
                console.print(f"peak, {label}: in {run.peak.where}; {', '.join(largest[:MOST_CAUSES])}")

    def plot(self) -> Figure:
        """Memory over the training step, layer by layer, and what each holds for the backward.

        Needs the extra ``plot``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from snn_reversible_plugin.reports.pictures import picture_of_step

        return picture_of_step(self)


@torch.enable_grad()
def memory_report(
    model: nn.Module, *inputs: Any, kwargs: Mapping[str, Any] | None = None, loss: Loss | None = None
) -> MemoryReport:
    """Measure, module by module, what is held between forward and backward, stock and converted.

    The model is left as it was: buffers, neuron states, gradients, random numbers.

    Args:
        model: a converted model; another one is reported as ``convert_to_reversible(model)`` would make
            it. Of one that :func:`~snn_reversible_plugin.compile` made the rows are kinds of what its
            regions store.
        inputs: what the model is called with.
        kwargs: what it is called with by name.
        loss: from the model's output to a scalar; the mean of squares of all outputs by default.

    Raises:
        ValueError: no output has a gradient.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> model = nn.Sequential(layer.Linear(64, 64), neuron.LIFNode(), layer.Linear(64, 10))
        >>> report = srp.memory_report(srp.convert_to_reversible(model), torch.rand(32, 64))
        >>> report.converted.held < report.stock.held
        True
    """
    step = Step(model, inputs, kwargs or {}, loss)
    if look_of(model) is not None:
        return _of_compiled(step)
    with as_converted(model) as settings:
        by_stock = SavedByStock(step)
        with (
            step.unchanged(),
            convert.stock(model),
            tracked(model, by_stock),
            torch.autograd.graph.saved_tensors_hooks(by_stock.pack, lambda tensor: tensor),
        ):
            step.run()
        if settings.plans is not None:
            with step.unchanged():  # the first step of a shape runs as "memory"
                step.run().backward()
        by_tape = SavedByTape(step)
        with step.unchanged(), settings.recording(observer=by_tape) as tape:
            assert tape is not None
            with tracked(model, tape), tracked(model, by_tape):
                graph = step.run()
                held, treatments = by_tape.count()
                del graph
        rows = []
        for name, module in model.named_modules():
            name = name or "model"
            row = ModuleReport(
                name,
                stock_type(module).__name__,
                _about_neuron(name, module, settings),
                dict(treatments.get(name, {})),
                by_stock.held[name],
                held[name],
                convert.grid_bits(module),
            )
            if row.stock_bytes or row.bytes or row.treatment or row.neuron:
                rows.append(row)
        bits, kept = by_tape.found()
        del by_tape
        before, after, time_ratio = costs(step)
        rest = [cost.held - sum(sizes.values()) for cost, sizes in ((before, by_stock.held), (after, held))]
        if max(rest) > 0:
            rows.append(ModuleReport(OUTSIDE, "", "", {}, max(rest[0], 0), max(rest[1], 0)))
        over = _over_both(step)
        return MemoryReport(rows, before, after, time_ratio, settings.mode, over[0], over[1], bits, kept)


def _over_both(step: Step) -> tuple[OverStep, OverStep] | tuple[None, None]:
    """A step of stock and a step of the converted model."""
    if any(tensor.device.type != "cpu" for tensor in step.alive()):
        return None, None
    with step.unchanged(), convert.stock(step.model):
        by_stock = over_step(step.model, step.run)
    with step.unchanged():
        return by_stock, over_step(step.model, step.run)


def _about_neuron(name: str, module: nn.Module, settings: convert.Settings) -> str:
    if name in settings.stays_stock:
        return f"stays stock: {settings.stays_stock[name]}"
    treatment = getattr(module, "treatment", None)
    if is_compiled(module):
        return "compiled: runs as it is written under a tape, and compiled elsewhere"
    if treatment is None:
        return "" if module._modules else why_taped(module)
    sliced = ", sliced" if settings.mode == "minimal" else ""
    about = f"{treatment}, {getattr(module, 'arithmetic', 'stock')} arithmetic{sliced}"
    reasons = convert.off_grid_reason(name, module, settings), getattr(module, "treatment_reason", "")
    reason = "; ".join(filter(None, reasons))
    return f"{about}: {reason}" if reason else about


def _of_compiled(step: Step) -> MemoryReport:
    """Beside stock compiled the same way."""
    found = verify_compiled(step)
    rows = [
        ModuleReport(kind, "compiled regions", "", {"stored": 1}, 0, size)
        for kind, size in found.stored.items()
    ]
    mode = look_of(step.model).backend.mode
    return MemoryReport(rows, found.stock, found.compiled, found.time_ratio, mode)
