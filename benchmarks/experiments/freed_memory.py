"""What keep_freed_memory() does to a step's time, stock and converted: in processes, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from statistics import median

from .. import store
from ..experiment import Entries, Options, Tick, Work
from ..measure import ratio
from ..workloads import WORKLOADS

SHOWN = ("vgg", "sew-resnet18", "spikformer")
METHODS = ("stock", "stock, kept", "memory", "memory, kept")
STEPS = 5
_STEP = """
import sys, time, torch
import snn_reversible_plugin as srp
from benchmarks.workloads import WORKLOADS
name, shape, method, steps = sys.argv[1:]
mode, _, kept = method.partition(", ")
if kept:
    srp.keep_freed_memory()
torch.manual_seed(0)
torch.set_num_threads(1)
workload = WORKLOADS[name]
model, x = workload.make(), workload.batch(tuple(map(int, shape.split(","))), "cpu")
if mode != "stock":
    srp.convert_to_reversible(model, mode=mode)
for _ in range(1 + int(steps)):
    model.zero_grad()
    start = time.perf_counter()
    workload.loss_of(model, x).backward()
    print(time.perf_counter() - start)
"""


def works(options: Options) -> Iterator[Work]:
    for name in SHOWN:
        if shape := WORKLOADS[name].shape(options.quick):
            yield Work(
                name, METHODS, {"workload": name, "shape": list(shape), "repeats": options.rounds(5, 1)}
            )


def together(
    methods: Sequence[str],
    options: Options,
    tick: Tick,
    workload: str,
    shape: list[int],
    repeats: int,
) -> Entries:
    """Without the environment's settings of the allocator; ratios to stock's of the same round."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    steps = 1 if options.quick else STEPS
    for _ in range(repeats):
        for method, found in seconds.items():
            tick(f"{workload}: {method}")
            found.append(_seconds(method, workload, shape, steps))
    return {
        method: {"method": method, "seconds": found, "time_ratio": ratio(found, seconds["stock"])}
        for method, found in seconds.items()
    }


def _seconds(method: str, workload: str, shape: list[int], steps: int) -> float:
    """The median of the steps after the first."""
    environment = {name: value for name, value in os.environ.items() if name not in store.ALLOCATOR}
    command = [sys.executable, "-c", _STEP, workload, ",".join(map(str, shape)), method, str(steps)]
    done = subprocess.run(
        command, env=environment, cwd=store.ROOT, capture_output=True, text=True, check=True
    )
    return median(map(float, done.stdout.split()[1:]))
