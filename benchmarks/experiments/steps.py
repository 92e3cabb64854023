"""A training step of every workload under every method: memory, time, gradients, spikes, what fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from .. import pictures
from ..experiment import Entries, Experiment, Options, Tick, Work
from ..measure import measure
from ..methods import METHODS
from ..search import find_largest
from ..tables import steps as tables
from ..workloads import WORKLOADS


def works(options: Options) -> Iterator[Work]:
    for workload in WORKLOADS.values():
        if shape := workload.shape(options.quick):
            settings = {
                "workload": workload.name,
                "shape": list(shape),
                "repeats": options.rounds(5, quick=2),
            }
            yield Work(workload.name, tuple(METHODS), settings)


def together(
    methods: Sequence[str], options: Options, tick: Tick, workload: str, shape: list[int], repeats: int
) -> Entries:
    work = WORKLOADS[workload]
    results = measure(work, tuple(shape), options.device, methods, repeats, tick)
    if options.fits or (options.fits is None and not options.quick):
        find_largest(work, tuple(shape), options.device, results, tick)
    return {result.method: asdict(result) for result in results}


GROWTH = {
    "blocks": "blocks",
    "time-leaky": "time steps of leaky-loop",
    "time-lif": "time steps of lif-loop",
    "batch": "batch of vgg",
}
STEPS = Experiment(
    "steps",
    works,
    {
        "steps": tables.everything,
        "all": tables.networks,
        "main": tables.main,
        "behind": tables.behind,
        "methods": tables.methods,
        **{
            f"{name}-{figure}": tables.growth(series, figure)
            for name, series in GROWTH.items()
            for figure in ("held", "peak")
        },
    },
    together=together,
    draw=pictures.draw_steps,
)
