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
    rows, parts = [], {"auto": [], "minimal, stepped": [], "stock's forward": []}  # type: ignore[var-annotated]
    above, off, to_forward = [], [], []
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
                if mode == "stock's forward" and "minimal, stepped" in methods:
                    to_forward.append(methods["minimal, stepped"]["peak"] / peak)
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
    if to_forward:
        notes.append(
            "A step's peak in minimal, stepped, over that of stock's forward, median of those families: "
            f"{median(to_forward):.2f}x."
        )
    if above:
        notes.append(f"auto's peak over memory's: at most {max(above):.3f}.")
    if off:
        notes.append(
            f"What a budget says before a step was measured is off by {min(off):+.0%} to {max(off):+.0%}."
        )
    headings = ("network", "stock, MiB", "memory", *parts, "said before a step, off by")
    return [Table(headings, rows, notes=tuple(notes))]


def budgets(entries: Entries) -> list[Table]:
    """A row a network: what a step takes, and by how much what was foreseen is off, budget by budget."""
    by_work: dict[str, dict[str, dict]] = {}
    for key, entry in entries.items():
        by_work.setdefault(key.partition(" | ")[0], {})[entry["method"]] = entry
    rows, off, over = [], [], []
    for work, methods in by_work.items():
        memory = methods.pop("memory", None)
        if memory is None:
            continue
        least = next((one["least"] for one in methods.values() if one.get("least") is not None), None)
        cells = [_off(least, memory["whole"], off)]
        for one in methods.values():
            cells.append(_off(one.get("foreseen"), one["whole"], off))
            over.append(one["whole"] / one["budget"])
        some = methods.get("1.25 x")
        part = "" if some is None else f"{some['whole'] / some['budget']:.2f}"
        rows.append((work, mib(memory["whole"]), *cells, part))
    notes = []
    if off:
        notes.append(
            f"Foreseen within 5 %: {sum(abs(one) <= 0.05 for one in off)} of {len(off)}; off by "
            f"{min(off):+.1%} to {max(off):+.1%}. A step took at most {max(over):.3f} of its budget."
        )
    headings = ("network", "memory, MiB", "memory", "1.25 x memory", "all", "of 1.25 x taken")
    return [Table(headings, rows, notes=tuple(notes))]


def _off(foreseen: int | None, taken: int, off: list[float]) -> str:
    if foreseen is None:
        return "by bounds"
    off.append(foreseen / taken - 1)
    return f"{off[-1]:+.1%}"


def freed_memory(entries: Entries) -> list[Table]:
    """Times of a step to stock's as a script runs it, and what the process takes, by glibc's settings."""
    rows, last = [], ""
    for entry in entries.values():
        if "time_ratio" in entry:
            head, last = "" if entry["workload"] == last else entry["workload"], entry["workload"]
            rows.append((head, entry["method"], times(entry["time_ratio"]), mib(entry["process"])))
    return [Table(("training step", "method", "time to stock's", "process, MiB"), rows)]
