"""What an allocator gives out and gets back while a piece of work runs, and what it has given out in all.

The one idea: the profiler hears of every block, a kernel's workspace too, but only while it is on, and it
is on for a moment at a time. What was given out before is asked of the allocator: CUDA's says it, and of
the C heap, which holds a CPU's tensors, ``mallinfo2`` does.

Source: ``torch.profiler`` with ``profile_memory``; glibc 2.33, ``malloc/malloc.h``.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch._C._profiler import _EventType, _RecordFunctionFast
from torch.autograd.profiler import profile

# NOTE [Starting the profiler]
#
# 1. It is a thread's own, and one at a time: who finds one on leaves it alone.
# 2. Some builds of its library write lines to stderr at each start and stop. Its level of logging is read
#    once, when it is first used, and is the user's where the user has set it.

_LOG_LEVEL = "KINETO_LOG_LEVEL"
_SILENT = "99"
_MARK = "snn_reversible_plugin: "


class Allocation(NamedTuple):
    """One event of an allocator: ``size`` bytes at ``address``, negative where they were given back.

    ``operator`` is the outermost operator that it happened in, and ``operator_ends`` when that was over; in
    nanoseconds, as ``time`` is. A :func:`mark` is an event of no bytes with its text for an operator.
    """

    time: int
    address: int
    size: int
    operator: str
    operator_ends: int


def mark(text: str) -> None:
    """Put a mark among the allocator's events, for counters that look for it."""
    with _RecordFunctionFast(_MARK + text):
        pass


def start() -> Any:
    """Start to listen on this thread, where no profiler is on: what :func:`stop` takes."""
    with _quiet_start():
        return profile(profile_memory=True).__enter__()


def stop(running: Any, device: str = "cpu") -> list[Allocation]:
    """What the allocator of a device gave and got back since, and marks, in the order of time."""
    running.__exit__(None, None, None)
    found = []
    waiting = [(root, "", 0) for root in reversed(running.kineto_results.experimental_event_tree())]
    while waiting:
        event, operator, ends = waiting.pop()
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device:
            fields = event.extra_fields
            found.append(Allocation(event.start_time_ns, fields.ptr, fields.alloc_size, operator, ends))
        elif event.tag == _EventType.TorchOp and event.name.startswith(_MARK):
            found.append(Allocation(event.start_time_ns, 0, 0, event.name.removeprefix(_MARK), 0))
        elif not operator and event.tag == _EventType.TorchOp and event.name.startswith("aten::"):
            operator, ends = event.name.removeprefix("aten::"), event.end_time_ns
        waiting += [(child, operator, ends) for child in reversed(event.children)]
    found.sort(
        key=attrgetter("time")
    )  # threads by time; what happened at once on one thread stays in order
    return found


@contextmanager
def _quiet_start() -> Iterator[None]:
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = _SILENT
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]


class _HeapInfo(ctypes.Structure):
    """``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    ]  # fmt: skip


def _heap() -> Callable[[], Any] | None:
    try:
        info = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    info.restype = _HeapInfo
    return info


_mallinfo2 = _heap()


def given_out(device: str) -> int | None:
    """Bytes that a device's allocator has given out and not got back; None where nobody says.

    On a CPU those of the whole C heap, what isn't PyTorch's with it.
    """
    if device == "cuda":
        return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    if device != "cpu" or _mallinfo2 is None:
        return None
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)
