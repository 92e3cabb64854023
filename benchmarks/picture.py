"""The README's picture: memory held and peak against step time, one point a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .measure import MIB

PICTURE = Path(__file__).parent.parent / "docs" / "images"
STYLE = {
    "stock": ("0.45", "o", "stock"),
    "memopt 1": ("tab:orange", "s", "memopt 1"),
    "speed": ("tab:green", "^", "this package: speed"),
    "memory": ("tab:blue", "D", "this package: memory"),
}


def draw(results: dict[str, dict[str, Any]], device: str) -> Path:
    """Draw all stored results of a device; returns the path of the PNG."""
    workloads = list(dict.fromkeys(entry["workload"] for entry in results.values()))
    columns = min(4, len(workloads))
    rows = -(-len(workloads) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), layout="constrained")
    for index, workload in enumerate(workloads):
        axes = figure.add_subplot(rows, columns, index + 1)
        for method, (color, marker, label) in STYLE.items():
            entry = results.get(f"{workload} | {method}")
            if entry is None or entry["held"] is None:
                continue
            x, held, peak = entry["time_ratio"], entry["held"] / MIB, entry["peak"] / MIB
            axes.plot([x, x], [held, peak], color=color, linewidth=1)
            axes.plot(x, peak, marker, color=color, markerfacecolor="white")
            axes.plot(x, held, marker, color=color, label=label)
        axes.set_yscale("log")
        axes.set_title(workload, fontsize=10)
        axes.set_xlabel("step time, stock = 1", fontsize=8)
        axes.set_ylabel("MiB: held (filled), peak (open)", fontsize=8)
        axes.tick_params(labelsize=8, which="both")
        axes.margins(0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    PICTURE.mkdir(parents=True, exist_ok=True)
    path = PICTURE / f"memory-against-time-{device}.png"
    figure.savefig(path, dpi=120)
    return path
