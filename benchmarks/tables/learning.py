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
    entries: Entries, arms: Sequence[str], data: Mapping[str, str], equals: Mapping[str, str]
) -> list[Table]:
    """Test accuracy, mean and standard deviation over the seeds, a row a network, a column a data set.

    ``equals`` are the arms whose losses have to be those of another.
    """
    rows = []
    for arm in arms:
        cells = []
        for name in data:
            found = [100 * entry["accuracy"] for entry in runs_of(entries, arm, name)]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread} % ({len(found)})" if found else "")
        if every := runs_of(entries, arm):
            rows.append((arm, f"{every[0]['parameters']:,}", *cells))
    headings = ("network", "parameters", *data.values())
    return [Table(headings, rows, notes=tuple(_equal_losses(entries, equals)))]


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
