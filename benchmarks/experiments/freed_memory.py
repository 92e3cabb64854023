"""What glibc's settings do to a step's time and to what the process takes, stock and converted.

Each in a process of its own, in turns. *kept* is :func:`srp.keep_freed_memory`. *uncached* is without
glibc's caches of small freed blocks: these don't join the free block beside them, and what is cut off to
align a tensor is such a block, so that the place of a freed tensor is too small for the next of its size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from statistics import median

from .. import store
from ..experiment import Entries, Options, Tick, Work
from ..measure import ratio
from ..workloads import WORKLOADS

SHOWN = ("vgg", "sew-resnet18", "spikformer", "leaky-loop-t1024")
SETTINGS = ("", ", kept", ", uncached")
METHODS = tuple(mode + setting for mode in ("stock", "memory") for setting in SETTINGS)
UNCACHED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}
STEPS = 5
_STEP = """
import json, sys, time, torch
from pathlib import Path
import snn_reversible_plugin as srp
from benchmarks.workloads import WORKLOADS
name, shape, method, steps = sys.argv[1:]
mode, _, setting = method.partition(", ")
if setting == "kept":
    srp.keep_freed_memory()
torch.manual_seed(0)
torch.set_num_threads(1)
workload = WORKLOADS[name]
model, x = workload.make(), workload.batch(tuple(map(int, shape.split(","))), "cpu")
if mode != "stock":
    srp.convert_to_reversible(model, mode=mode)

def status(name):
    return 1024 * int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

def step(x):
    model.zero_grad()
    start = time.perf_counter()
    workload.loss_of(model, x).backward()
    return time.perf_counter() - start

step(x[:2])  # what is loaded and compiled is not what a step takes
before = status("VmRSS")
seconds = [step(x) for _ in range(1 + int(steps))]
print(json.dumps([seconds[1:], status("VmHWM") - before]))
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
    process: dict[str, list[int]] = {method: [] for method in methods}
    steps = 1 if options.quick else STEPS
    for _ in range(repeats):
        for method, found in seconds.items():
            tick(f"{workload}: {method}")
            took, grew = _run(method, workload, shape, steps)
            found.append(took)
            process[method].append(grew)
    return {
        method: {
            "method": method,
            "seconds": found,
            "time_ratio": ratio(found, seconds["stock"]),
            "process": int(median(process[method])),
        }
        for method, found in seconds.items()
    }


def _run(method: str, workload: str, shape: list[int], steps: int) -> tuple[float, int]:
    """The median time of the steps after the first, and by how much the process grew in all of them."""
    environment = {name: value for name, value in os.environ.items() if name not in store.ALLOCATOR}
    environment |= UNCACHED if method.endswith("uncached") else {}
    command = [sys.executable, "-c", _STEP, workload, ",".join(map(str, shape)), method, str(steps)]
    done = subprocess.run(
        command, env=environment, cwd=store.ROOT, capture_output=True, text=True, check=True
    )
    seconds, grew = json.loads(done.stdout.splitlines()[-1])
    return median(seconds), grew
