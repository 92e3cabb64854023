"""Numbers in README and docs, written there from the stored results: ``python -m benchmarks pages``.

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands a table of an experiment; NAME-cuda is the same
on a GPU. In prose a number is written between ``<!-- value: PATH as FORMAT -->`` and ``<!-- end -->``,
where PATH is a file of benchmarks/results and the keys in it, or two paths and ``over``:

    <!-- value: cpu/vgg | memory/held as .1f MiB --><!-- end -->
    <!-- value: cpu/vgg | stock/held over cpu/vgg | memory/held as .1fx --><!-- end -->

:func:`problems` finds what is stale, and every number with a unit that stands elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .experiment import Entries
from .experiments import EXPERIMENTS
from .store import RESULTS, ROOT, load
from .tables import Table, markdown

Results = dict[str, Entries]
TABLES = {
    f"{name}{suffix}": (experiment.stem(device), render)
    for experiment in EXPERIMENTS.values()
    for device, suffix in (("cpu", ""), ("cuda", "-cuda"))
    for name, render in experiment.tables.items()
}

# Numbers with units that nobody measured, by the page's words, and why.
NOT_MEASURED = {
    "1 bit": "the size of a packed spike, by construction",
    "4 bytes": "the size of a float32",
    "4 bits": "the size of a code, by construction",
    "8 bits": "the size of a code, by construction",
    "64 KiB": "what is copied at most, in the source",
    "128 times": "the length of a loop that is compiled, in the source",
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
    """The entries of every results file, by its stem."""
    return {path.stem: load(path) for path in sorted(folder.glob("*.json"))}


def rendered(text: str, results: Results) -> str:
    """A page with every table and value as the results have them now."""

    def of_table(match: re.Match[str]) -> str:
        if match[2] == "dates":
            return f"{match[1]}{markdown([dates(results)])}\n{match[3]}"
        stem, render = TABLES[match[2]]
        table = markdown(render(results[stem])) if stem in results else "Not measured yet."
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
    numerator, *denominators = (number_at(part.strip(), results) for part in path.split(" over "))
    for denominator in denominators:
        numerator /= denominator
    space = "" if unit in ("", "x") else " "
    number = numerator / _SCALE.get(unit, 1)
    return f"{round(number) if form.endswith('d') else number:{form}}{space}{unit}"


def dates(results: Results) -> Table:
    """When each experiment was measured, with which torch, on how many threads."""
    rows = []
    for experiment in EXPERIMENTS.values():
        entries = results.get(experiment.stem("cpu"), {}).values()
        days = sorted({entry["date"][:10] for entry in entries if "date" in entry})
        contexts = [entry["context"] for entry in entries if "context" in entry]
        versions = sorted({context["versions"]["torch"] for context in contexts})
        threads = sorted({str(context["threads"]) for context in contexts if "threads" in context})
        if days:
            span = " to ".join(dict.fromkeys((days[0], days[-1])))
            rows.append((experiment.name, span, ", ".join(versions), ", ".join(threads)))
    return Table(("experiment", "measured", "torch", "threads"), rows)


def number_at(path: str, results: Results) -> float:
    """The number at a path of keys."""
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
        found.append("its numbers are not those of benchmarks/results: run python -m benchmarks pages")
    if re.search(r"^<!-- value:", text, re.MULTILINE):
        found.append("a value begins a line, which ends the paragraph there: join it to the line before")
    return found + [f"{number!r} is in no results file" for number in loose_numbers(text)]


def loose_numbers(text: str, allowed: dict[str, str] = NOT_MEASURED) -> list[str]:
    """Numbers with a unit outside tables and values that the results fill, and outside code."""
    text = _OTHER_MARKS.sub(" ", _VALUE.sub(" ", _TABLE.sub(" ", text)))
    text = _NOT_PROSE.sub(" ", text)
    return [match[0] for match in _NUMBER.finditer(text) if match[0] not in allowed]
