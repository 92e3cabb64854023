"""``memory_report``: what autograd saves in each module, stock, and what the tape stores instead.

Bytes are counted by storage, as the allocator sees them: what lives anyway (parameters, buffers, inputs)
is free, and what several modules share is counted where it is saved first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from snn_reversible_plugin import convert, tape
from snn_reversible_plugin.handles import Handle, Kept, Packed, Replayed
from snn_reversible_plugin.memory import StepCost
from snn_reversible_plugin.remainders import Remainders
from snn_reversible_plugin.states import unchanged
from snn_reversible_plugin.timeline import Spikes, State, Timeline
from snn_reversible_plugin.tracking import tracked
from snn_reversible_plugin.trial import Loss, as_converted, costs, loss_of, megabytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class ModuleReport:
    """One module's row: what autograd saved in its forward, stock and under the tape.

    ``treatment`` counts the saved tensors by what became of them. ``neuron`` says how a spiking neuron
    runs and with which guarantee, or why it stayed stock; it is empty for other modules. Bytes that
    several modules share are counted where they were first saved.
    """

    name: str
    type: str
    neuron: str
    treatment: dict[str, int]
    stock_bytes: int
    bytes: int


@dataclass
class MemoryReport:
    """Bytes by module, and the price of a whole training step. Made by :func:`memory_report`."""

    modules: list[ModuleReport]
    stock: StepCost
    converted: StepCost
    mode: str

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def print(self) -> None:
        """Print a table of the modules that save something, and the totals."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"Saved for the backward, mode {self.mode!r}")
        for heading in ("module", "type", "treatment", "neuron"):
            table.add_column(heading, overflow="fold")
        table.add_column("stock", justify="right", no_wrap=True)
        table.add_column("now", justify="right", no_wrap=True)
        for row in self.modules:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row.treatment.items())
            table.add_row(
                row.name, row.type, kinds, row.neuron, megabytes(row.stock_bytes), megabytes(row.bytes)
            )
        table.add_section()
        for label in ("held", "peak"):
            before, after = getattr(self.stock, label), getattr(self.converted, label)
            table.add_row(
                f"[bold]{label}",
                "",
                f"{before / max(after, 1):.1f}x less",
                "",
                megabytes(before),
                megabytes(after),
            )
        ratio = self.converted.seconds / self.stock.seconds
        table.add_row("[bold]step time", "", f"{ratio:.2f}x stock", "", "", "")
        Console().print(table)

    def plot(self) -> Figure:
        """A bar chart of bytes by module, stock beside now. Needs the extra ``plot``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install snn-reversible-plugin[plot]") from error
        figure = Figure(figsize=(8, 1.5 + 0.3 * len(self.modules)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(self.modules))
        axes.barh(
            [place - 0.2 for place in places],
            [row.stock_bytes / 1e6 for row in self.modules],
            height=0.4,
            color="0.75",
            label=f"stock, held {megabytes(self.stock.held)}",
        )
        axes.barh(
            [place + 0.2 for place in places],
            [row.bytes / 1e6 for row in self.modules],
            height=0.4,
            color="tab:blue",
            label=f"reversible, held {megabytes(self.converted.held)}",
        )
        axes.set_yticks(list(places), [row.name for row in self.modules])
        axes.invert_yaxis()
        axes.set_xlabel("MB saved for the backward")
        axes.legend()
        return figure


@torch.enable_grad()
def memory_report(model: nn.Module, *inputs: Any, loss: Loss | None = None) -> MemoryReport:
    """Measure, module by module, what autograd saves stock and what the tape stores instead.

    The model is left as it was: buffers, neuron states, gradients, random numbers.

    Args:
        model: a converted model; another one is reported as ``convert_to_reversible(model)`` would make it.
        inputs: what the model is called with.
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
    with as_converted(model) as settings:
        by_stock = _SavedByStock(model, inputs)
        with (
            unchanged(model),
            convert.stock(model),
            tracked(model, by_stock),
            torch.autograd.graph.saved_tensors_hooks(by_stock.pack, lambda tensor: tensor),
        ):
            loss_of(model(*inputs), loss)
        by_tape = _SavedByTape(model, inputs)
        with unchanged(model), tape.recording(settings.mode, observer=by_tape) as recorder:
            assert recorder is not None
            with tracked(model, recorder):
                held = loss_of(model(*inputs), loss)
                by_tape.finish()
                del held
        rows = []
        for name, module in model.named_modules():
            name = name or "model"
            row = ModuleReport(
                name,
                convert.stock_class(module).__name__,
                _about_neuron(name, module, settings),
                dict(by_tape.treatments[name]) if name in by_tape.treatments else {},
                by_stock.bytes[name],
                by_tape.bytes[name],
            )
            if row.stock_bytes or row.bytes or row.treatment or row.neuron:
                rows.append(row)
        del by_tape
        return MemoryReport(rows, *costs(model, inputs, loss, repeats=1), settings.mode)


