"""A training step of every workload under every method: memory, time, gradients, spikes, what fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from ..experiment import Entries, Options, Tick, Work
from ..measure import measure
from ..methods import COMPILED, METHODS
from ..search import find_largest
from ..workloads import WORKLOADS


def works(options: Options) -> Iterator[Work]:
    for workload in WORKLOADS.values():
        if shape := workload.shape(options.quick):
            without = () if workload.compiled and not options.quick else COMPILED
            methods = tuple(name for name in METHODS if name not in without)
            settings = {
                "workload": workload.name,
                "shape": list(shape),
                "repeats": options.rounds(5, quick=2),
            }
            yield Work(workload.name, methods, settings)


def together(
    methods: Sequence[str], options: Options, tick: Tick, workload: str, shape: list[int], repeats: int
) -> Entries:
    work = WORKLOADS[workload]
    results = measure(work, tuple(shape), options.device, methods, repeats, tick)
    if options.fits or (options.fits is None and not options.quick):
        find_largest(work, tuple(shape), options.device, results, tick)
    return {result.method: asdict(result) for result in results}
