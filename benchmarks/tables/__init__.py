"""One way to make a table: rows of text, for the terminal and in Markdown, so that both say the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.table import Table as Screen

MIB = 2**20
_NUMBER = re.compile(r"[\d.+\-−]|[NT] = |inf|equal|differs|$")


@dataclass(frozen=True)
class Table:
    """A table: columns of numbers stand to the right. ``notes`` are paragraphs below it.

    Example:
        >>> print(Table(("network", "MiB"), [("VGG", "19.4"), ("", "116.9")]).markdown())
        | network | MiB |
        |---|---:|
        | VGG | 19.4 |
        |  | 116.9 |
    """

    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str = ""
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """For a page."""
        marks = "".join("---:|" if right else "---|" for right in self._right())
        lines = [f"| {' | '.join(row)} |" for row in (self.headings, *self.rows)]
        table = "\n".join([lines[0], f"|{marks}", *lines[1:]]) if self.headings else ""
        heading = f"### {self.title}" if self.title else ""
        return "\n\n".join(filter(None, (heading, table, *self.notes)))

    def without_empty(self) -> Table:
        """Without columns in which nothing stands."""
        full = [at for at in range(len(self.headings)) if any(row[at] for row in self.rows)]
        headings = tuple(self.headings[at] for at in full)
        return replace(self, headings=headings, rows=[tuple(row[at] for at in full) for row in self.rows])

    def screen(self) -> Screen:
        """For the terminal."""
        table = Screen(title=self.title or None, caption="\n".join(self.notes) or None)
        for heading, right in zip(self.headings, self._right(), strict=True):
            table.add_column(heading, justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def _right(self) -> list[bool]:
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headings)
        return [all(_NUMBER.match(cell) for cell in column) for column in columns]


def note(text: str) -> Table:
    """A paragraph where a table would stand."""
    return Table((), [], notes=(text,))


def markdown(tables: Iterable[Table]) -> str:
    return "\n\n".join(table.markdown() for table in tables)


def mib(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value / MIB:,.{digits}f}"


def times(ratio: float | None, spread: tuple[float, float] | None = None) -> str:
    """A ratio, and its quartiles where they are given."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" + (f" ({spread[0]:.2f}-{spread[1]:.2f})" if spread else "")
