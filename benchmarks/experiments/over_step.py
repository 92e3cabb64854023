"""Memory over one training step, from the first layer to the last gradient: stock and converted."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.over_step import OverStep, over_step
from snn_reversible_plugin.reports.pictures import curve_of, laid_out

from ..experiment import Entry, Options, Tick, Work
from ..workloads import WORKLOADS

SHOWN = {
    "spikformer": "Spikformer",
    "sew-resnet18": "SEW-ResNet18",
    "vgg": "Convolutional network",
    "tutorial-6": "snnTorch's tutorial 6, a loop",
}
METHODS = ("stock", "converted")
MOST_POINTS = (
    600  # of a curve that are stored: the lowest and the highest of as many stretches as half of it
)


def works(options: Options) -> Iterator[Work]:
    for name in SHOWN:
        if shape := WORKLOADS[name].shape(options.quick):
            yield Work(name, METHODS, {"workload": name, "shape": list(shape)})


def measure(method: str, options: Options, tick: Tick, workload: str, shape: list[int]) -> Entry:
    """By the defaults of the conversion, on a CPU, where the allocator's events are."""
    work = WORKLOADS[workload]
    torch.manual_seed(0)
    model, x = work.make(), work.batch(tuple(shape), "cpu")
    if method == "converted":
        srp.convert_to_reversible(model)
    tick("a step to warm up")
    work.loss_of(model, x).backward()
    tick("a step")
    found = over_step(model, lambda: work.loss_of(model, x))
    places, alive = curve_of(found)
    return {
        "method": method,
        "peak": found.peak.bytes,
        "held": found.peak.held,
        "where": found.peak.where,
        "stages": stages(found),
        "curve": thinned([[round(p, 4), count] for p, count in zip(places, alive, strict=True)]),
    }


def stages(run: OverStep) -> list[list[float | str]]:
    """The parts of a network that a reader knows by name, and where each begins and ends: what follows one
    another in one of its modules, or in one of a container's (``blocks.0``)."""
    found: list[list[float | str]] = []
    for start, width, part in laid_out(run):
        first, _, rest = part.module.partition(".")
        second = rest.partition(".")[0]
        name = f"{first}.{second}" if second.isdigit() else first
        if not found or found[-1][0] != name or found[-1][1] < 1 <= start:  # type: ignore[operator]
            found.append([name, start, start])
        found[-1][2] = start + width
    return [one for one in found if one[0] not in ("", "model")]


def thinned(points: list[list[float]], most: int = MOST_POINTS) -> list[list[float]]:
    """The lowest and the highest point of each stretch of a curve, in their order.

    Example:
        >>> thinned([[0, 5], [1, 9], [2, 1], [3, 4]], most=2)
        [[1, 9], [2, 1]]
    """
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted((min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])))
    return kept
