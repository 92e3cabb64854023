"""What the project set out to reach, beside what was measured, for those who work on it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from .pages import Results, number_at
from .tables import Table

IMAGES_A_BATCH = 8


@dataclass(frozen=True)
class Target:
    """``path`` is one of :mod:`benchmarks.pages`; of all that match a pattern the worst counts."""

    work: str
    figure: str
    bound: float
    path: str
    at_least: bool = False

    def measured(self, results: Results) -> float | None:
        """None where a figure is missing."""
        try:
            above, *below = (self._worst(part.strip(), results) for part in self.path.split(" over "))
            return above / below[0] if below else above
        except KeyError:
            return None

    def is_reached(self, found: float | None) -> bool:
        return found is not None and (found >= self.bound if self.at_least else found <= self.bound)

    def _worst(self, path: str, results: Results) -> float:
        stem, pattern, *rest = path.split("/")
        keys = [key for key in results.get(stem, {}) if fnmatchcase(key, pattern)] or [pattern]
        return max(number_at("/".join((stem, key, *rest)), results) for key in keys)


def _peak(workload: str, method: str) -> str:
    return f"cpu/{workload} | {method}/peak_beyond_gradients"


_REV, _BLOCKS, _SPEED = "rev-s-resnet37", "blocks + tape", "blocks + tape, speed"
AT_MOST = (
    ("200 RevSBlocks on the grid", "flipped spikes", 0, "drift/200 | grid/flipped_spikes"),
    (
        "held by 200 blocks over held by 8", "ratio", 1.02,
        "cpu/chain-200 | blocks/held over cpu/chain-8 | blocks/held",
    ),
    ("RevSResNet37, mode memory", "bytes a batch", 8e6 * IMAGES_A_BATCH, _peak(_REV, _BLOCKS)),
    ("MS-ResNet34, converted", "bytes a batch", 12e6 * IMAGES_A_BATCH, _peak("ms-resnet34", "grid")),
    ("RevSResNet37, mode speed", "step to plain's", 1.4, f"cpu/{_REV} | {_SPEED}/time_ratio"),
    (
        "RevSResNet37, mode speed", "step to the published procedure's", 1.0,
        f"cpu/{_REV} | {_SPEED}/time_ratio over cpu/{_REV} | published/time_ratio",
    ),
    (
        "RevSResNet37, mode speed", "peak to the published procedure's", 1.0,
        f"{_peak(_REV, _SPEED)} over {_peak(_REV, 'published')}",
    ),
    ("membranes rebuilt over thousands of steps", "that differ", 0, "reversal-rebuilt/* | grid/differ"),
    *(
        (f"{loop}, {which}", figure, bound, f"reversal-{part}/{loop}, {which}* | grid/grid")
        for loop in ("snnTorch", "SpikingJelly")
        for which, figure, bound, part in (
            ("soft reset, beta 0.5", "B a neuron and step", 0.27, "bytes"),
            ("soft reset, beta 0.9", "B a neuron and step", 0.18, "bytes"),
            ("hard reset", "B a neuron and step", 0.7, "bytes"),
            ("soft reset", "step to stock's", 1.6, "time"),
            ("hard reset", "step to stock's", 1.6, "time"),
        )
    ),
    (
        "coupled node, streamlined to plain backward", "ratio", 1 - 0.238,
        "coupled-times/* | streamlined/backward_ratio",
    ),
    (
        "SLTT, peak at 1,000 steps to that at 10", "ratio", 1.02,
        "sltt/1000 | SLTT, converted/peak over sltt/10 | SLTT, converted/peak",
    ),
)  # fmt: skip
AT_LEAST = (
    ("200 blocks as published: they fail", "flipped spikes", 1, "drift/200 | published/flipped_spikes"),
    (
        "RevSResNet37 against MS-ResNet34", "times less", 3.79,
        f"{_peak('ms-resnet34', 'stock')} over {_peak(_REV, _BLOCKS)}",
    ),
    (
        "RevSFormer-4-384 against Spikformer-4-384", "times less", 3.0,
        f"{_peak('spikformer', 'stock')} over {_peak('rev-s-former-4-384', _BLOCKS)}",
    ),
    (
        "SEW-ResNet34, stock held over ours", "times less", 58.65,
        "cpu/sew-resnet34 | stock/held over cpu/sew-resnet34 | memory/held",
    ),
)  # fmt: skip
TARGETS = tuple(
    Target(*row, at_least=at_least)
    for rows, at_least in ((AT_MOST, False), (AT_LEAST, True))
    for row in rows
)


def table(results: Results) -> Table:
    """Every target. One that is missed says so."""
    rows = []
    for target in TARGETS:
        found = target.measured(results)
        verdict = "reached" if target.is_reached(found) else "missed"
        bound = f"{target.figure} {'≥' if target.at_least else '≤'} {target.bound:g}"
        cells = ("not measured", "") if found is None else (f"{found:,.4g}", verdict)
        rows.append((target.work, bound, *cells))
    return Table(("work", "to reach", "measured", ""), rows)