def _about_neuron(name: str, module: nn.Module, settings: convert.Settings) -> str:
    if name in settings.stays_stock:
        return f"stays stock: {settings.stays_stock[name]}"
    treatment = getattr(module, "treatment", None)
    if treatment is None:
        return ""
    about = f"{treatment}, {getattr(module, 'arithmetic', 'stock')} arithmetic"
    return f"{about}: {settings.off_grid[name]}" if name in settings.off_grid else about


def _storages(model: nn.Module, inputs: tuple[Any, ...]) -> set[int]:
    """What lives anyway."""
    tensors = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, torch.Tensor)}


class _SavedByStock:
    """A pack hook that keeps everything and counts it."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.where: str | None = None
        self.bytes: Counter[str] = Counter()
        self._free = _storages(model, inputs)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._free:
            self._free.add(storage._cdata)
            self.bytes[self.where or "model"] += storage.nbytes()
        return tensor.detach()


class _SavedByTape:
    """Counts what the handles that autograd was given rely on, each storage once."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.bytes: Counter[str] = Counter()
        self.treatments: dict[str, Counter[str]] = {}
        self._free = _storages(model, inputs)
        self._seen: dict[int, Handle] = {}
        self._timelines: dict[int, tuple[str, Timeline]] = {}
        self._records: dict[int, tuple[str, Remainders]] = {}

    def packed(self, where: str | None, tensor: torch.Tensor, handle: Handle) -> None:
        where = where or "model"
        kinds = self.treatments.setdefault(where, Counter())
        kinds[handle.treatment] += 1
        self._count(where, handle)

    def _count(self, where: str, handle: Handle) -> None:
        if id(handle) in self._seen:
            return
        self._seen[id(handle)] = handle
        if isinstance(handle, Replayed):
            for operand in handle.operands():
                self._count(where, operand)
        elif isinstance(handle, Spikes):
            self._count_records(where, handle.records)
        elif isinstance(handle, State):
            self._timelines.setdefault(id(handle.timeline), (where, handle.timeline))
        elif isinstance(handle, Packed) and handle.bits is not None:
            self.bytes[where] += handle.bits.untyped_storage().nbytes()
        elif isinstance(handle, Kept):
            storage = handle.tensor.untyped_storage()
            if storage._cdata not in self._free:
                self._free.add(storage._cdata)
                self.bytes[where] += storage.nbytes()

    def _count_records(self, where: str, records: Remainders) -> None:
        self._records.setdefault(id(records), (where, records))

    def finish(self) -> None:
        """Count what grew until the end of the forward."""
        for where, timeline in self._timelines.values():
            self._count_records(where, timeline.records)
            if timeline.newest is not None:
                self._count(where, timeline.newest)
            for current in timeline.currents:
                self._count(where, current)
        for where, records in self._records.values():
            self.bytes[where] += records.nbytes
