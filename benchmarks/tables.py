"""The results as tables: for the terminal, and in Markdown for README and docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.table import Table

from .measure import MIB
from .methods import ABOUT, OURS
from .store import Entry
from .workloads import WORKLOADS

Entries = dict[str, Entry]
MAIN_METHODS = ("stock", "checkpoint", "memopt 1", "speed", "memory", "grid")
MAIN_WORKLOADS = (
    "vgg", "vgg-t32", "sew-resnet18", "spiking-resnet34", "spikformer", "leaky-loop", "tutorial-6",
)  # fmt: skip
HEADINGS = ("held, MiB", "peak, MiB", "beyond gradients", "time", "fits", "gradients", "flipped spikes")


def mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"


def times(entry: Entry, spread: bool = False) -> str:
    if entry["time_ratio"] is None:
        return ""
    text = f"{entry['time_ratio']:.2f}x"
    if spread and entry.get("time_spread") and entry["method"] != "stock":
        low, high = entry["time_spread"]
        text += f" ({low:.2f}-{high:.2f})"
    return text


def gradients(entry: Entry) -> str:
    """What is known of the gradients, in a word."""
    if entry["method"] == "stock":
        return ""
    if entry["gradient_difference"] == 0:
        return "bit-identical"
    if entry["method"] == "SLTT":
        return "approximate"
    error, scale = entry.get("gradient_error"), entry.get("gradient_scale")
    if error is not None:
        own = "exact" if error == 0 else f"{error:.0e} off"
        return f"another forward; {own} for it"
    if entry["gradient_difference"] is None:
        return "another network"
    of = f" of {scale:.0e}" if scale else ""
    return f"{entry['gradient_difference']:.0e}{of} off"


def flips(entry: Entry) -> str:
    """Spikes that differ from stock's; after a slash, those that differ when a branch is rebuilt."""
    if entry.get("flipped_spikes") is None:
        return ""
    rebuilt = entry.get("rebuilt_flips")
    return f"{entry['flipped_spikes']:,}" + ("" if rebuilt is None else f" / {rebuilt:,}")


def fits(entry: Entry) -> str:
    size, workload = entry.get("largest"), WORKLOADS.get(entry["workload"])
    if size is None or workload is None:
        return ""
    return f"{'N' if workload.grows == workload.batch_dim else 'T'} = {size:,}"


def figures(entry: Entry, spread: bool) -> tuple[str, ...]:
    beyond = mib(entry.get("peak_beyond_gradients"))
    return (
        mib(entry["held"]), mib(entry["peak"]), beyond, times(entry, spread), fits(entry), gradients(entry),
        flips(entry),
    )  # fmt: skip


def measured(entry: Entry) -> bool:
    return entry["peak"] is not None


def console(entries: Entries) -> Table:
    table = Table(title="Training step: memory beyond parameters and inputs, time against stock")
    for heading in ("workload", "method", *HEADINGS):
        table.add_column(
            heading, justify="left" if heading in ("workload", "method", "gradients") else "right"
        )
    for workload, group in _by_workload(entries):
        table.add_section()
        for entry in group:
            if measured(entry):
                table.add_row(workload, entry["method"], *figures(entry, spread=True))
            else:
                table.add_row(workload, entry["method"], "", "", "", "", "", entry["why_not"])
            workload = ""
    return table


def main_table(entries: Entries) -> str:
    """The README's table: the workloads and methods that most readers have."""
    lines = [
        "| training step | method | held, MiB | peak, MiB | time | gradients |",
        "|---|---|---:|---:|---:|---|",
    ]
    for workload, group in _by_workload(entries):
        if workload not in MAIN_WORKLOADS:
            continue
        title = _title(group[0])
        for entry in group:
            if entry["method"] not in MAIN_METHODS:
                continue
            if entry["method"] in OURS and not measured(entry):
                continue
            if measured(entry):
                cells = (mib(entry["held"]), mib(entry["peak"]), times(entry), gradients(entry))
            else:
                cells = ("", "", "", entry["why_not"])
            lines.append(_row(title, entry["method"], *cells))
            title = ""
    return "\n".join([*lines, "", circumstances(entries)])


