"""Check mode's search for what is written past the operations of torch and past version counters.

The one idea: each value has a checksum from when it was made; whoever uses it compares. What differs then
was written by something that no dispatch mode sees.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.off_stack import OffStack
from snn_reversible_plugin.tape.origins import live_in
from snn_reversible_plugin.tape.unseen import Unseen, WrittenUnseen, checksum, of_value

if TYPE_CHECKING:
    from snn_reversible_plugin.tape.tape import Tape

REMEDY = (
    "Write by operations of torch (.copy_, torch.where), to a clone, or before the model is called; put "
    "what a kernel of your own does into an autograd function that allocates its output."
)
NO_DATA = (
    "Write to the tensor itself under torch.no_grad(), so that autograd says whether it needed the value, "
    "or to a clone."
)


def compared(tape: Tape, used: Iterable[tuple[Handle, torch.Tensor]]) -> None:
    """Check mode: somebody uses tensors that have these handles. An observer is told what it isn't.

    Raises:
        WrittenUnseen: one is not what it was when it was made, and there is no observer.
    """
    _look_back(tape)
    for handle, tensor in used:
        handle.where = handle.where or tape.where
        if not is_plain(tensor):
            continue
        with OffStack(tape), torch.no_grad():
            now, then = checksum(tensor), handle.checksum
            same = then is None or torch.equal(now, then)
        handle.checksum = now
        if same:
            continue
        func = getattr(handle, "func", None)
        made = "" if func is None else f", the output of {func.__name__.partition('.')[0]},"
        finding = Unseen(
            handle.where or "the model",
            f"{of_value(tensor)}{made} was written to by what torch does not see (numpy, a kernel)",
            REMEDY,
        )
        if tape.observer is None:
            raise WrittenUnseen(finding)
        tape.observer.unseen(finding)


def about_to_write(tape: Tape, tensors: Iterable[torch.Tensor]) -> None:
    """Check mode: an operation writes to these, and moves the version counter on once it has returned."""
    _look_back(tape)
    for tensor in tensors:
        if tape.observer is not None and is_plain(tensor):
            live = [(one, one._version) for one in live_in(tensor) if one is not tensor]
            tape.latest_writes.append((tensor, tensor._version, live))


def _look_back(tape: Tape) -> None:
    """Tell the observer of a write past the counter that other tensors on the same memory have."""
    writes, tape.latest_writes = tape.latest_writes, []
    for tensor, version, live in writes:
        seen = tensor._version == version or all(one._version != before for one, before in live)
        if not seen and tape.observer is not None:
            what = f"{of_value(tensor)} is written to through .data or another tensor on the same memory"
            tape.observer.unseen(Unseen(tape.where or "the model", what, NO_DATA))
