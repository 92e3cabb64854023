"""Tables of peaks, mode by mode, and of what an allocator that keeps freed memory changes."""

from __future__ import annotations

from statistics import median

from ..experiment import Entries
from . import Table, mib, times


def peaks(entries: Entries) -> list[Table]:
    """A row a network: stock's peak, and the part of it that each mode takes."""
    by_work: dict[str, dict[str, dict]] = {}
    for key, entry in entries.items():
        by_work.setdefault(key.partition(" | ")[0], {})[entry["method"]] = entry
    rows, parts = [], {"auto": [], "minimal, stepped": []}  # type: ignore[var-annotated]
    above, off = [], []
    for work, methods in by_work.items():
        if "stock" not in methods:
            continue
        stock, memory = methods["stock"]["peak"], methods.get("memory", {})
        cells = []
        for mode in ("memory", *parts):
            peak = methods.get(mode, {}).get("peak")
            cells.append("" if peak is None else f"{peak / stock:.3f}")
            if peak is not None and mode in parts and methods[mode].get("own_procedure") is False:
                parts[mode].append(stock / peak)
        if memory and "auto" in methods:
            above.append(methods["auto"]["peak"] / memory["peak"])
        foreseen = memory.get("foreseen")
        if foreseen:
            off.append(foreseen / memory["whole"] - 1)
        rows.append((work, mib(stock), *cells, f"{off[-1]:+.0%}" if foreseen else ""))
    notes = [
        f"Stock's peak over that of {mode}, median of the published families: {median(found):.1f}x."
        for mode, found in parts.items()
        if found
    ]
    if above:
        notes.append(f"auto's peak over memory's: at most {max(above):.3f}.")
    if off:
        notes.append(f"What a budget foresees is off by {min(off):+.0%} to {max(off):+.0%}.")
    headings = ("network", "stock, MiB", "memory", "auto", "minimal, stepped", "foreseen, off by")
    return [Table(headings, rows, notes=tuple(notes))]


def freed_memory(entries: Entries) -> list[Table]:
    """Times of a step to stock's as a script runs it, with and without the call."""
    rows = [
        (entry["workload"], entry["method"], times(entry["time_ratio"]))
        for entry in entries.values()
        if "time_ratio" in entry
    ]
    return [Table(("training step", "method", "time to stock's"), rows)]
