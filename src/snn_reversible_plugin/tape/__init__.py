"""Turning the tape on and off, and what a neuron says to it.

A neuron is an autograd function that saves its input with ``ctx.save_for_backward``, as any other; under
:class:`recording` that stores a handle. It does its arithmetic under :func:`paused`, vouches for its
spikes with :func:`mark_spikes`, and may overwrite what it :func:`owns`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from snn_reversible_plugin.tape.handles import Handle, Packed, owns, unpack
from snn_reversible_plugin.tape.origins import enter
from snn_reversible_plugin.tape.recorder import WORK_LIMIT, Observer, OffStack, Tape

__all__ = [
    "MODES",
    "current",
    "handle_of",
    "mark_opaque",
    "mark_spikes",
    "may_promise",
    "may_record",
    "owns",
    "paused",
    "recording",
    "runs_eagerly",
    "suspended",
]

MODES = tuple(WORK_LIMIT)

_local = threading.local()


def current() -> Tape | None:
    """The tape that records on this thread, if any."""
    return getattr(_local, "tape", None)


class recording:
    """Context manager: a tape records on this thread.

    Inside another recording, under ``no_grad``, in a compiled region or under a ``torch.func``
    transform it does nothing, so the stock network runs.

    Args:
        mode: ``"memory"`` replays everything replayable, ``"speed"`` what needs no convolution and no
            matrix product.
        check: compare each rebuilt tensor with a checksum from the forward.
        observer: is told of each saved tensor.
    """

    __slots__ = ("_hooks", "_tape", "check", "mode", "observer")

    def __init__(
        self, mode: str = "memory", *, check: bool = False, observer: Observer | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
        self.mode, self.check, self.observer = mode, check, observer

    def __enter__(self) -> Tape | None:
        self._tape: Tape | None = None
        if current() is not None or not may_record():
            return current()
        tape = Tape(self.mode, self.check, self.observer)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(tape.pack, unpack)
        self._hooks.__enter__()
        try:
            tape.__enter__()
        except BaseException:
            self._hooks.__exit__()
            raise
        self._tape = _local.tape = tape
        return tape

    def __exit__(self, *exc: object) -> None:
        if self._tape is not None:
            _local.tape = None
            self._tape.__exit__(*exc)
            self._hooks.__exit__()
            self._tape.finish()
            self._tape = None


def runs_eagerly() -> bool:
    """Whether operations are computed here as they are called: no compiler, no ``torch.func`` transform."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def may_record() -> bool:
    """Whether a graph that a tape could serve is being built here."""
    return torch.is_grad_enabled() and runs_eagerly()


def may_promise() -> bool:
    """Whether a tape records what outlives this call: it does not in a block that a backward rebuilds."""
    recorder = current()
    return recorder is not None and not recorder.suspended and recorder.graph_task == -1


@contextmanager
def suspended() -> Iterator[None]:
    """Inside, the tape keeps everything: for a part of a network that must not be replayed."""
    tape = current()
    if tape is None:
        yield
        return
    tape.suspended += 1
    try:
        yield
    finally:
        tape.suspended -= 1


def paused() -> OffStack:
    """Context manager: operations inside are not recorded. For a neuron's own arithmetic.

    What they make counts as coming from outside, until :func:`mark_spikes` or :func:`mark_opaque`.
    """
    recorder = current()
    if recorder is not None:
        recorder.last_product = (
            None  # a neuron takes room, and what comes before it isn't the end of a block
        )
    return OffStack(recorder)


def handle_of(tensor: torch.Tensor) -> Handle:
    """A handle of a tensor, under a tape: for one who may have to compute something again."""
    recorder = current()
    assert recorder is not None
    with OffStack(recorder):
        return recorder.handle_of(tensor)


def mark_spikes(spikes: torch.Tensor) -> None:
    """Vouch that a tensor holds zeros and ones by construction: one bit when something saves it."""
    if current() is not None:
        enter(spikes, Packed())


def mark_opaque(*tensors: torch.Tensor) -> None:
    """Say that tensors were computed under :class:`paused`: they have no recipe, and cost memory."""
    if current() is not None:
        for tensor in tensors:
            enter(tensor, None)
