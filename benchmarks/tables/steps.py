"""Tables of training steps under every method, and where a peer is ahead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..experiment import Entries, Entry, Render
from ..methods import METHODS
from ..workloads import WORKLOADS
from . import Table, mib, note, times

MAIN_METHODS = ("stock", "checkpoint", "memopt 1", "speed", "auto", "memory", "minimal", "grid")
MAIN_WORKLOADS = (
    "vgg", "vgg-t32", "sew-resnet18", "spiking-resnet34", "spikformer", "leaky-loop", "tutorial-6",
)  # fmt: skip
HEADINGS = ("held, MiB", "peak, MiB", "beyond gradients", "time", "fits", "gradients", "flipped spikes")


def everything(entries: Entries) -> list[Table]:
    """A table a workload; what could not run says why below it."""
    tables = []
    for group in _by_workload(entries.values()):
        rows = [(e["method"], *_figures(e)) for e in group if measured(e)]
        reasons: dict[str, list[str]] = {}
        for entry in group:
            if not measured(entry):
                reasons.setdefault(entry["why_not"], []).append(entry["method"])
        why = " ".join(f"{', '.join(methods)}: {reason}." for reason, methods in reasons.items())
        notes = (f"Not run: {why}",) if why else ()
        tables.append(Table(("method", *HEADINGS), rows, _title(group[0]), notes).without_empty())
    return [*tables, note(circumstances(entries))]


def networks(entries: Entries) -> list[Table]:
    """Everything but the curves of growth."""
    return everything({key: e for key, e in entries.items() if not series_of(e)})


def main(entries: Entries) -> list[Table]:
    """The README's table: the workloads and methods that most readers have."""
    rows = []
    for group in _by_workload(entries.values()):
        title = _title(group[0])
        for entry in group:
            method = entry["method"]
            if entry["workload"] not in MAIN_WORKLOADS or method not in MAIN_METHODS:
                continue
            if measured(entry):
                cells = mib(entry.get("held")), mib(entry["peak"]), times(entry.get("time_ratio"))
                rows.append((title, method, *cells, _gradients(entry)))
            elif not METHODS[method].ours:
                rows.append((title, method, "", "", "", entry["why_not"]))
            else:
                continue
            title = ""
    headings = ("training step", "method", "held, MiB", "peak, MiB", "time", "gradients")
    return [Table(headings, rows, notes=(circumstances(entries),))]


def growth(series: str, figure: str) -> Render:
    """A curve of growth: a row a method, a column a point."""

    def render(entries: Entries) -> list[Table]:
        points = sorted((w for w in WORKLOADS.values() if w.series == series), key=lambda w: w.at or 0)
        points = [point for point in points if f"{point.name} | stock" in entries]
        rows = []
        for method in METHODS:
            found = [entries.get(f"{point.name} | {method}", {}) for point in points]
            cells = [mib(entry.get(figure)) for entry in found]
            if any(cells):
                rows.append((method, *cells))
        return [Table((series, *(f"{point.at:,}" for point in points)), rows)]

    return render


def over_step(entries: Entries, titles: Mapping[str, str]) -> list[Table]:
    """The peak of a step by the defaults of the conversion, for readers of a first page."""
    rows = []
    for entry in entries.values():
        if entry["method"] != "stock":
            continue
        ours = entries.get(f"{entry['workload']} | converted")
        if ours:
            less = f"{entry['peak'] / ours['peak']:.1f}x"
            work, shape = WORKLOADS[entry["workload"]], entry["shape"]
            steps = f"T = {shape[0]}, " if work.batch_dim else ""
            title = f"{titles[work.name]}: {steps}batch {shape[work.batch_dim]}, {shape[-2]} x {shape[-1]}"
            rows.append((title, mib(entry["peak"]), mib(ours["peak"]), less))
    headings = ("training step", "stock's peak, MiB", "converted, MiB", "less")
    return [Table(headings, rows)]


def fits(entries: Entries) -> list[Table]:
    """The largest batches within the memory of cards, and how far a prediction was off that was tried."""
    rows, last = [], ""
    predicted = {key: one for key, one in entries.items() if "fits" in one and "budget" not in one}
    for entry in predicted.values():
        title = _title(entry)
        batches = [f"{_largest(entry, int(gib)):,}" for gib in entry["fits"]]
        rows.append(("" if title == last else title, entry["method"], *batches, f"{entry['off']:+.1%}"))
        last = title
        columns = [f"{gib} GiB" for gib in entry["fits"]]
    if not rows:
        return [note("Not measured yet.")]
    headings = ("training step", "method", *columns, "off where it was tried")
    return [Table(headings, rows, notes=(circumstances_without_repeats(predicted),))]


def _largest(entry: Entry, gib: int) -> int:
    """The batch that a budget holds: by the line through the two small ones, or, where the one that was
    tried took more, by the line through that."""
    foretold = entry["fits"][str(gib)]
    if entry["off"] <= 0:
        return int(foretold)
    more = entry["small"][-1]
    at_more = entry["alone"] + more * entry["a_sample"]
    a_sample = (entry["took"] - at_more) / (entry["tried"] - more)
    return min(int(foretold), int(more + (gib * 2**30 - at_more) / a_sample))


def fits_tried(entries: Entries) -> list[Table]:
    """Budgets that were filled: the batch that was predicted, and what it took."""
    rows = []
    for entry in entries.values():
        if "budget" in entry:
            title, budget = f"{entry['workload']}, {entry['method']}", f"{entry['budget']} GiB"
            if "took" in entry:
                rows.append((title, budget, f"{entry['tried']:,}", f"{entry['took'] / 2**30:.2f} GiB"))
            else:
                rows.append((title, budget, "", f"not tried: {entry['why_not']}"))
    if not rows:
        return [note("No budget was tried yet.")]
    return [Table(("training step", "budget", "batch foretold", "took"), rows)]


