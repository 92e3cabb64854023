"""Operations that a tape is not to see: a neuron's own, a handle's."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from snn_reversible_plugin.tape.tape import Tape

# What torch.compiler.disable does, at a hundredth of its time and without an import of the compiler: sets
# what compiles the frames that are entered from now on, None for nothing, and gives what did before.
_frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
set_compiler: Callable[[Any], Any] = getattr(_frames, "set_eval_frame", lambda compiler: compiler)

# torch.utils._python_dispatch has these in functions of its own, which take longer than what they call.
_depth, _mode_at = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at
_push, _pop = torch._C._push_on_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack


def never_compiled(code: CodeType) -> bool:
    """Let the compiler leave this code as it is, without an import of it; whether that could be done.

    What it calls is another matter: see :data:`set_compiler`.
    """
    if hasattr(_frames, "skip_code"):
        _frames.skip_code(code)
    elif hasattr(_frames, "set_code_exec_strategy"):
        leave, whatever = _frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT
        _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(leave, whatever))
    else:
        return False
    return True


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
        if (depth := _depth()) and _mode_at(depth - 1) is self._tape:
            _pop(None)
            self._popped = True
            self._compiler = set_compiler(None)
        else:
            self._tape.pauses += 1

    def __exit__(self, *exc: object) -> None:
        if self._tape is None:
            return
        if self._popped:
            set_compiler(self._compiler)
            _push(self._tape)
        else:
            self._tape.pauses -= 1
