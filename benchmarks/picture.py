"""The pictures: memory against step time, one point a method, the curves of growth, and losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .measure import MIB
from .store import ROOT, Entry
from .workloads import WORKLOADS

IMAGES = ROOT / "docs" / "images"
AT_FIRST_SIGHT = ("vgg", "sew-resnet34", "spikformer", "leaky-loop")  # one of each kind, for the README
STYLE = {
    "stock": ("0.45", "o", "stock"),
    "checkpoint": ("tab:brown", "v", "checkpoint by hand"),
    "memopt 1": ("tab:orange", "s", "memopt 1"),
    "memopt 2": ("tab:orange", "p", "memopt 2"),
    "memopt 3": ("tab:orange", "h", "memopt 3"),
    "memopt 4": ("tab:orange", "H", "memopt 4"),
    "published": ("tab:pink", "P", "published reversible"),
    "SLTT": ("tab:red", "X", "SLTT (approximate)"),
    "speed": ("tab:green", "^", "this package: speed"),
    "memory": ("tab:blue", "D", "this package: memory"),
    "grid": ("tab:cyan", "d", "this package: grid"),
    "blocks": ("tab:olive", "<", "this package: blocks"),
    "blocks + tape": ("tab:purple", ">", "this package: blocks + tape"),
    "blocks + tape, speed": ("plum", ">", "this package: blocks + tape, speed"),
}


def draw_all(entries: dict[str, Entry], device: str, folder: Path = IMAGES) -> list[Path]:
    """Draw what is stored; returns the paths of the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [draw_points(entries, folder / f"memory-against-time-{device}.png")]
    if first := at_first_sight(entries):
        drawn.append(draw_points(first, folder / f"gain-{device}.png"))
    if any(map(_series, entries.values())):
        drawn.append(draw_growth(entries, folder / f"growth-{device}.png"))
    return drawn


def at_first_sight(entries: dict[str, Entry]) -> dict[str, Entry]:
    """What the README's picture shows."""
    return {name: entry for name, entry in entries.items() if entry["workload"] in AT_FIRST_SIGHT}


def digest(entries: dict[str, Entry]) -> str:
    """A name for the figures that a picture shows; written into it, so that a stale one is found out."""
    keys = ("held", "peak", "time_ratio")
    figures = {name: [entry[key] for key in keys] for name, entry in entries.items()}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:16]


def draw_points(entries: dict[str, Entry], path: Path) -> Path:
    """A panel a workload: bytes held (filled) and peak (open) against step time."""
    names = list(dict.fromkeys(e["workload"] for e in entries.values() if not _series(e)))
    names = names or list(dict.fromkeys(e["workload"] for e in entries.values()))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows + 0.5), layout="constrained")
    for index, workload in enumerate(names):
        axes = figure.add_subplot(rows, columns, index + 1)
        for method, (color, marker, label) in STYLE.items():
            entry = entries.get(f"{workload} | {method}")
            if entry is None or entry["peak"] is None or entry["time_ratio"] is None:
                continue
            x, peak = entry["time_ratio"], entry["peak"] / MIB
            if entry["held"]:
                axes.plot([x, x], [entry["held"] / MIB, peak], color=color, linewidth=1)
                axes.plot(x, entry["held"] / MIB, marker, color=color)
            axes.plot(x, peak, marker, color=color, markerfacecolor="white", label=label)
        axes.set_yscale("log")
        axes.set_title(workload, fontsize=10)
        axes.set_xlabel("step time, stock = 1", fontsize=8)
        axes.set_ylabel("MiB: held (filled), peak (open)", fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.margins(0.25)
    _legend(figure)
    figure.savefig(path, dpi=120, metadata={"Results": digest(entries)})
    return path


def draw_growth(entries: dict[str, Entry], path: Path) -> Path:
    """A panel a series: bytes held (above) and peak (below) as depth, time or batch grow."""
    series = list(dict.fromkeys(filter(None, map(_series, entries.values()))))
    figure = Figure(figsize=(3.4 * len(series), 6), layout="constrained")
    for row, key in enumerate(("held", "peak")):
        for column, name in enumerate(series):
            axes = figure.add_subplot(2, len(series), row * len(series) + column + 1)
            for method, (color, marker, label) in STYLE.items():
                points = sorted(
                    (WORKLOADS[e["workload"]].at or 0, e[key] / MIB)
                    for e in entries.values()
                    if _series(e) == name and e["method"] == method and e[key]
                )
                if points:
                    axes.plot(*zip(*points, strict=True), marker=marker, color=color, label=label)
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
        found.values(), found.keys(), loc="outside upper center", ncols=min(5, len(found)), fontsize=8
    )


def _series(entry: Entry) -> str | None:
    workload = WORKLOADS.get(entry["workload"])
    return workload and workload.series


def draw_losses(
    panels: dict[str, dict[str, list[list[float]]]], path: Path, dashed: Collection[str] = ()
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
