"""States that neurons leave with the user when a recording is over.

The one idea: between two recordings they may be written to, and no tape sees it.

Source: this package's own.
"""

from __future__ import annotations

import threading
import weakref

import torch

from snn_reversible_plugin.ops.layouts import storage_key
from snn_reversible_plugin.tape.as_stock import followed_among
from snn_reversible_plugin.tape.exposed import compare_later, sum_later
from snn_reversible_plugin.tape.tape import Tape

# NOTE [A state between two calls]
#
# A loop that calls a network once a step has a recording a call, and between them the states that neurons
# hold are the user's, who may write to them under no_grad: episodes that are over are zeroed. No tape sees
# it. So where a neuron took one step in a recording, what relies on the state after it is given a copy when
# the recording ends: one state, which goes with the next step. Several steps in one recording are a loop
# inside of it, and nothing is copied.

_local = threading.local()


def note_returned(key: object, state: torch.Tensor, taken: int, held: bool) -> None:
    """Steps have left a state; see :func:`.tape.returns`."""
    returned = _local.__dict__.setdefault("returned", {})
    steps = returned[id(key)][0] if id(key) in returned else 0
    returned[id(key)] = steps + taken, weakref.ref(state), held


def let_go_of_returned(tape: Tape) -> set[int]:
    """The recording is over; the storages of states that a loop inside of it left."""
    of_loops = set()
    for steps, ref, held in _local.__dict__.pop("returned", {}).values():
        state = ref()
        if state is not None and not held:
            sum_later(state, followed_among(tape.kept_by_storage, storage_key(state)))
        elif state is not None and steps <= 1:
            storage = storage_key(state)
            followed = followed_among(tape.kept_by_storage, storage)
            kept = tape.kept_by_storage.get(storage, [])
            tape.before_write(state)
            compare_later(state, kept, followed)
            tape.kept_by_storage.setdefault(storage, []).extend(followed)
        elif state is not None:
            of_loops.add(storage_key(state))
    return of_loops
