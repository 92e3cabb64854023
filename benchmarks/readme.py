"""Numbers in README and docs, written there from the stored results: ``python -m benchmarks.readme``.

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands a table of :data:`TABLES`. In prose a number is
written between ``<!-- value: PATH as FORMAT -->`` and ``<!-- end -->``, where PATH is a file of
benchmarks/results and the keys in it, or two paths and ``over``:

    <!-- value: cpu/vgg | memory/held as .1f MiB --><!-- end -->
    <!-- value: cpu/vgg | stock/held over cpu/vgg | memory/held as .1fx --><!-- end -->

:func:`problems` finds what is stale, and every number with a unit that stands elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import block_accuracy, drift_tables, surgery, tables, targets, time_accuracy, time_tables
from .rows import Rows
from .store import RESULTS, ROOT

Results = dict[str, Any]
TABLES: dict[str, Callable[[Results], str]] = {
    "main": lambda results: tables.main_table(results["cpu"]),
    "all": lambda results: tables.full_table(results["cpu"]),
    "behind": lambda results: tables.ours_against_peers(results["cpu"]),
    "methods": lambda results: tables.methods_table(results["cpu"]),
    "targets": lambda results: targets.table(results),
    "drift": lambda results: drift_tables.table(results.get("drift", {})),
    "surgery": lambda results: surgery.rows(results["surgery"]).markdown(),
    "coupled-times": lambda results: time_tables.coupled_times(results["coupled-node"]["times"]).markdown(),
    "coupled-held": lambda results: time_tables.coupled_held(results["coupled-node"]["held"]).markdown(),
    "sltt": lambda results: time_tables.sltt(results["sltt"]).markdown(),
    "long-sequences": lambda results: time_tables.long_sequences(results["long-sequences"]).markdown(),
    "time-accuracy": lambda results: time_accuracy.table(results["time-accuracy"]),
    "block-accuracy": lambda results: block_accuracy.table(results["block-accuracy"]),
    "all-cuda": lambda results: tables.full_table(results["cuda"]) if "cuda" in results else "None yet.",
}
for _name, _series in (
    ("blocks", "blocks"),
    ("time-leaky", "time steps of leaky-loop"),
    ("time-lif", "time steps of lif-loop"),
    ("batch", "batch of vgg"),
):
    for _figure in ("held", "peak"):

        def _growth(results: Results, render: Callable[..., str]) -> str:
            return render(results["cpu"])

        TABLES[f"{_name}-{_figure}"] = partial(_growth, render=tables.growth_table(_series, _figure))

for _name, _rows in time_tables.REVERSAL.items():

    def _reversal(results: Results, name: str, rows: Callable[..., Rows]) -> str:
        return rows(results["reversal-in-time"][name]).markdown()

    TABLES[f"reversal-{_name}"] = partial(_reversal, name=_name, rows=_rows)

# Numbers with units that nobody measured, by the page's words, and why.
NOT_MEASURED = {
    "1 bit": "the size of a packed spike, by construction",
    "4 bytes": "the size of a float32",
}

_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_VALUE = re.compile(
    r"(<!-- value: (.+?) as (,?\.\d+[fe%]|,?d) ?([\w/]*) -->)(.*?)(<!-- end -->)", re.DOTALL
)
_OTHER_MARKS = re.compile(r"<!--.*?-->", re.DOTALL)
_NOT_PROSE = re.compile(r"```.*?```|`[^`\n]*`|\]\([^)]*\)|^:::.*?(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
_UNITS = (
    r"x(?![\w])|×|%|percent|[KMG]iB|[kKMG]B|B|bytes?|bits?|ms|s|seconds?|minutes?|hours?|times|"
    r"(?:flipped )?spikes|flips|parameters"
)
_NUMBER = re.compile(rf"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?[  -]?(?:{_UNITS})(?!\w)")
_SCALE = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def pages(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("**/*.md"))]


def load_all(folder: Path = RESULTS) -> Results:
    """Every results file by its stem; where it has "results", those."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {
        stem: data.get("results", data) if isinstance(data, dict) else data for stem, data in found.items()
    }


def rendered(text: str, results: Results) -> str:
    """A page with every table and value as the results have them now."""

    def of_table(match: re.Match[str]) -> str:
        try:
            table = TABLES[match[2]](results)
        except KeyError as missing:
            if missing.args[0] in results:
                raise
            table = "Not measured yet."
        return f"{match[1]}{table}\n{match[3]}"

    def of_value(match: re.Match[str]) -> str:
        return f"{match[1]}{value(match[2], match[3], match[4], results)}{match[6]}"

    return _VALUE.sub(of_value, _TABLE.sub(of_table, text))


def value(path: str, form: str, unit: str, results: Results) -> str:
    """The number at a path, or the ratio of two.

    Example:
        >>> value("cpu/a/held over cpu/b/held", ".1f", "x", {"cpu": {"a": {"held": 9}, "b": {"held": 2}}})
        '4.5x'
        >>> value("cpu/a/held", ".1f", "MiB", {"cpu": {"a": {"held": 3145728}}})
        '3.0 MiB'
    """
    numerator, *denominators = (_at(part.strip(), results) for part in path.split(" over "))
    for denominator in denominators:
        numerator /= denominator
    space = "" if unit in ("", "x") else " "
    number = numerator / _SCALE.get(unit, 1)
    return f"{round(number) if form.endswith('d') else number:{form}}{space}{unit}"


def _at(path: str, results: Results) -> float:
    found: Any = results
    for key in path.split("/"):
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, ValueError):
            raise KeyError(f"benchmarks/results has no {path!r}: it ends at {key!r}") from None
    return found  # type: ignore[no-any-return]


def fill(root: Path = ROOT) -> list[Path]:
    """Write the present numbers into every page; returns those that changed."""
    results, changed = load_all(), []
    for page in pages(root):
        text = page.read_text()
        if (new := rendered(text, results)) != text:
            page.write_text(new)
            changed.append(page)
    return changed


def problems(text: str, results: Results) -> list[str]:
    """What is wrong with the numbers of a page: stale ones, and those that come from nowhere."""
    found: list[str] = []
    if rendered(text, results) != text:
        found.append("its numbers are not those of benchmarks/results: run python -m benchmarks.readme")
    return found + [f"{number!r} is in no results file" for number in loose_numbers(text)]


def loose_numbers(text: str, allowed: dict[str, str] = NOT_MEASURED) -> list[str]:
    """Numbers with a unit outside tables and values that the results fill, and outside code."""
    text = _OTHER_MARKS.sub(" ", _VALUE.sub(" ", _TABLE.sub(" ", text)))
    text = _NOT_PROSE.sub(" ", text)
    return [match[0] for match in _NUMBER.finditer(text) if match[0] not in allowed]


if __name__ == "__main__":
    for page in fill():
        print(page.relative_to(ROOT))
