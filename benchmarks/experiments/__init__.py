"""Everything that is measured: a file an experiment, and one list of them."""

from __future__ import annotations

from . import (
    block_accuracy,
    coupled,
    drift,
    long_sequences,
    reversal,
    sltt,
    steps,
    surgery,
    time_accuracy,
)

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        steps.STEPS,
        drift.DRIFT,
        surgery.SURGERY,
        *reversal.REVERSAL,
        *coupled.COUPLED,
        sltt.SLTT,
        long_sequences.LONG_SEQUENCES,
        time_accuracy.TIME_ACCURACY,
        block_accuracy.BLOCK_ACCURACY,
    )
}
