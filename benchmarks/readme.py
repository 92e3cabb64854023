"""The README's table, written between two marks from the stored results, so that it can't go stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .measure import MIB

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown of held and peak MiB and of the time ratio, a row a workload and method."""
    lines = [
        "| training step | method | held, MiB | peak, MiB | time | gradients |",
        "|---|---|---:|---:|---:|---|",
    ]
    previous = None
    for entry in results.values():
        shape = "x".join(map(str, entry["shape"]))
        title = f"{entry['workload']}, {shape}" if entry["workload"] != previous else ""
        previous = entry["workload"]
        if entry["held"] is None:
            lines.append(f"| {title} | {entry['method']} | | | | {entry['why_not']} |")
            continue
        equal = entry["gradient_difference"] == 0
        gradients = "bit-identical" if equal else f"{entry['gradient_difference']:.0e} off"
        lines.append(
            f"| {title} | {entry['method']} | {entry['held'] / MIB:,.1f} | {entry['peak'] / MIB:,.1f} "
            f"| {entry['time_ratio']:.2f}x | {'' if entry['method'] == 'stock' else gradients} |"
        )
    context = next(iter(results.values()))["context"]
    versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
    repeats = min(entry["context"]["repeats"] for entry in results.values())
    lines += ["", f"{versions}; {context['threads']} threads; medians of at least {repeats} steps."]
    return "\n".join(lines)


def update(results: dict[str, dict[str, Any]]) -> Path:
    """Write the table into the README."""
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{tail}")
    return README
