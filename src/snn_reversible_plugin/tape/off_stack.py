"""Operations that a tape is not to see: a neuron's own, a handle's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

if TYPE_CHECKING:
    from snn_reversible_plugin.tape.tape import Tape

# What torch.compiler.disable does, at a hundredth of its time and without an import of the compiler: sets
# what compiles the frames that are entered from now on, None for nothing, and gives what did before.
_frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
set_compiler: Callable[[Any], Any] = getattr(_frames, "set_eval_frame", lambda compiler: compiler)


class OffStack:
    """Context manager: a tape records nothing inside; None for no tape.

    Nor is anything compiled: a module that the user compiled runs as it is written under a tape, because
    the compiler steps aside for a mode on the stack. Where that is off it would compile the neurons' code.
    """

    __slots__ = ("_compiler", "_popped", "_tape")

    def __init__(self, tape: Tape | None) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        self._popped = False
        if self._tape is None:
            return
        # Off the stack it costs nothing; below a mode that the user entered it has to stay.
        if _get_current_dispatch_mode() is self._tape:
            _pop_mode()
            self._popped = True
            self._compiler = set_compiler(None)
        else:
            self._tape.pauses += 1

    def __exit__(self, *exc: object) -> None:
        if self._tape is None:
            return
        if self._popped:
            set_compiler(self._compiler)
            _push_mode(self._tape)
        else:
            self._tape.pauses -= 1
