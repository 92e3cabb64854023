"""The picture of a memory report: memory over one training step, stock and converted, layer by layer.

The one idea: every part of the step, a layer's forward or backward, gets the same width, so both curves
stand over the same layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snn_reversible_plugin.ops.units import shown, unit_of
from snn_reversible_plugin.reports.over_step import OverStep, Part

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from snn_reversible_plugin.reports.fit import Fits
    from snn_reversible_plugin.reports.memory_report import MemoryReport

MOST_NAMES = 40  # along an axis
STOCK, CONVERTED = "0.6", "tab:blue"


def new_figure(width: float, height: float) -> Figure:
    """An empty one, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'snn-reversible-plugin[plot]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def picture_of_step(report: MemoryReport) -> Figure:
    """Memory over the step, where that was counted, above bytes held by module.

    Raises:
        ImportError: matplotlib is not installed.
    """
    bars = 1.5 + 0.25 * len(report.modules)
    if report.stock_over_step is None or report.converted_over_step is None:
        figure = new_figure(9, bars)
        _held_by_module(figure.add_subplot(), report)
        return figure
    figure = new_figure(9, 4 + bars)
    over_step, by_module = figure.subplots(2, 1, height_ratios=(4, bars))
    draw_over_step(over_step, report.stock_over_step, report.converted_over_step)
    _held_by_module(by_module, report)
    return figure


def picture_of_fits(fits: Fits) -> Figure:
    """The largest batches as bars: a group a number of time steps, a bar a mode."""
    modes = list(dict.fromkeys(mode for mode, _, _ in fits.rows))
    counts = list(dict.fromkeys(steps for _, steps, _ in fits.rows))
    figure = new_figure(max(5.0, 1.2 + 2.2 * len(counts)), 3.5)
    axes = figure.add_subplot()
    for place, mode in enumerate(modes):
        found = [(counts.index(steps), one.batch) for name, steps, one in fits.rows if name == mode]
        drawn = axes.bar(
            [group + (place - (len(modes) - 1) / 2) * 0.8 / len(modes) for group, _ in found],
            [batch for _, batch in found],
            0.8 / len(modes),
            color=STOCK if mode == "stock" else f"C{place - 1}",
            label=mode,
        )
        axes.bar_label(drawn, fmt="{:,.0f}", padding=2, fontsize="small")
    axes.set_xticks(range(len(counts)), ["" if steps is None else f"T = {steps}" for steps in counts])
    axes.set_ylabel("samples in a batch")
    axes.set_title(fits.title, fontsize="medium")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_over_step(axes: Axes, stock: OverStep, converted: OverStep) -> None:
    """Memory over the step, stock and converted, with the layers along the axis."""
    unit, size = unit_of(max(stock.peak.bytes, converted.peak.bytes))
    for run, color, label in ((stock, STOCK, "stock"), (converted, CONVERTED, "converted")):
        places, counts = curve_of(run)
        alive = [count / size for count in counts]
        axes.fill_between(places, alive, color=color, alpha=0.35, linewidth=0)
        axes.plot(places, alive, color=color, linewidth=1)
        top = max(counts, default=0)
        place = places[counts.index(top)] if places else 0.0
        axes.annotate(
            f"{label}: {shown(top)} in {run.peak.where}",
            (place, top / size),
            xytext=(0, 4),
            textcoords="offset points",
            ha="left" if place < 0.5 else "right" if place > 1.5 else "center",
            color=color,
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        )
    axes.axvline(1, color="0.3", linestyle=":", linewidth=1)
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    places, names = _names(stock)
    axes.set_xticks(places, names, rotation=90, fontsize="x-small")
    axes.set_xlabel("forward, then backward, layer by layer")
    axes.set_ylabel(f"{unit} alive beyond parameters and input")


def curve_of(run: OverStep) -> tuple[list[float], list[int]]:
    """Bytes alive over the step: places from 0 to 1 are the forward, to 2 the backward."""
    places: list[float] = []
    alive: list[int] = []
    for start, width, part in laid_out(run):
        places += [start + width * at / len(part.curve) for at in range(len(part.curve))]
        alive += part.curve
    return places, alive


def _names(run: OverStep) -> tuple[list[float], list[str]]:
    parts = [(start + width / 2, part.module) for start, width, part in laid_out(run) if part.module]
    shown = parts[:: -(-len(parts) // MOST_NAMES) or 1]
    return [place for place, _ in shown], [name for _, name in shown]


def laid_out(run: OverStep) -> list[tuple[float, float, Part]]:
    """Each part with its place and width."""
    found = []
    for backward in (False, True):
        parts = [part for part in run.parts if part.backward == backward]
        found += [(backward + at / len(parts), 1 / len(parts), part) for at, part in enumerate(parts)]
    return found


def _held_by_module(axes: Axes, report: MemoryReport) -> None:
    places = range(len(report.modules))
    largest = max((max(row.stock_bytes, row.bytes) for row in report.modules), default=0)
    unit, size = unit_of(largest)
    for shift, color, label, cost, counts in (
        (-0.2, STOCK, "stock", report.stock, [row.stock_bytes for row in report.modules]),
        (0.2, CONVERTED, "converted", report.converted, [row.bytes for row in report.modules]),
    ):
        axes.barh(
            [place + shift for place in places],
            [count / size for count in counts],
            height=0.4,
            color=color,
            label=f"{label}, held {shown(cost.held)}",
        )
    axes.set_yticks(list(places), [f"{row.name}  {row.type}" for row in report.modules], fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit} held for the backward")
    axes.legend()
