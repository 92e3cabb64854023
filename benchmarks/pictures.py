"""The pictures: memory against step time, one point a method, curves of growth, losses, accuracies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from snn_reversible_plugin import convert_to_reversible, memory_report
from snn_reversible_plugin.demo import network

from .experiment import Entries, Entry
from .methods import METHODS
from .store import ROOT
from .tables import MIB
from .tables.steps import series_of
from .workloads import WORKLOADS

IMAGES = ROOT / "docs" / "images"


def of_steps(entries: Entries, folder: Path, device: str) -> dict[Path, Entries]:
    """The pictures of training steps that there are to draw, and what each shows."""
    shown = {"memory-against-time": entries}
    if any(map(series_of, entries.values())):
        shown["growth"] = entries
    return {folder / f"{kind}-{device}.png": found for kind, found in shown.items() if found}


def draw_steps(entries: Entries, folder: Path, device: str) -> list[Path]:
    """Draw what is stored; returns the paths of the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (draw_growth if path.name.startswith("growth") else draw_points)(shown, path)
        for path, shown in of_steps(entries, folder, device).items()
    ]


def work_of(key: str) -> str:
    """The name of the work in an entry's key."""
    return key.partition(" | ")[0]


def path_of(folder: Path, name: str, device: str) -> Path:
    """Of a picture whose name has the device in it only where that is no CPU."""
    return folder / (f"{name}.png" if device == "cpu" else f"{name}-{device}.png")


def digest(entries: Entries) -> str:
    """A name for the figures that a picture shows; written into it, so that a stale one is found out."""
    keys = ("held", "peak", "time_ratio")
    figures = {name: [entry.get(key) for key in keys] for name, entry in entries.items()}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:16]


def draw_over_steps(entries: Entries, titles: Mapping[str, str], folder: Path) -> list[Path]:
    """Memory over a training step: of the first network, for light and for dark pages, and of all."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name: dict[str, Entries] = {}
    for entry in entries.values():
        by_name.setdefault(entry["workload"], {})[entry["method"]] = entry
    shown = {titles[name]: both for name, both in by_name.items() if len(both) == 2}
    drawn = []
    for theme, color in (("light", "#24292f"), ("dark", "#c9d1d9")):
        figure = Figure(figsize=(8, 3.4), layout="constrained", facecolor="none")
        title, both = next(iter(shown.items()))
        axes = figure.add_subplot(facecolor="none")
        _over_step(axes, both, color, f", {both['stock']['peak'] / both['converted']['peak']:.1f}x less")
        _name_stages(axes, both["stock"], color)
        steps, batch, *_, size = both["stock"]["shape"]
        axes.set_title(
            f"{title}, one training step: T = {steps}, batch {batch}, {size} x {size} pixels",
            color=color, fontsize=11, loc="left",
        )  # fmt: skip
        drawn.append(folder / f"over-step-{theme}.png")
        figure.savefig(drawn[-1], dpi=150, metadata={"Results": digest(entries)})
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for at, (title, both) in enumerate(shown.items()):
        axes = figure.add_subplot(2, 2, at + 1)
        _over_step(axes, both, "black")
        axes.set_title(title, fontsize=10, loc="left")
    drawn.append(folder / "over-steps.png")
    figure.savefig(drawn[-1], dpi=120, metadata={"Results": digest(entries)})
    return drawn


def _over_step(axes: Axes, both: Entries, color: str, less: str = "") -> None:
    """Both curves, each named at its peak; a line parts forward and backward."""
    for method, shade, remark in (("stock", "#7d858e", ""), ("converted", "#2f81f7", less)):
        places, alive = zip(*both[method]["curve"], strict=True)
        alive = [count / MIB for count in alive]
        if method == "stock":  # no higher than its curve, where no label is
            axes.vlines(
                1, 0, np.interp(1, places, alive), color=color, linestyle=":", linewidth=1, alpha=0.6
            )
        axes.fill_between(places, alive, color=shade, alpha=0.35, linewidth=0)
        axes.plot(places, alive, color=shade, linewidth=1.2)
        top = max(alive)
        place = min(max(places[alive.index(top)], 0.35), 1.9)
        axes.annotate(
            f"{method}: {top:,.0f} MiB{remark}", (place, top), xytext=(0, 3), textcoords="offset points",
            ha="right" if place > 1.5 else "center", color=shade, fontweight="bold",
        )  # fmt: skip
    axes.set_xlim(0, 2)
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.set_xticks([0.5, 1.5], ["forward", "backward"], color=color)
    axes.set_ylabel("memory, MiB", color=color)
    axes.tick_params(axis="y", colors=color)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(color)


def _name_stages(axes: Axes, stock: Entry, color: str) -> None:
    """The network's parts along the axis, where there is room for their names."""
    wide = [(name, (start + end) / 2) for name, start, end in stock["stages"] if end - start > 0.06]
    axes.set_xticks([place for _, place in wide], [name for name, _ in wide], color=color, fontsize=7)
    for place, half in ((0.5, "forward"), (1.5, "backward")):
        axes.annotate(
            half, (place, 0), xytext=(0, -26), textcoords="offset points", ha="center", color=color
        )


