"""Tables of what is measured over time and depth: reversal, coupled node, SLTT, long sequences, surgery."""

from __future__ import annotations

from statistics import median

from ..experiment import Entries, Entry
from . import Table, mib, times
from .steps import ahead


def _reset(entry: Entry) -> str:
    return "soft" if entry["soft"] else "hard"


def drift(entries: Entries) -> list[Table]:
    ways = {"published": "published procedure", "float": "floating point", "grid": "grid"}
    rows, last = [], ""
    for key, entry in entries.items():
        depth, way = key.split(" | ")
        flips = f"{entry['flipped_spikes']:,} of {entry['spikes']:,}"
        rows.append(("" if depth == last else depth, ways[way], flips, f"{entry['max_error']:.3g}"))
        last = depth
    headings = ("blocks", "streams", "flipped spikes in the rebuild", "error of the rebuilt input")
    return [Table(headings, rows)]


def columns(entries: Entries) -> list[Table]:
    """T-RevSNN's sub-networks as they are trained."""
    rows = [
        (
            e["size"], str(e["steps"]), e["way"], mib(e["held"], 2), mib(e.get("remainders"), 2),
            mib(e["peak"]), mib(e.get("peak_beyond_gradients"), 2), times(e["time_ratio"]),
            f"{e['max_error']:.3g}",
        )
        for e in entries.values()
    ]  # fmt: skip
    headings = (
        "T-RevSNN", "sub-networks", "way", "held, MiB", "of that remainders", "peak, MiB",
        "without gradients", "time", "rebuild off by",
    )  # fmt: skip
    least = [
        f"{times(e['at_least'])} ({e['size']}, {e['steps']})"
        for e in entries.values()
        if e["way"] == "grid" and "at_least" in e
    ]
    notes = (
        (f"A plain step and a forward beside it, in the same run: {', '.join(least)}.",) if least else ()
    )
    return [Table(headings, rows, notes=notes)]


def compiled(entries: Entries) -> list[Table]:
    """Time over stock's in eager mode and compiled, memory, and CPU seconds of the first step."""
    rows, last = [], ""
    for key, e in entries.items():
        work, method = key.split(" | ")
        head, last = ("" if work == last else work, method), work
        if "why_not" in e:
            rows.append((*head, "", "", "", "", "", "", e["why_not"]))
            continue
        steps = entries.get(f"{work} | stock", {}).get("neuron_steps")
        remarks = [e["on_tape"] or ""] if "on_tape" in e else []
        base = entries.get(f"{work} | compiled")
        if method.startswith("srp.compile") and base is not None and not e.get("on_tape"):
            remarks.append(
                "loss as compiled" if e["loss"] == base["loss"] else "loss differs from compiled"
            )
        rows.append(
            (
                *head, times(e.get("time_ratio")), times(e.get("compiled_ratio")), mib(e["held"], 2),
                mib(e["peak"]), f"{e['held'] / steps:.2f}" if steps else "",
                f"{e['first']:.0f}" if "first" in e else "", "; ".join(filter(None, remarks)),
            )
        )  # fmt: skip
    headings = (
        "network",
        "method",
        "time",
        "to compiled",
        "held, MiB",
        "peak, MiB",
        "held, B a neuron-step",
        "first step, CPU s",
        "",
    )
    shares = [
        f"{key.split(' | ')[0]} {e['products_share']:.0%}"
        for key, e in entries.items()
        if "products_share" in e
    ]
    told = (
        f"Of a compiled step its forward's products take: {', '.join(shares)}; a rebuild runs them again."
    )
    return [Table(headings, rows, notes=(told,) if shares else ())]


def compiled_behind(entries: Entries) -> list[Table]:
    """Where none of this package's methods is as small at the peak and as fast as stock, compiled or not,
    or a peer."""
    timed = [
        e | {"workload": key.split(" | ")[0], "method": key.split(" | ")[1]}
        for key, e in entries.items()
        if "time_ratio" in e
    ]
    return ahead(timed, {e["method"] for e in timed if e["method"].startswith(("srp.compile", "tape"))})


def host_time(entries: Entries) -> list[Table]:
    """Of steps at tiny shapes; calls of the package's own functions in one of them."""
    rows, last = [], ""
    for key, e in entries.items():
        network, method = key.split(" | ")
        head, last = "" if network == last else network, network
        shape = "x".join(map(str, e["shape"]))
        milliseconds = f"{1e3 * median(e['seconds']):.2f} ms"
        rows.append((head, shape, method, milliseconds, times(e["time_ratio"]), f"{e['calls']:,}"))
    return [Table(("network", "shape", "mode", "step", "time", "own calls"), rows)]


