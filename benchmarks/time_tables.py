"""Tables of what is measured over time: reversal, the coupled node, SLTT, long sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .measure import MIB
from .rows import Rows

Found = dict[str, Any]


def _reset(row: Found) -> str:
    return "soft" if row["soft"] else "hard"


def rebuilt(found: list[Found]) -> Rows:
    return Rows(
        ("reset", "beta", "steps", "grid: membranes that differ", "float inversion: largest error"),
        [
            (
                _reset(row), f"{row['beta']:g}", f"{row['steps']:,}", f"{row['differ']:,}",
                f"{row['float_error']:.3g}",
            )
            for row in found
        ],
    )  # fmt: skip


def bytes_held(found: list[Found]) -> Rows:
    figures = ("stock", "grid", "spikes", "remainders", "objects")
    return Rows(
        ("loop", "reset", "beta", "firing", *figures, "less"),
        [
            (
                row["loop"], _reset(row), f"{row['beta']:g}", f"{row['firing']:.1%}", f"{row['stock']:.2f}",
                *(f"{row[name]:.4f}" for name in figures[1:]), f"{row['less']:.1f}x",
            )
            for row in found
        ],
    )  # fmt: skip


def step_time(found: list[Found]) -> Rows:
    return Rows(
        ("loop", "reset", "beta", "stock", "tape, stock arithmetic", "grid"),
        [
            (
                row["loop"], _reset(row), f"{row['beta']:g}", f"{1e3 * row['seconds']:.0f} ms",
                f"{row['tape']:.2f}x", f"{row['grid']:.2f}x",
            )
            for row in found
        ],
    )  # fmt: skip


REVERSAL: dict[str, Callable[[list[Found]], Rows]] = {
    "rebuilt": rebuilt,
    "bytes": bytes_held,
    "time": step_time,
}


def coupled_times(found: list[Found]) -> Rows:
    """Of the coupled node's procedures, against the plain one."""
    return Rows(
        ("layer", "node", "forward", "backward", "against plain", "step", "against plain", "gradient"),
        [
            (
                row["layer"], row["node"], f"{1e3 * row['forward']:.0f} ms",
                f"{1e3 * row['backward']:.0f} ms",
                f"{row['backward_ratio'] - 1:+.1%}", f"{1e3 * row['step']:.0f} ms",
                f"{row['step_ratio'] - 1:+.1%}", row["gradient"],
            )
            for row in found
        ],
    )  # fmt: skip


def coupled_held(found: list[Found]) -> Rows:
    lengths = list(found[0]["held"]) if found else []
    return Rows(
        ("node", *(f"T={length}" for length in lengths), "a step more"),
        [
            (row["node"], *(f"{row['held'][one]:,.1f}" for one in lengths), f"{row['more']:.3f}")
            for row in found
        ],
    )


def sltt(found: Found) -> Rows:
    rows = []
    for key, run in found.items():
        name, length = key.split(" | ")
        against = run["seconds"] / found[f"through time, stock | {length}"]["seconds"]
        cells = f"{run['peak'] / MIB:,.2f}", f"{against:.2f}x", f"{run['cosine']:.4f}"
        rows.append((f"{int(length):,}", name, *cells))
    return Rows(("T", "gradient", "peak, MiB", "time", "cosine with through time"), rows)


def long_sequences(found: Found) -> Rows:
    rows = []
    for key, run in found.items():
        name, method = key.split(" | ")
        head = name.partition("-")[0], f"{run['steps']:,}", run["network"], f"{run['limit_mb']} MB", method
        if "error" in run:
            out_of_memory = "can't allocate memory" in run["error"]
            why = "out of memory" if out_of_memory else run["error"].replace("|", "/")
            rows.append((*head, "", why, ""))
            continue
        losses = f"{run['losses'][0]:.3f} to {run['losses'][-1]:.3f}"
        rows.append((*head, f"{run['seconds']:.1f} s", losses, f"{run['accuracy']:.1%}"))
    headings = ("sequences", "T", "network", "limit", "method", "step", "loss, first to last", "accuracy")
    return Rows(headings, rows)
