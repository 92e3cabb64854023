"""Tables of what networks learn: accuracies over seeds, and runs whose losses have to be equal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from ..experiment import Entries, Entry
from . import Table


def runs_of(entries: Entries, method: str, data: str = "") -> list[Entry]:
    """The entries of all seeds."""
    return [e for key, e in entries.items() if key.startswith(data) and key.endswith(f" | {method}")]


def by_data(
    entries: Entries,
    arms: Sequence[str],
    data: Mapping[str, str],
    equals: Mapping[str, str],
    less: Mapping[str, str] | None = None,
) -> list[Table]:
    """Test accuracy, mean and standard deviation over the seeds, a row a network, a column a data set.

    ``equals`` are the arms whose losses have to be those of another; ``less`` those whose accuracy is
    compared with another's seed by seed.
    """
    rows = []
    for arm in arms:
        cells = [
            _deviation([entry["accuracy"] for entry in runs_of(entries, arm, name)], count=True)
            for name in data
        ]
        if every := runs_of(entries, arm):
            rows.append((arm, f"{every[0]['parameters']:,}", *cells))
    headings = ("network", "parameters", *data.values())
    notes = (*_equal_losses(entries, equals), *_differences(entries, data, less or {}))
    return [Table(headings, rows, notes=notes)]


def _differences(entries: Entries, data: Mapping[str, str], less: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each two arms: how far they are apart, with the standard error over the seeds."""
    for arm, other in less.items():
        found = []
        for name, title in data.items():
            apart = [
                100 * (entry["accuracy"] - entries[f"{key.removesuffix(arm)}{other}"]["accuracy"])
                for key, entry in entries.items()
                if key.startswith(name) and key.endswith(f" | {arm}")
                and f"{key.removesuffix(arm)}{other}" in entries
            ]  # fmt: skip
            if len(apart) > 1:
                error = statistics.stdev(apart) / len(apart) ** 0.5
                found.append(
                    f"{statistics.mean(apart):+.1f} ± {error:.1f} points over {len(apart)} seeds on {title}"
                )
        if found:
            yield f"{arm} less {other}, seed by seed, with the mean's standard error: {', '.join(found)}."


def tuned(
    entries: Entries, networks: Sequence[str], arms: Sequence[str], data: Mapping[str, str]
) -> list[Table]:
    """Test accuracy of what a trained network became, as it is trained on; mean, deviation, seeds."""
    rows, after = [], list(next(iter(entries.values()))["after"]) if entries else []
    for name, title in data.items():
        for network in networks:
            for arm in arms:
                if runs := runs_of(entries, arm, f"{name}, {network},"):
                    figures = [[run["trained"] for run in runs], [run["at_once"] for run in runs]]
                    figures += [[run["anew"] for run in runs]]
                    figures += [[run["after"][epochs] for run in runs] for epochs in after]
                    rows.append((title, network, arm, str(len(runs)), *map(_deviation, figures)))
    epochs = (f"{one} epoch{'s' * (one != '1')}" for one in after)
    headings = ("data", "network", "goes on as", "seeds", "trained", "at once", "statistics anew", *epochs)
    return [Table(headings, rows)]


def _deviation(accuracies: Sequence[float], count: bool = False) -> str:
    if not accuracies:
        return ""
    found = [100 * one for one in accuracies]
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.1f}{spread} %" + (f" ({len(found)})" if count else "")


def _equal_losses(entries: Entries, equals: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each two arms: in how many runs their losses are equal."""
    for arm, plain in equals.items():
        pairs = [
            (entry["losses"], entries[other]["losses"])
            for key, entry in entries.items()
            if key.endswith(f" | {arm}") and (other := f"{key.removesuffix(arm)}{plain}") in entries
        ]
        if pairs:
            runs = f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)} runs"
            yield f"{arm}: losses equal to those of {plain}, bit for bit, in {runs}."


def by_method(entries: Entries, methods: Sequence[str]) -> list[Table]:
    """Training and test accuracy, mean and range over the seeds."""
    rows = []
    for method in methods:
        runs = runs_of(entries, method)
        both = [_spread(runs, f"{part}_accuracy") for part in ("training", "test")]
        rows.append((method, str(len(runs)), *both))
    return [Table(("trained by", "seeds", "training accuracy", "test accuracy"), rows)]


def _spread(runs: list[Entry], of: str) -> str:
    values = [100 * run[of] for run in runs]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f} %"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"
