"""Long sequences under a limit on memory, by three methods.

Each run is a process of its own that trains examples/long_sequences.py after limiting its data segment
(RLIMIT_DATA) to what it holds once everything is loaded, plus the limit. What fails is shown with its
error.
"""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from typing import Any

import torch

from ..apart import Died, apart
from ..experiment import Entry, Options, Tick, Work
from ..store import ROOT

# The frames that loading leaves behind go back to the system, or a run could use them beyond its limit;
# the tensors of a step stay with the process, or page faults would be what the clock sees.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**18),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_MAX_": None,
}
# Tasks of the example, each with a limit in MB between what stock and the converted network need.
CASES: tuple[Entry, ...] = (
    {"task": "pixels", "network": "recurrent", "steps": 1024, "limit_mb": 250, "epochs": 5, "batch": 96},
    {"task": "pixels", "network": "feed-forward", "steps": 1024, "limit_mb": 450, "epochs": 4, "batch": 96},
    {"task": "pixels", "network": "recurrent", "steps": 5056, "limit_mb": 1200, "epochs": 2, "batch": 96},
    {
        "task": "saccades",
        "network": "feed-forward",
        "steps": 315,
        "limit_mb": 110,
        "epochs": 4,
        "batch": 96,
    },
    {"task": "nmnist", "network": "feed-forward", "steps": 300, "limit_mb": 90, "epochs": 6, "batch": 64},
)
QUICK: tuple[Entry, ...] = (
    {"task": "pixels", "network": "feed-forward", "steps": 64, "limit_mb": 100, "epochs": 1, "batch": 8},
)


def works(options: Options) -> Iterator[Work]:
    for case in QUICK if options.quick else CASES:
        there = case["task"] != "nmnist" or options.folder.is_dir()
        if there and options.device == "cpu":  # the limit is on the process's own memory
            name = f"{case['task']}-{case['steps']}-{case['network']}"
            yield Work(name, ("stock", "reversible", "sltt"), case)


def measure(method: str, options: Options, _tick: Tick, **case: Any) -> Entry:
    limit = 16 if options.quick else None
    arguments = {**case, "method": method, "folder": options.folder, "limit": limit}
    try:
        found: Entry = apart(_trained, arguments, environment=ALLOCATOR)
    except Died as how:
        found = {"error": str(how)}
    return {"method": method} | found


def _trained(_tick: Tick, arguments: Entry) -> Entry:
    """What the example gives, or the error that ended it."""
    torch.set_num_threads(1)
    example = runpy.run_path(str(ROOT / "examples" / "long_sequences.py"))
    try:
        return example["main"](**arguments)  # type: ignore[no-any-return]
    except (RuntimeError, MemoryError, OverflowError) as error:
        return {"error": f"{type(error).__name__}: {re.sub(chr(10) + '.*', '', str(error))}"}
