"""Results on disk: one JSON file a device and profile, each entry with its circumstances.

A workload is measured again when what decides its figures has changed: code, versions, device, threads,
shape. That is how an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .measure import Result
from .methods import METHODS
from .workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DRAFTS = ROOT / "out" / "benchmarks"
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
_DECIDING = (
    "src/snn_reversible_plugin/**/*.py",
    *(
        f"benchmarks/{name}.py"
        for name in ("networks", "workloads", "methods", "checkpointed", "published")
    ),
    *(f"benchmarks/{name}.py" for name in ("measure", "search")),
)

Entry = dict[str, Any]


def path_of(device: str, profile: str) -> Path:
    """Full results are committed; those of the quick profile are nobody's numbers."""
    return RESULTS / f"{device}.json" if profile == "full" else DRAFTS / f"{device}.json"


def load(path: Path) -> dict[str, Entry]:
    """All entries, by "workload | method"."""
    return json.loads(path.read_text())["results"] if path.exists() else {}


def save(path: Path, results: Iterable[Result], shape: tuple[int, ...], context: Entry) -> None:
    """Merge into what is stored."""
    stored = load(path)
    for result in results:
        stored[f"{result.workload} | {result.method}"] = result.to_dict() | {
            "shape": list(shape),
            "context": context,
        }
    order = [f"{name} | {method}" for name in WORKLOADS for method in METHODS]
    ordered = {key: stored[key] for key in order if key in stored}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps({"results": ordered}, indent=1) + "\n")
    half.replace(path)  # an interruption leaves the old file or the new one


def write(name: str, found: Entry, **circumstances: Any) -> Path:
    """Store the results of a benchmark that is run as a whole."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"context": circumstances, "results": found}, indent=1) + "\n")
    return path


def read(name: str) -> Entry:
    """What :func:`write` stored; empty where nothing is."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}  # type: ignore[no-any-return]


def context(device: str, repeats: int) -> Entry:
    return machine(device) | {"repeats": repeats, "code": code()}


def machine(device: str) -> Entry:
    """Where and with what something is measured."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "versions": {name: version(name) for name in ("torch", "spikingjelly", "snntorch")},
    }


def settle() -> None:
    """Start the process again with the allocator's settings, where it was started without.

    Memory that is freed then stays with the process. Otherwise each large tensor is mapped, faulted in page
    by page and unmapped again, and on a virtual machine that, not arithmetic, is what the clock sees.
    """
    if sys.platform == "linux" and not all(name in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)


def is_done(
    stored: dict[str, Entry], workload: str, methods: Iterable[str], shape: tuple[int, ...], now: Entry
) -> bool:
    """Whether every method of the workload is stored, measured in the present circumstances."""
    same = [key for key in now if key not in ("date", "repeats")]
    for method in methods:
        entry = stored.get(f"{workload} | {method}")
        if entry is None or tuple(entry["shape"]) != shape:
            return False
        then = entry["context"]
        if any(then.get(key) != now[key] for key in same) or then["repeats"] < now["repeats"]:
            return False
    return True


@cache
def code() -> str:
    """A short name for the code that the figures depend on."""
    digest = hashlib.sha256()
    for pattern in _DECIDING:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
