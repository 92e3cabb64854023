"""``python -m benchmarks``: every workload under every method, as tables, JSON and pictures."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatch
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import picture, readme, store, tables
from .measure import measure
from .methods import METHODS
from .search import find_largest
from .workloads import WORKLOADS


class Profile(StrEnum):
    """quick: small shapes, two minutes on two cores, nothing written that is committed."""

    quick = "quick"
    full = "full"


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="workloads by name or pattern, e.g. 'chain-*'")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="methods by name or pattern; stock is added")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    profile: Annotated[Profile, typer.Option(help="shapes and repeats")] = Profile.full,
    repeats: Annotated[
        int | None, typer.Option(help="timed steps of each, after one warm-up: 5, quick 2")
    ] = None,
    fresh: Annotated[
        bool, typer.Option(help="measure again what is stored for the same code and versions")
    ] = False,
    fits: Annotated[
        bool | None,
        typer.Option(help="search for the largest batch or number of steps that fits; full profile: on"),
    ] = None,
    save: Annotated[
        bool, typer.Option(help="write the JSON, the pictures and the tables in README and docs")
    ] = True,
) -> None:
    """Measure memory and time of a training step: stock, its peers, and this package, in one run."""
    console = Console()
    shapes = {
        workload.name: shape
        for workload in WORKLOADS.values()
        if (shape := workload.shape(profile.value)) and _wanted(workload.name, only)
    }
    methods = [name for name in METHODS if name == "stock" or _wanted(name, method)]
    if not shapes:
        raise typer.BadParameter(
            f"no workload of {sorted(WORKLOADS)} in the profile {profile.value} matches {only}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here")
    repeats = repeats or (5 if profile is Profile.full else 2)
    context, path = store.context(device, repeats), store.path_of(device, profile.value)
    stored = {} if fresh or not save else store.load(path)
    todo = {
        name: shape for name, shape in shapes.items()
        if not store.is_done(stored, name, methods, shape, context)
    }  # fmt: skip
    if len(todo) < len(shapes):
        console.print(
            f"{len(shapes) - len(todo)} of {len(shapes)} workloads are stored; --fresh measures them again"
        )
    found = {key: entry for key, entry in stored.items() if entry["workload"] in shapes}
    columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        workloads = progress.add_task("workloads", total=len(todo))
        steps = progress.add_task("")
        for name, shape in todo.items():
            progress.reset(steps, total=len(methods) * (repeats + 2), description=name)

            def tick(what: str) -> None:
                progress.update(steps, description=what, advance=1)

            results = measure(WORKLOADS[name], shape, device, methods, repeats, tick)
            if fits or (fits is None and profile is Profile.full):
                find_largest(WORKLOADS[name], shape, device, results, tick)
            if save:
                store.save(path, results, shape, context)
            for result in results:
                found[f"{name} | {result.method}"] = result.to_dict() | {
                    "shape": list(shape),
                    "context": context,
                }
            progress.advance(workloads)
    console.print(tables.console(found))
    if not save:
        return
    written = [path]
    if profile is Profile.full:
        written += [*picture.draw_all(store.load(path), device), *readme.fill()]
    else:
        written += picture.draw_all(store.load(path), device, store.DRAFTS)
    console.print("written:", *(str(file.relative_to(store.ROOT)) for file in written))


def _wanted(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatch(name, pattern) for pattern in patterns)


if __name__ == "__main__":
    store.settle()
    typer.run(main)
