"""The dyadic grid: multiples of 2^-bits, on which float addition can be undone."""

from snn_reversible_plugin.grid.numbers import (
    add_snapped,
    bits_for,
    check_bits,
    decay,
    limit,
    remainder,
    snap,
    snap_number,
    stream_dtype,
    sub_snapped_,
    undecay,
)
from snn_reversible_plugin.grid.range import check_range, look_at_graphs, reach, watch, when_over

__all__ = [
    "add_snapped",
    "bits_for",
    "check_bits",
    "check_range",
    "decay",
    "limit",
    "look_at_graphs",
    "reach",
    "remainder",
    "snap",
    "snap_number",
    "stream_dtype",
    "sub_snapped_",
    "undecay",
    "watch",
    "when_over",
]
