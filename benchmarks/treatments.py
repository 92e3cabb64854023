"""The picture of the four treatments, in docs/how-it-works.md."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .pictures import IMAGES

KEEP, PACK, REPLAY, REVERSE = "tab:gray", "tab:blue", "tab:green", "tab:purple"
TREATMENTS = (
    (KEEP, "keep", "the tensor itself: 32 bits an element;\ninputs and parameters live anyway"),
    (PACK, "pack", "spikes: 1 bit an element"),
    (REPLAY, "replay", "a recipe, nothing an element:\nrun again on what its inputs rebuild"),
    (REVERSE, "reverse", "nothing, or a remainder bit:\nundone from the state that came after"),
)
LAYERS = (
    ("input", KEEP),
    ("conv", REPLAY),
    ("batch\nnorm", REPLAY),
    ("spikes", PACK),
    ("conv", REPLAY),
    ("batch\nnorm", REPLAY),
    ("spikes", PACK),
    ("linear", REPLAY),
)
STREAMS = (("block 1", REVERSE), ("block 2", REVERSE), ("block 3", REVERSE), ("output", KEEP))


def _box(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    shape = FancyBboxPatch(
        (x, y), 0.8, 0.56, boxstyle="round,pad=0.03", facecolor=color, alpha=0.22, linewidth=0
    )
    axes.add_patch(shape)
    edge = FancyBboxPatch((x, y), 0.8, 0.56, boxstyle="round,pad=0.03", facecolor="none", edgecolor=color)
    axes.add_patch(edge)
    axes.text(x + 0.4, y + 0.28, text, ha="center", va="center", fontsize=9)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float = 0
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=color, connectionstyle=f"arc3,rad={bend}",
            shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def draw(path: Path = IMAGES / "treatments.png") -> Path:
    """Draw a feed-forward part, a chain of reversible blocks, and the legend."""
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, color) in enumerate(LAYERS):
        _box(axes, index, 3, name, color)
        if index:
            _arrow(axes, (index - 0.17, 3.28), (index - 0.03, 3.28), "0.3")
        if color == REPLAY:  # a replay starts at the nearest thing stored
            source = max(i for i in range(index) if LAYERS[i][1] != REPLAY)
            _arrow(axes, (source + 0.4, 2.95), (index + 0.4, 2.95), REPLAY, bend=0.35)
    axes.text(0, 3.75, "forward: what autograd saves of each layer", fontsize=9, color="0.3")
    for index, (name, color) in enumerate(STREAMS):
        _box(axes, 1.4 * index, 1.1, name, color)
        if index:
            _arrow(axes, (1.4 * index - 0.57, 1.46), (1.4 * index - 0.03, 1.46), "0.3")
            _arrow(axes, (1.4 * index - 0.03, 1.22), (1.4 * index - 0.57, 1.22), REVERSE)
    axes.text(0, 1.85, "reversible blocks, and membranes in time", fontsize=9, color="0.3")
    for index, (color, name, text) in enumerate(TREATMENTS):
        x, y = 4.2 * (index % 2), 0.45 - 0.62 * (index // 2)
        axes.add_patch(
            FancyBboxPatch((x, y - 0.12), 0.2, 0.2, boxstyle="round,pad=0.03", facecolor=color, alpha=0.5)
        )
        axes.text(x + 0.36, y, name, fontsize=10, va="center", weight="bold")
        axes.text(x + 1.15, y, text, fontsize=8, va="center", color="0.25")
    axes.set(xlim=(-0.15, 8.05), ylim=(-0.5, 4.0))
    axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
