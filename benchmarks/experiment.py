"""What an experiment is: works, each measured under several methods, and how what was found is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .tables import Table

Entry = dict[str, Any]
Entries = dict[str, Entry]  # by "work | method"
Tick = Callable[[str], None]
Render = Callable[[Entries], list[Table]]


@dataclass(frozen=True)
class Options:
    """What the command line asks of every experiment.

    Args:
        quick: small shapes and few runs, to see that everything works.
        device: "cpu" or "cuda".
        repeats: timed steps of each method, after one to warm up; None for the experiment's own number.
            0 leaves the times for later, where they are measured apart from the rest.
        seeds: runs of each method that trains.
        folder: of N-MNIST.
        fits: whether to search for the largest batch or number of steps; None for the profile's choice.
    """

    quick: bool = False
    device: str = "cpu"
    repeats: int | None = None
    seeds: int = 3
    folder: Path = Path("../shared/data/nmnist")
    fits: bool | None = None

    def rounds(self, full: int, quick: int = 1, least: int = 1) -> int:
        own = quick if self.quick else full
        return max(least, own if self.repeats is None else self.repeats)


@dataclass(frozen=True)
class Work:
    """``settings`` are what the experiment's measure is called with, and stored in every entry.

    An entry with other settings is measured again.
    """

    name: str
    methods: tuple[str, ...]
    settings: Entry = field(default_factory=dict)

    def without_times(self) -> Work:
        """The same, of which nothing is repeated."""
        settings = {name: value for name, value in self.settings.items() if name != "repeats"}
        return replace(self, settings=settings)


@dataclass(frozen=True)
class Experiment:
    """A file of results, and what is made of it.

    Args:
        name: on the command line; the results' file is called after it.
        works: in the order of the tables.
        measure: called as ``measure(method, options, tick, **settings)``, gives the method's entry.
        together: instead, where the methods of a work are measured in one run, the first of them always:
            called with all methods, gives their entries.
        timed: beside ``measure``, where times are measured in one run when all else is stored: called with
            the methods that ran, the first of them always, gives what else goes into their entries.
        table: on the screen, and by the experiment's name on the pages.
        more: other tables by their names on the pages.
        draw: draws its pictures of the entries into a folder, for a device; returns their paths.
        goes_stale: measured again where code, versions or machine are others.
        threads: of torch; None for what the user has set.
    """

    name: str
    works: Callable[[Options], Iterable[Work]]
    table: Render
    measure: Callable[..., Entry] | None = None
    together: Callable[..., Entries] | None = None
    timed: Callable[..., Entries] | None = None
    more: Mapping[str, Render] = field(default_factory=dict)
    draw: Callable[[Entries, Path, str], list[Path]] = lambda _entries, _folder, _device: []
    goes_stale: bool = True
    threads: int | None = None

    @property
    def tables(self) -> dict[str, Render]:
        return {self.name: self.table, **self.more}

    def stem(self, device: str) -> str:
        """Of the file of its results."""
        if self.name == "steps":
            return device
        return self.name if device == "cpu" else f"{self.name}-{device}"
