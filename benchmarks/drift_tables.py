"""The results of ``benchmarks.drift`` in Markdown."""

from __future__ import annotations

from typing import Any

_WAYS = {"published": "published procedure", "float": "floating point", "grid": "grid"}


def table(results: dict[str, Any]) -> str:
    if not results:
        return "Not measured yet: `python -m benchmarks.drift`."
    lines = [
        "| blocks | streams | flipped spikes in the rebuild | error of the rebuilt input |",
        "|---:|---|---:|---:|",
    ]
    for depth, ways in results.items():
        for way, found in ways.items():
            flips = f"{found['flipped_spikes']:,} of {found['spikes']:,}"
            lines.append(f"| {depth} | {_WAYS[way]} | {flips} | {found['max_error']:.3g} |")
            depth = ""
    return "\n".join(lines)
