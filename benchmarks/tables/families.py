"""The table of published families: how many times less is held than in stock, and the peak."""

from __future__ import annotations

from statistics import median

from ..experiment import Entries
from . import Table, mib, times

ENOUGH = 3  # timed steps, of which the median is shown


def published(entries: Entries) -> list[Table]:
    """A row a family and mode; families with a procedure of their own don't count in the median.

    Times are left out where fewer than three steps were timed.
    """
    by_family: dict[str, dict[str, dict]] = {}
    for entry in entries.values():
        by_family.setdefault(entry["family"], {})[entry["method"]] = entry
    rows, gains = [], []
    for family, methods in by_family.items():
        stock = methods["stock"]
        for mode in ("memory", "speed"):
            if (entry := methods.get(mode)) is None:
                continue
            gain, peak = stock["held"] / max(1, entry["held"]), entry["peak"] / stock["peak"]
            if mode == "memory" and not entry["own_procedure"]:
                gains.append(gain)
            name = family if mode == "memory" else ""
            time = times(entry["time_ratio"]) if entry["repeats"] >= ENOUGH else ""
            rows.append((name, mode, mib(stock["held"]), f"{gain:.1f}x", f"{peak:.2f}x", time))
    notes = ()
    if gains:
        notes = (f"Held less in mode memory: median {median(gains):.0f}x, smallest {min(gains):.1f}x.",)
    headings = ("family", "mode", "stock holds, MiB", "held less", "peak of stock's", "time")
    return [Table(headings, rows, notes=notes)]