def parallel(entries: Entries) -> list[Table]:
    """Reversible blocks in sequence and in groups."""
    rows = [
        (
            str(e["channels"]), f"{e['pixels']}x{e['pixels']}", e["way"], mib(e["held"]), mib(e["peak"]),
            times(e["time_ratio"]),
        )
        for e in entries.values()
    ]  # fmt: skip
    return [Table(("channels", "pixels", "blocks", "held, MiB", "peak, MiB", "time"), rows)]


def surgery(entries: Entries) -> list[Table]:
    """What a training step holds, its peak, and its time over stock's."""
    rows = [
        (
            e["network"], str(e["blocks"]), e["method"], f"{mib(e['held'])}", f"{mib(e['peak'])}",
            times(e["time_ratio"]),
        )
        for e in entries.values()
    ]  # fmt: skip
    return [Table(("network", "blocks", "method", "held, MiB", "peak, MiB", "time"), rows)]


def rebuilt(entries: Entries) -> list[Table]:
    headings = ("reset", "beta", "steps", "grid: membranes that differ", "float inversion: largest error")
    rows = [
        (_reset(e), f"{e['beta']:g}", f"{e['steps']:,}", f"{e['differ']:,}", f"{e['float_error']:.3g}")
        for e in entries.values()
    ]
    return [Table(headings, rows)]


def bytes_held(entries: Entries) -> list[Table]:
    figures = ("stock", "grid", "spikes", "remainders", "objects")
    rows = [
        (
            e["loop"], _reset(e), f"{e['beta']:g}", f"{e['firing']:.1%}", f"{e['stock']:.2f}",
            *(f"{e[name]:.4f}" for name in figures[1:]), f"{e['less']:.1f}x",
        )
        for e in entries.values()
    ]  # fmt: skip
    return [Table(("loop", "reset", "beta", "firing", *figures, "less"), rows)]


def step_time(entries: Entries) -> list[Table]:
    rows = [
        (
            e["loop"], _reset(e), f"{e['beta']:g}", f"{1e3 * e['seconds']:.0f} ms", times(e["tape"]),
            times(e["grid"]),
        )
        for e in entries.values()
    ]  # fmt: skip
    return [Table(("loop", "reset", "beta", "stock", "tape, stock arithmetic", "grid"), rows)]


def coupled_times(entries: Entries) -> list[Table]:
    """Of the coupled node's procedures, against the plain one."""
    rows = [
        (
            e["layer"], e["node"], f"{1e3 * e['forward']:.0f} ms", f"{1e3 * e['backward']:.0f} ms",
            f"{e['backward_ratio'] - 1:+.1%}", f"{1e3 * e['step']:.0f} ms", f"{e['step_ratio'] - 1:+.1%}",
            e["gradient"],
        )
        for e in entries.values()
    ]  # fmt: skip
    against = "against plain"
    return [Table(("layer", "node", "forward", "backward", against, "step", against, "gradient"), rows)]


def coupled_held(entries: Entries) -> list[Table]:
    lengths = list(next(iter(entries.values()))["held"]) if entries else []
    rows = [
        (e["node"], *(f"{e['held'][one]:,.1f}" for one in lengths), f"{e['more']:.3f}")
        for e in entries.values()
    ]
    return [Table(("node", *(f"T={length}" for length in lengths), "a step more"), rows)]


def sltt(entries: Entries) -> list[Table]:
    rows = []
    for key, entry in entries.items():
        length, name = key.split(" | ")
        against = entry["seconds"] / entries[f"{length} | through time, stock"]["seconds"]
        cells = mib(entry["peak"], 2), times(against), f"{entry['cosine']:.4f}"
        rows.append((f"{int(length):,}", name, *cells))
    return [Table(("T", "gradient", "peak, MiB", "time", "cosine with through time"), rows)]


def long_sequences(entries: Entries) -> list[Table]:
    rows = []
    for e in entries.values():
        head = e["task"], f"{e['steps']:,}", e["network"], f"{e['limit_mb']} MB", e["method"]
        if "error" in e:
            out_of_memory = "can't allocate memory" in e["error"]
            why = "out of memory" if out_of_memory else e["error"].replace("|", "/")
            rows.append((*head, "", why, ""))
        else:
            losses = f"{e['losses'][0]:.3f} to {e['losses'][-1]:.3f}"
            rows.append((*head, f"{e['seconds']:.1f} s", losses, f"{e['accuracy']:.1%}"))
    headings = ("sequences", "T", "network", "limit", "method", "step", "loss, first to last", "accuracy")
    return [Table(headings, rows)]
