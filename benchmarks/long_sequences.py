"""``python -m benchmarks.long_sequences``: long sequences under a limit on memory, by three methods.

Each run is a process of its own that trains examples/long_sequences.py after limiting its data segment
(RLIMIT_DATA) to what it holds once everything is loaded, plus the limit. What fails is shown with its
error.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing as mp
import os
import re
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from . import time_tables

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "long-sequences.json"
METHODS = ("stock", "reversible", "sltt")
# The frames that loading leaves behind go back to the system, or a run could use them beyond its limit;
# the tensors of a step stay with the process, or page faults would be what the clock sees.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Case(NamedTuple):
    """A task of the example, and a limit in MB between what stock and the converted network need."""

    task: str
    network: str
    steps: int
    limit_mb: int
    epochs: int
    batch: int = 96


CASES = {
    "pixels-1024": Case("pixels", "recurrent", 1024, 250, 5),
    "pixels-1024-feed-forward": Case("pixels", "feed-forward", 1024, 300, 4),
    "pixels-5056": Case("pixels", "recurrent", 5056, 1200, 2),
    "saccades-315": Case("saccades", "feed-forward", 315, 110, 4),
    "nmnist-300": Case("nmnist", "feed-forward", 300, 90, 6, batch=64),
}


def main(
    only: Annotated[list[str] | None, typer.Option(help="cases to run; all by default")] = None,
    method: Annotated[list[str] | None, typer.Option(help="methods to run; all by default")] = None,
    epochs: Annotated[int | None, typer.Option(help="instead of each case's own number")] = None,
    folder: Annotated[Path, typer.Option(help="N-MNIST's")] = ROOT / "../shared/data/nmnist",
    seed: int = 0,
) -> None:
    """Train on long sequences, in a process whose memory is limited."""
    names, methods = only or list(CASES), method or METHODS
    if unknown := set(names) - set(CASES) | set(methods) - set(METHODS):
        raise typer.BadParameter(f"unknown: {sorted(unknown)}; there are {[*CASES]} and {[*METHODS]}")
    console = Console()
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        case = CASES[name]
        if case.task == "nmnist" and not folder.is_dir():
            console.print(f"{name} left out: no N-MNIST in {folder}")
            continue
        for one in methods:
            with console.status(f"{name}, {one}"):
                stored[f"{name} | {one}"] = _run(case, one, epochs, folder, seed)
            RESULTS.parent.mkdir(exist_ok=True)
            ordered = {
                key: stored[key] for key in (f"{c} | {m}" for c in CASES for m in METHODS) if key in stored
            }
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    console.print(time_tables.long_sequences(stored).rich("Training under a limit on the process's memory"))


def _run(case: Case, method: str, epochs: int | None, folder: Path, seed: int) -> dict[str, Any]:
    arguments = case._asdict() | {"method": method, "folder": folder, "seed": seed}
    arguments["epochs"] = epochs or case.epochs
    ours, theirs = mp.get_context("spawn").Pipe()
    child = mp.get_context("spawn").Process(target=_child, args=(theirs, arguments))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
        child.join()
    except EOFError:
        child.join()
        found = {"error": f"the process died with exit code {child.exitcode}"}
    return found | {
        **{key: value for key, value in arguments.items() if key != "folder"},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("torch", "snntorch")},
    }


def _child(pipe: Any, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "long_sequences.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    try:
        result = example.train(**arguments)
    except (RuntimeError, MemoryError, OverflowError) as error:
        pipe.send({"error": f"{type(error).__name__}: {re.sub(chr(10) + '.*', '', str(error))}"})
        return
    pipe.send(result)


if __name__ == "__main__":
    if os.environ.pop("MALLOC_MMAP_MAX_", None) or not all(name in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)
    typer.run(main)
