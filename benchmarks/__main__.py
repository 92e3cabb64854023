"""``python -m benchmarks``: measure, store and show; see ``run --help``."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import pages, running, store, targets
from .experiment import Options
from .experiments import EXPERIMENTS
from .pictures import IMAGES

app = typer.Typer(help="Stock, its peers and this package, measured in the same run.")


class Profile(StrEnum):
    """quick: small shapes, nothing written that is committed."""

    quick = "quick"
    full = "full"


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"experiments: {', '.join(EXPERIMENTS)}; all by default")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="works by name or pattern, e.g. 'chain-*'")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="methods by name or pattern; what they are compared with is added"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    profile: Annotated[Profile, typer.Option(help="shapes and repeats")] = Profile.full,
    repeats: Annotated[int | None, typer.Option(help="timed steps of each, after one to warm up")] = None,
    seeds: Annotated[int, typer.Option(help="runs of each method that trains")] = 3,
    folder: Annotated[
        Path, typer.Option(help="of N-MNIST; without it, what needs it is left out")
    ] = Options.folder,
    fits: Annotated[
        bool | None,
        typer.Option(help="search for the largest batch or number of steps that fits; full profile: on"),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="measure again what is stored")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="folder for results and pictures; then no page is written"),
    ] = None,
) -> None:
    """Measure what is not stored yet for the same code and versions, and print all that is stored."""
    if unknown := set(names or ()) - set(EXPERIMENTS):
        raise typer.BadParameter(f"unknown: {sorted(unknown)}; there are {[*EXPERIMENTS]}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here")
    quick = profile is Profile.quick
    options = Options(quick, device, repeats, seeds, folder, fits)
    results = out or (store.DRAFTS if quick else store.RESULTS)
    images = IMAGES if results == store.RESULTS else results
    experiments = [EXPERIMENTS[name] for name in names or EXPERIMENTS]
    works = {one.name: running.chosen(one, options, only, method) for one in experiments}
    if not any(works.values()):
        raise typer.BadParameter(f"no work in the profile {profile.value} matches {only} and {method}")
    console = _console()
    columns = (TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(map(len, works.values())))
        for experiment in experiments:
            path = results / f"{experiment.stem(device)}.json"
            for _ in running.run(
                experiment, works[experiment.name], options, path, fresh,
                lambda what: progress.update(task, description=what),
            ):  # fmt: skip
                progress.advance(task)
    written = []
    for experiment in experiments:
        path = results / f"{experiment.stem(device)}.json"
        if entries := store.load(path):
            for table in experiment.table(entries):
                console.print(table.screen())
            written += [path, *experiment.draw(entries, images, device)]
    if results == store.RESULTS:
        written += pages.fill()
    console.print("written:", *map(str, written))


@app.command(name="pages")
def fill_pages() -> None:
    """Write the stored numbers into README and docs, and draw every picture."""
    drawn: list[Path] = []
    for experiment in EXPERIMENTS.values():
        for device in ("cpu", "cuda"):
            if entries := store.load(store.RESULTS / f"{experiment.stem(device)}.json"):
                drawn += experiment.draw(entries, IMAGES, device)
    for path in (*drawn, *pages.fill()):
        print(path)


@app.command(name="targets")
def show_targets() -> None:
    """Print what the project set out to reach beside what is stored; fails where something is missed."""
    results = pages.load_all()
    _console().print(targets.table(results).screen())
    if not all(target.is_reached(target.measured(results)) for target in targets.TARGETS):
        raise typer.Exit(1)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)  # in a file, lines as wide as tables are


if __name__ == "__main__":
    store.settle()
    app(prog_name="python -m benchmarks")