def full_table(entries: Entries) -> str:
    """Everything but the curves of growth, a table a workload; what could not run says why below it."""
    parts: list[str] = []
    for workload, group in _by_workload(entries):
        known = WORKLOADS.get(workload)
        if known is not None and known.series is not None:
            continue
        lines = [
            f"### {_title(group[0])}",
            "",
            _row("method", *HEADINGS),
            "|---|" + "---:|" * 5 + "---|---:|",
        ]
        lines += [_row(e["method"], *figures(e, spread=True)) for e in group if measured(e)]
        reasons: dict[str, list[str]] = {}
        for entry in group:
            if not measured(entry):
                reasons.setdefault(entry["why_not"], []).append(entry["method"])
        notes = [f"{', '.join(methods)}: {why}." for why, methods in reasons.items()]
        parts.append("\n".join([*lines, *(["", "Not run: " + " ".join(notes)] if notes else [])]))
    return "\n\n".join([*parts, circumstances(entries)])


def growth_table(series: str, figure: str) -> Callable[[Entries], str]:
    """A curve of growth: a row a method, a column a point."""

    def render(entries: Entries) -> str:
        points = sorted((w for w in WORKLOADS.values() if w.series == series), key=lambda w: w.at or 0)
        points = [point for point in points if f"{point.name} | stock" in entries]
        methods = dict.fromkeys(
            e["method"] for e in entries.values() if e["workload"] in {p.name for p in points}
        )
        lines = [_row(series, *(f"{point.at:,}" for point in points)), "|---|" + "---:|" * len(points)]
        for method in methods:
            found = [entries.get(f"{point.name} | {method}") for point in points]
            cells = [mib(entry[figure]) if entry else "" for entry in found]
            if any(cells):
                lines.append(_row(method, *cells))
        return "\n".join(lines)

    return render


def ours_against_peers(entries: Entries) -> str:
    """Where no mode of this package is both as small at the peak and as fast as a peer, stock included."""
    head = [
        "| workload | peer | its peak, MiB | its time | ours: peak, MiB, and time |",
        "|---|---|---:|---:|---|",
    ]
    rows: list[str] = []
    compared: dict[str, int] = {}
    for workload, group in _by_workload(entries):
        own = [e for e in group if e["method"] in OURS and measured(e)]
        for peer in group:
            if peer["method"] in OURS or not measured(peer):
                continue
            compared[peer["method"]] = compared.get(peer["method"], 0) + 1
            if any(e["peak"] <= peer["peak"] and e["time_ratio"] <= peer["time_ratio"] for e in own):
                continue
            ours = "; ".join(f"{e['method']} {mib(e['peak'])}, {times(e)}" for e in own)
            rows.append(_row(workload, peer["method"], mib(peer["peak"]), times(peer), ours))
    counts = ", ".join(f"{method} on {count}" for method, count in compared.items())
    compared_with = f"Compared with {counts} workloads."
    return "\n".join([*head, *rows, "", compared_with] if rows else [f"Nowhere. {compared_with}"])


def methods_table(_entries: Entries) -> str:
    return "\n".join(["| method | what it is |", "|---|---|", *(_row(k, v) for k, v in ABOUT.items())])


def circumstances(entries: Entries) -> str:
    """Device, versions, threads and repeats: a sentence for each that the entries were measured in."""
    repeats: dict[str, int] = {}
    for entry in entries.values():
        context = entry["context"]
        versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
        device = f"{context['device']}; " if context["device"] else ""
        where = f"{device}{versions}; {context['threads']} threads"
        repeats[where] = min(repeats.get(where, context["repeats"]), context["repeats"])
    return " ".join(f"{where}; medians of at least {least} steps." for where, least in repeats.items())


def _by_workload(entries: Entries) -> Iterable[tuple[str, list[Entry]]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries.values():
        groups.setdefault(entry["workload"], []).append(entry)
    return groups.items()


def _title(entry: Entry) -> str:
    return f"{entry['workload']}, {'x'.join(map(str, entry['shape']))}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
