"""Everything that is measured, and how it is shown. What measures it is a file an experiment.

Only the latter decides figures: another table here makes no stored result stale.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from .. import pictures, recordings
from ..experiment import Entries, Experiment
from ..tables import families, learning, time
from ..tables import peaks as of_peaks
from ..tables import steps as of_steps
from . import (
    block_accuracy,
    budgets,
    column_accuracy,
    columns,
    compiled,
    compiled_accuracy,
    coupled,
    drift,
    fits,
    freed_memory,
    host_time,
    long_sequences,
    over_step,
    parallel,
    peaks,
    published,
    reversal,
    sltt,
    steps,
    surgery,
    time_accuracy,
    wrap_accuracy,
)

_GROWTH = {
    f"{name}-{figure}": of_steps.growth(series, figure)
    for name, series in (
        ("blocks", "blocks"),
        ("time-leaky", "time steps of leaky-loop"),
        ("time-lif", "time steps of lif-loop"),
        ("batch", "batch of vgg"),
    )
    for figure in ("held", "peak")
}
_MORE = {
    "all": of_steps.networks, "main": of_steps.main, "behind": of_steps.behind, "methods": of_steps.methods
}  # fmt: skip
_TIME = partial(learning.by_method, methods=[*time_accuracy.METHODS])
_COMPILED = partial(learning.by_method, methods=[*compiled_accuracy.METHODS])
_BLOCK = partial(
    learning.by_data, arms=[*block_accuracy.ARMS], data=recordings.DATA, equals=block_accuracy.EQUALS
)
_COLUMN = partial(
    learning.by_data,
    arms=[*column_accuracy.ARMS],
    data=recordings.DATA,
    equals=column_accuracy.EQUALS,
    less=column_accuracy.LESS,
)
_WRAP = partial(
    learning.tuned, networks=[*wrap_accuracy.NETWORKS], arms=[*wrap_accuracy.ARMS], data=recordings.DATA
)


def draw_over_steps(entries: Entries, folder: Path, device: str) -> list[Path]:
    """The picture of the first page, one of all networks, and a report's."""
    if device != "cpu":
        return []
    return [*pictures.draw_over_steps(entries, over_step.SHOWN, folder), pictures.draw_report(folder)]


_TRAINED = {"goes_stale": False, "threads": 1}
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "steps", steps.works, of_steps.everything, together=steps.together, more=_MORE | _GROWTH,
            draw=pictures.draw_steps,
        ),
        Experiment(
            "over-step", over_step.works, partial(of_steps.over_step, titles=over_step.SHOWN),
            over_step.measure, draw=draw_over_steps,
        ),
        Experiment(
            "fits", fits.works, of_steps.fits, fits.measure, more={"fits-tried": of_steps.fits_tried}
        ),
        Experiment("peaks", peaks.works, of_peaks.peaks, peaks.measure, threads=1),
        Experiment("budgets", budgets.works, of_peaks.budgets, together=budgets.together, threads=1),
        Experiment(
            "freed-memory", freed_memory.works, of_peaks.freed_memory, together=freed_memory.together
        ),
        Experiment("host-time", host_time.works, time.host_time, together=host_time.together, threads=1),
        Experiment("drift", drift.works, time.drift, drift.measure),
        *(
            Experiment(
                name, works, time.compiled, compiled.measure, timed=compiled.timed,
                draw=partial(compiled.draw, name), goes_stale=False, threads=1,
                more={f"{name}-behind": time.compiled_behind},
            )
            for name, works in (("compiled", compiled.works), ("compiled-deep", compiled.deep))
        ),
        Experiment("columns", columns.works, time.columns, together=columns.together),
        Experiment("parallel", parallel.works, time.parallel, together=parallel.together),
        Experiment("surgery", surgery.works, time.surgery, together=surgery.together),
        Experiment("published", published.works, families.published, together=published.together),
        Experiment("reversal-rebuilt", reversal.lengths, time.rebuilt, reversal.rebuilt),
        Experiment("reversal-bytes", reversal.loops, time.bytes_held, reversal.bytes_held),
        Experiment("reversal-time", reversal.short_loops, time.step_time, reversal.step_time),
        Experiment("coupled-times", coupled.layers, time.coupled_times, together=coupled.times),
        Experiment("coupled-held", coupled.small, time.coupled_held, coupled.held),
        Experiment("sltt", sltt.works, time.sltt, together=sltt.together),
        Experiment(
            "long-sequences", long_sequences.works, time.long_sequences, long_sequences.measure, **_TRAINED
        ),
        Experiment(
            "time-accuracy", time_accuracy.works, _TIME, time_accuracy.measure, draw=time_accuracy.draw,
            **_TRAINED,
        ),
        Experiment(
            "compiled-accuracy", compiled_accuracy.works, _COMPILED, compiled_accuracy.measure, **_TRAINED
        ),
        Experiment(
            "block-accuracy", block_accuracy.works, _BLOCK, block_accuracy.measure,
            draw=block_accuracy.draw, **_TRAINED,
        ),
        Experiment("column-accuracy", column_accuracy.works, _COLUMN, column_accuracy.measure, **_TRAINED),
        Experiment(
            "wrap-accuracy", wrap_accuracy.works, _WRAP, together=wrap_accuracy.together, **_TRAINED
        ),
    )
}  # fmt: skip
