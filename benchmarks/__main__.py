"""``python -m benchmarks``: every workload under every method, as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .measure import MIB, Result, measure
from .methods import METHODS
from .picture import draw
from .readme import update
from .workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
# Memory that is freed stays with the process. Otherwise each large tensor is mapped, faulted in page by
# page and unmapped again, and on a virtual machine that, not arithmetic, is what the clock sees.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def main(
    only: Annotated[list[str] | None, typer.Option(help="workloads to run; all by default")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    repeats: Annotated[int, typer.Option(help="timed steps of each method, after one warm-up")] = 5,
    save: Annotated[bool, typer.Option(help="write benchmarks/results and the picture")] = True,
) -> None:
    """Measure memory and time of a training step, stock beside SpikingJelly's memopt and this package."""
    names = only or list(WORKLOADS)
    unknown = set(names) - set(WORKLOADS)
    if unknown:
        raise typer.BadParameter(f"unknown: {sorted(unknown)}; there are {sorted(WORKLOADS)}")
    console = Console()
    results: list[Result] = []
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(names) * len(METHODS) * (repeats + 2))

        def tick(what: str) -> None:
            progress.update(task, description=what, advance=1)

        for name in names:
            results += measure(WORKLOADS[name], device, repeats, tick)
            if save:
                _save(results, device, repeats)
    console.print(_table(results))
    if save:
        written = [_save(results, device, repeats), draw(_load(device), device)]
        if device == "cpu":
            written.append(update(_load(device)))
        console.print("written:", *written)


def _table(results: list[Result]) -> Table:
    table = Table(title="Training step: memory beyond parameters and inputs (MiB), time against stock")
    for heading in ("workload", "method", "held", "peak", "time", "B a neuron and step", "gradients"):
        table.add_column(heading, justify="left" if heading in ("workload", "method") else "right")
    for result in results:
        if result.method == "stock":
            table.add_section()
        if result.held is None or result.peak is None or result.time_ratio is None:
            table.add_row(result.workload, result.method, result.why_not)
            continue
        each = result.bytes_a_neuron_step
        table.add_row(
            result.workload,
            result.method,
            f"{result.held / MIB:,.1f}",
            f"{result.peak / MIB:,.1f}",
            f"{result.time_ratio:.2f}x",
            "" if each is None else f"{each:.2f}",
            "equal" if result.gradient_difference == 0 else f"{result.gradient_difference:.1e} off",
        )
    return table


def _path(device: str) -> Path:
    return RESULTS / f"{device}.json"


def _load(device: str) -> dict[str, dict[str, object]]:
    path = _path(device)
    return json.loads(path.read_text())["results"] if path.exists() else {}


def _save(results: list[Result], device: str, repeats: int) -> Path:
    """Merge into the stored results, so that workloads can be run one by one."""
    RESULTS.mkdir(exist_ok=True)
    stored = _load(device)
    context = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "allocator": {name: os.environ.get(name) for name in ALLOCATOR},
        "repeats": repeats,
        "versions": {name: version(name) for name in ("torch", "spikingjelly", "snntorch")},
    }
    for result in results:
        shape = list(WORKLOADS[result.workload].shape)
        stored[f"{result.workload} | {result.method}"] = result.to_dict() | {
            "shape": shape,
            "context": context,
        }
    path = _path(device)
    ordered = {
        key: stored[key]
        for key in (f"{name} | {method}" for name in WORKLOADS for method in METHODS)
        if key in stored
    }
    path.write_text(json.dumps({"results": ordered}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    if sys.platform == "linux" and not all(name in os.environ for name in ALLOCATOR):
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)
    typer.run(main)