def behind(entries: Entries) -> list[Table]:
    """Where no mode of this package is both as small at the peak and as fast as a peer, stock included.

    A row a peer: where it is smaller than every mode, and where those that are no larger are all slower.
    """
    return ahead(
        [e for e in entries.values() if measured(e)], {name for name in METHODS if METHODS[name].ours}
    )


def ahead(entries: Iterable[Entry], ours: Collection[str]) -> list[Table]:
    """That table, of what was measured and timed; ``ours``: this package's methods."""
    compared: dict[str, int] = {}
    smaller: dict[str, list[str]] = {}
    slower: dict[str, list[float]] = {}
    for group in _by_workload(entries):
        own = [e for e in group if e["method"] in ours]
        for peer in group:
            name = peer["method"]
            if name in ours:
                continue
            compared[name] = compared.get(name, 0) + 1
            no_larger = [e["time_ratio"] for e in own if e["peak"] <= peer["peak"]]
            if not no_larger:
                smaller.setdefault(name, []).append(peer["workload"])
            elif min(no_larger) > peer["time_ratio"]:
                slower.setdefault(name, []).append(min(no_larger) / peer["time_ratio"])
    rows = [
        (name, f"{count}", _some(smaller.get(name, [])), _span(slower.get(name, [])))
        for name, count in compared.items()
        if name in smaller or name in slower
    ]
    if not rows:
        return [note(f"Nowhere: {', '.join(f'{name} on {count}' for name, count in compared.items())}.")]
    headings = ("peer", "workloads", "smaller than every mode", "faster than every mode that is no larger")
    never = [f"{name} (on {count})" for name, count in compared.items() if not {name} & {*smaller, *slower}]
    notes = (f"Nowhere ahead: {', '.join(never)}.",) if never else ()
    return [Table(headings, rows, notes=notes)]


def _some(names: list[str]) -> str:
    """How many, and the first few."""
    if not names:
        return ""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)}: {', '.join(names[:3])}{rest}"


def _span(ratios: list[float]) -> str:
    if not ratios:
        return ""
    ends = dict.fromkeys(f"{end:.2f}x" for end in (min(ratios), max(ratios)))
    return f"{len(ratios)}: the fastest of those takes {' to '.join(ends)} of its time"


def methods(_entries: Entries) -> list[Table]:
    return [Table(("method", "what it is"), [(m.name, m.about) for m in METHODS.values() if m.about])]


def circumstances(entries: Entries) -> str:
    """Device, versions, threads and repeats: a sentence for each that the entries were measured in."""
    repeats: dict[str, int] = {}
    for entry in entries.values():
        context = entry["context"]
        versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
        device = f"{context['device']}; " if context["device"] else ""
        where = f"{device}{versions}; {context['threads']} thread{'s' if context['threads'] > 1 else ''}"
        repeats[where] = min(repeats.get(where, entry["repeats"]), entry["repeats"])
    return " ".join(f"{where}; medians of at least {least} steps." for where, least in repeats.items())


def circumstances_without_repeats(entries: Entries) -> str:
    """As :func:`circumstances`, where nothing was timed."""
    return circumstances({name: {"repeats": 1} | entry for name, entry in entries.items()}).replace(
        "; medians of at least 1 steps", ""
    )


def measured(entry: Entry) -> bool:
    return "peak" in entry


def series_of(entry: Entry) -> str | None:
    workload = WORKLOADS.get(entry.get("workload", ""))
    return workload and workload.series


def _figures(entry: Entry) -> tuple[str, ...]:
    spread = entry.get("time_spread") if entry["method"] != "stock" else None
    return (
        mib(entry.get("held")), mib(entry["peak"]), mib(entry.get("peak_beyond_gradients")),
        times(entry.get("time_ratio"), spread), _fits(entry), _gradients(entry), _flips(entry),
    )  # fmt: skip


def _gradients(entry: Entry) -> str:
    """What is known of the gradients, in a word."""
    difference = entry.get("gradient_difference")
    if entry["method"] == "stock":
        return ""
    if difference == 0:
        return "bit-identical"
    if entry["method"] == "SLTT":
        return "approximate"
    error, scale = entry.get("gradient_error"), entry.get("gradient_scale")
    if error is not None:
        own = "exact" if error == 0 else f"{error:.0e} off"
        return f"another forward; {own} for it"
    if difference is None:
        return "another network"
    return f"{difference:.0e}" + (f" of {scale:.0e}" if scale else "") + " off"


def _flips(entry: Entry) -> str:
    """Spikes that differ from stock's; after a slash, those that differ when a branch is rebuilt."""
    if "flipped_spikes" not in entry:
        return ""
    rebuilt = entry.get("rebuilt_flips")
    return f"{entry['flipped_spikes']:,}" + ("" if rebuilt is None else f" / {rebuilt:,}")


def _fits(entry: Entry) -> str:
    size, workload = entry.get("largest"), WORKLOADS.get(entry["workload"])
    if size is None or workload is None:
        return ""
    return f"{'N' if workload.grows == workload.batch_dim else 'T'} = {size:,}"


def _by_workload(entries: Iterable[Entry]) -> Iterable[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry["workload"], []).append(entry)
    return groups.values()


def _title(entry: Entry) -> str:
    return f"{entry['workload']}, {'x'.join(map(str, entry['shape']))}"