def draw_report(folder: Path) -> Path:
    """The picture that users get of their own network, of the demonstration's."""
    torch.manual_seed(0)
    report = memory_report(convert_to_reversible(network()), torch.rand(10, 16, 2, 24, 24))
    path = folder / "report.png"
    report.plot().savefig(path, dpi=110)
    return path


class Style(Protocol):
    """How the points of a method look."""

    @property
    def label(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def marker(self) -> str: ...


SLOWEST = 4  # times stock's step: what is further out would squeeze all others


def draw_points(entries: Entries, path: Path, methods: Mapping[str, Style] = METHODS) -> Path:
    """A panel a workload: bytes held (filled) and peak (open) against step time."""
    names = list(dict.fromkeys(work_of(key) for key, entry in entries.items() if not series_of(entry)))
    names = names or list(dict.fromkeys(map(work_of, entries)))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.1 * columns, 9), 2.9 * rows + 0.5), layout="constrained")
    for index, workload in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        outside = []
        for name, method in methods.items():
            entry = entries.get(f"{workload} | {name}", {})
            if "peak" not in entry or "time_ratio" not in entry:
                continue
            x, peak = entry["time_ratio"], entry["peak"] / MIB
            if x > SLOWEST:
                outside.append(f"{name} at {x:.1f} is not shown")
                continue
            if entry.get("held"):
                axes.plot([x, x], [entry["held"] / MIB, peak], color=method.color, linewidth=1)
                axes.plot(x, entry["held"] / MIB, method.marker, color=method.color)
            axes.plot(
                x, peak, method.marker, color=method.color, markerfacecolor="white", label=method.label
            )
        axes.set_yscale("log")
        axes.set_title(workload, fontsize=10)
        axes.set_xlabel("; ".join(["step time, stock = 1", *outside]), fontsize=8)
        axes.set_ylabel("MiB: held (filled), peak (open)", fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.margins(0.25)
    _legend(figure)
    figure.savefig(path, dpi=120, metadata={"Results": digest(entries)})
    return path


def draw_growth(entries: Entries, path: Path) -> Path:
    """A row a series: bytes held (left) and peak (right) as depth, time or batch grow."""
    series = list(dict.fromkeys(filter(None, map(series_of, entries.values()))))
    figure = Figure(figsize=(8, 2.8 * len(series) + 0.5), layout="constrained")
    for row, name in enumerate(series):
        for column, key in enumerate(("held", "peak")):
            axes = figure.add_subplot(len(series), 2, 2 * row + column + 1)
            for method in METHODS.values():
                points = sorted(
                    (WORKLOADS[e["workload"]].at or 0, e[key] / MIB)
                    for e in entries.values()
                    if series_of(e) == name and e["method"] == method.name and e.get(key)
                )
                if points:
                    style = {"marker": method.marker, "color": method.color, "label": method.label}
                    axes.plot(*zip(*points, strict=True), **style)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xlabel(name, fontsize=8)
            axes.set_ylabel(f"{key}, MiB", fontsize=8)
            axes.tick_params(labelsize=8, which="both")
    _legend(figure)
    figure.savefig(path, dpi=120, metadata={"Results": digest(entries)})
    return path


def _legend(figure: Figure) -> None:
    found = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside upper center", ncols=min(4, len(found)), fontsize=8
    )


def draw_losses(
    panels: Mapping[str, Mapping[str, list[list[float]]]], path: Path, dashed: Collection[str] = ()
) -> Path:
    """The mean loss over the runs of each kind, smoothed over ten updates, a panel by its title.

    Those dashed lie on another curve.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for index, (title, kinds) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for kind, losses in kinds.items():
            if losses:
                mean = torch.tensor(losses).mean(0)
                curve = mean.unfold(0, min(10, len(mean)), 1).mean(1)
                style = {"linestyle": "--", "linewidth": 1.6} if kind in dashed else {"linewidth": 1.0}
                axes.plot(curve, label=kind, **style)
        axes.set_xlabel("update", fontsize=8)
        axes.set_ylabel("loss" if index == 0 else "", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        if axes.lines and index == 0:
            axes.legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=120)
    return path


def draw_spread(panels: Mapping[str, Mapping[str, list[float]]], label: str, path: Path) -> Path:
    """One point a run: a panel by its title, a row by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for index, (title, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for place, found in enumerate(reversed(rows.values())):
            axes.plot(found, [place] * len(found), "o", alpha=0.6, color=f"C{place}")
        axes.set_yticks(range(len(rows)), [*reversed(rows)] if index == 0 else [""] * len(rows), fontsize=8)
        axes.set_xlabel(label, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.margins(0.15)
    figure.savefig(path, dpi=120)
    return path
