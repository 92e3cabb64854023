"""What the project set out to reach (targets.toml) beside what was measured, for those who work on it."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from .pages import Results, number_at
from .tables import Table

SIGNS = {"at_most": "≤", "at_least": "≥"}


class Target(NamedTuple):
    """A bound of a figure, and where in the results it stands."""

    sign: str
    work: str
    figure: str
    bound: float
    path: str

    def measured(self, results: Results) -> float | None:
        """None where a figure is missing."""
        try:
            above, *below = (_worst(part.strip(), results) for part in self.path.split(" over "))
            return above / below[0] if below else above
        except KeyError:
            return None

    def is_reached(self, found: float | None) -> bool:
        return found is not None and (found <= self.bound if self.sign == "≤" else found >= self.bound)


def _worst(path: str, results: Results) -> float:
    stem, pattern, *rest = path.split("/")
    keys = [key for key in results.get(stem, {}) if fnmatchcase(key, pattern)] or [pattern]
    return max(number_at("/".join((stem, key, *rest)), results) for key in keys)


_FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
TARGETS = [Target(SIGNS[kind], *row) for kind, rows in _FILE.items() for row in rows]


def table(results: Results) -> Table:
    """Every target. One that is missed says so."""
    rows = []
    for target in TARGETS:
        found = target.measured(results)
        cells = (
            ("not measured", "")
            if found is None
            else (f"{found:,.4g}", "reached" if target.is_reached(found) else "missed")
        )
        rows.append((target.work, f"{target.figure} {target.sign} {target.bound:g}", *cells))
    return Table(("work", "to reach", "measured", ""), rows)
