"""Running experiments: what is chosen and not stored yet, one work after the other, each stored at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from inspect import getfile
from pathlib import Path

import torch

from . import store
from .experiment import Entries, Entry, Experiment, Options, Tick, Work

Choice = Sequence[str] | None  # names or patterns; None for all


def chosen(experiment: Experiment, options: Options, only: Choice, methods: Choice) -> list[Work]:
    """The works to measure, each with the methods that are asked for."""
    found = []
    for work in experiment.works(options):
        wanted = [method for method in work.methods if _matches(method, methods)]
        in_one_run = experiment.together or experiment.timed
        if in_one_run and wanted and work.methods[0] not in wanted:
            wanted.insert(0, work.methods[0])
        if wanted and _matches(work.name, only):
            found.append(Work(work.name, tuple(wanted), work.settings))
    return found


def run(
    experiment: Experiment, works: Iterable[Work], options: Options, path: Path, fresh: bool, tick: Tick
) -> Iterator[Work]:
    """Measure what is not stored, and store it; gives each work when it is done."""
    order = [f"{work.name} | {method}" for work in experiment.works(options) for method in work.methods]
    with _threads(experiment.threads):
        now = store.context(options.device, Path(getfile(experiment.works)))
        for work in works:
            circumstances = now if experiment.goes_stale else None
            parts = [(_measured, work)]
            if experiment.timed is not None:
                parts = [(_measured, work.without_times()), (_timed, work)]
            for measured, part in parts:
                stored = store.load(path)
                missing = _missing(part, {} if fresh else stored, circumstances)
                for found in measured(experiment, part, missing, options, tick, stored):
                    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "context": now}
                    entries = {f"{part.name} | {one}": part.settings | found[one] | about for one in found}
                    store.save(path, entries, order)
            yield work


def _missing(work: Work, stored: Entries, circumstances: Entry | None) -> tuple[str, ...]:
    return tuple(
        method
        for method in work.methods
        if not store.is_done(stored.get(f"{work.name} | {method}"), work.settings, circumstances)
    )


def _measured(
    experiment: Experiment,
    work: Work,
    missing: tuple[str, ...],
    options: Options,
    tick: Tick,
    _stored: Entries,
) -> Iterator[Entries]:
    if experiment.together is not None:
        if missing:
            yield experiment.together(work.methods, options, tick, **work.settings)
        return
    assert experiment.measure is not None
    for method in missing:
        what = f"{experiment.name}: {work.name}, {method}"
        tick(what)
        found = experiment.measure(
            method, options, lambda more, what=what: tick(f"{what}: {more}"), **work.settings
        )
        yield {method: found}


def _timed(
    experiment: Experiment,
    work: Work,
    missing: tuple[str, ...],
    options: Options,
    tick: Tick,
    stored: Entries,
) -> Iterator[Entries]:
    """Times of all methods that ran, where that of one of them is missing."""
    assert experiment.timed is not None
    own = {method: stored.get(f"{work.name} | {method}", {}) for method in work.methods}
    ran = tuple(method for method, entry in own.items() if "why_not" not in entry)
    if work.settings["repeats"] and any(method in ran for method in missing):
        times = experiment.timed(ran, options, tick, **work.settings)
        yield {method: own[method] | found for method, found in times.items()}


def _matches(name: str, patterns: Choice) -> bool:
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
