"""Rows of text as a table for the terminal and as one in Markdown, so that both say the same."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rich.table import Table

_NUMBER = re.compile(r"[\d.+\-−]|inf|equal|differs|$")


@dataclass(frozen=True)
class Rows:
    """A table: columns of numbers stand to the right.

    Example:
        >>> print(Rows(("network", "MiB"), [("VGG", "19.4"), ("", "116.9")]).markdown())
        | network | MiB |
        |---|---:|
        | VGG | 19.4 |
        |  | 116.9 |
    """

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """For a page."""
        marks = "".join("---:|" if right else "---|" for right in self._right())
        lines = [f"| {' | '.join(row)} |" for row in (self.headings, *self.rows)]
        return "\n".join([lines[0], f"|{marks}", *lines[1:]])

    def rich(self, title: str) -> Table:
        """For the terminal."""
        table = Table(title=title)
        for heading, right in zip(self.headings, self._right(), strict=True):
            table.add_column(heading, justify="right" if right else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def _right(self) -> list[bool]:
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headings)
        return [all(_NUMBER.match(cell) for cell in column) for column in columns]
