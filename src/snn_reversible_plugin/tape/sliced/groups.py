"""How the rows of a tensor may go together: as samples, or as each time step's samples.

The one idea: whether two dimensions are time steps and samples, no shape says; what led to the tensor does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from operator import mul
from typing import Any

import torch

from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.replayed import PLAIN
from snn_reversible_plugin.tape.sliced.noted import size_of
from snn_reversible_plugin.tape.sliced.rows import is_repeated


def groups_of(size: torch.Size, handle: Handle) -> Iterator[tuple[int, int]]:
    """How many groups of how many rows: of time steps' samples, if a layer that sees no time led to it; of
    its first dimension; of what that was in what led to it, as where an attention tells heads apart."""
    one: Any = handle
    coarser: list[int] = []
    while one.__class__ in PLAIN and one.args:
        one, *how = one.args
        if isinstance(one, list):  # what is put together, perhaps in each step's samples
            one, inside = one[0], bool(how) and how[0] > 1
            if inside and len(size_of(one) or ()) == len(size) > 2:
                yield size[0], size[1]
                return
        before = size_of(one)
        if not before:  # small, or one number
            continue
        if len(size) > 2 and (before[0] == size[0] * size[1] or is_repeated(before, size)):
            yield size[0], size[1]
            return
        coarser += [rows for rows in accumulate(before, mul) if 1 < rows < size[0] and not size[0] % rows]
    yield 1, size[0]
    yield from ((1, rows) for rows in sorted({*coarser}, reverse=True)[:4])
