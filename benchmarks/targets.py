"""What the project set out to reach, beside what was measured. A target that is missed says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """``measured`` gives the figure from the results; it raises KeyError where they lack it."""

    work: str
    figure: str
    bound: float
    at_least: bool
    measured: Callable[[Results], float]

    def row(self, results: Results) -> str:
        sign = "≥" if self.at_least else "≤"
        try:
            found = self.measured(results)
        except (KeyError, TypeError, ZeroDivisionError):
            return f"| {self.work} | {self.figure} {sign} {self.bound:g} | not measured | |"
        reached = found >= self.bound if self.at_least else found <= self.bound
        verdict = "reached" if reached else "**missed**"
        number = f"{found:,.0f}" if found == round(found) else f"{found:.4g}"
        return f"| {self.work} | {self.figure} {sign} {self.bound:g} | {number} | {verdict} |"


def _entry(results: Results, workload: str, method: str) -> dict[str, Any]:
    entry: dict[str, Any] = results["cpu"][f"{workload} | {method}"]
    return entry


def _best(results: Results, workload: str, methods: tuple[str, ...], figure: str) -> float:
    found = [results["cpu"].get(f"{workload} | {method}", {}).get(figure) for method in methods]
    if not any(value is not None for value in found):
        raise KeyError(workload)
    return min(value for value in found if value is not None)


def _mb_an_image(workload: str, *methods: str) -> Callable[[Results], float]:
    def measured(results: Results) -> float:
        batch = _entry(results, workload, "stock")["shape"][1]
        return _best(results, workload, methods, "peak_beyond_gradients") / 1e6 / batch

    return measured


def _less_than(counterpart: str, workload: str, *methods: str) -> Callable[[Results], float]:
    def measured(results: Results) -> float:
        theirs = _entry(results, counterpart, "stock")["peak_beyond_gradients"]
        return theirs / _best(results, workload, methods, "peak_beyond_gradients")  # type: ignore[no-any-return]

    return measured


def _ratio(workload: str, figure: str, method: str, to: str = "stock") -> Callable[[Results], float]:
    def measured(results: Results) -> float:
        return _entry(results, workload, method)[figure] / _entry(results, workload, to)[figure]  # type: ignore[no-any-return]

    return measured


def _stock_over_best(workload: str, figure: str, *methods: str) -> Callable[[Results], float]:
    return lambda results: (
        _entry(results, workload, "stock")[figure] / _best(results, workload, methods, figure)
    )


def _most(part: str, loop: str, soft: bool, beta: float | None = None) -> Callable[[Results], float]:
    def measured(results: Results) -> float:
        rows = results["reversal-in-time"][part]
        return max(  # type: ignore[no-any-return]
            row["grid"]
            for row in rows
            if row["loop"] == loop and row["soft"] is soft and beta in (None, row["beta"])
        )

    return measured


TARGETS = (
    Target(
        "200 RevSBlocks on the grid", "flipped spikes", 0, False,
        lambda r: r["drift"]["200"]["grid"]["flipped_spikes"],
    ),
    Target(
        "the same in floating point (published): it fails", "flipped spikes", 1, True,
        lambda r: r["drift"]["200"]["published"]["flipped_spikes"],
    ),
    Target(
        "held by 200 blocks over held by 8", "ratio", 1.02, False,
        lambda r: _entry(r, "chain-200", "blocks")["held"] / _entry(r, "chain-8", "blocks")["held"],
    ),
    Target(
        "RevSResNet37, mode memory", "MB an image", 8, False,
        _mb_an_image("rev-s-resnet37", "blocks + tape"),
    ),
    Target(
        "RevSResNet37 against MS-ResNet34", "times less", 3.79, True,
        _less_than("ms-resnet34", "rev-s-resnet37", "blocks + tape"),
    ),
    Target(
        "RevSFormer-4-384 against Spikformer-4-384", "times less", 3.0, True,
        _less_than("spikformer", "rev-s-former-4-384", "blocks + tape"),
    ),
    Target("MS-ResNet34, converted", "MB an image", 12, False, _mb_an_image("ms-resnet34", "grid")),
    Target(
        "RevSResNet37, mode speed, step time to plain", "ratio", 1.4, False,
        _ratio("rev-s-resnet37", "time_ratio", "blocks + tape, speed"),
    ),
    Target(
        "RevSResNet37, mode speed, step time to the published procedure", "ratio", 1.0, False,
        _ratio("rev-s-resnet37", "time_ratio", "blocks + tape, speed", "published"),
    ),
    Target(
        "RevSResNet37, mode speed, peak to the published procedure", "ratio", 1.0, False,
        _ratio("rev-s-resnet37", "peak_beyond_gradients", "blocks + tape, speed", "published"),
    ),
    Target(
        "SEW-ResNet34, stock held over ours", "times less", 58.65, True,
        _stock_over_best("sew-resnet34", "held", "memory"),
    ),
    Target(
        "membranes rebuilt over 1,000 and 5,000 steps", "that differ", 0, False,
        lambda r: sum(row["differ"] for row in r["reversal-in-time"]["rebuilt"]),
    ),
    *(
        Target(f"{loop} loop, {work}", figure, bound, False, _most(part, loop, *which))
        for loop in ("snnTorch", "SpikingJelly")
        for work, figure, bound, part, which in (
            ("soft reset, beta 0.5", "B a neuron and step", 0.27, "bytes", (True, 0.5)),
            ("soft reset, beta 0.9", "B a neuron and step", 0.18, "bytes", (True, 0.9)),
            ("hard reset", "B a neuron and step", 0.7, "bytes", (False,)),
            ("soft reset, step to stock's", "ratio", 1.6, "time", (True,)),
            ("hard reset, step to stock's", "ratio", 1.6, "time", (False,)),
        )
    ),
    Target(
        "coupled node, streamlined to plain backward", "ratio", 1 - 0.238, False,
        lambda r: max(
            row["backward_ratio"] for row in r["coupled-node"]["times"] if row["node"] == "streamlined"
        ),
    ),
    Target(
        "SLTT, peak at 1,000 steps to that at 10", "ratio", 1.02, False,
        lambda r: r["sltt"]["SLTT, converted | 1000"]["peak"] / r["sltt"]["SLTT, converted | 10"]["peak"],
    ),
)  # fmt: skip


def table(results: Results) -> str:
    """Every target in Markdown."""
    head = ["| work | to reach | measured | |", "|---|---|---:|---|"]
    return "\n".join([*head, *(target.row(results) for target in TARGETS)])
