"""A tape on its thread: the mode and the hooks put on, and taken off again whatever came between.

The one idea: what a thread has on when a recording starts is written down, so that leaving it, by an
exception too, comes down to making the thread as it was. Source: ``TorchDispatchMode``,
``saved_tensors_hooks``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
    _len_torch_dispatch_stack,
    _pop_mode,
    _push_mode,
)

# NOTE [An interrupt in here]
#
# 1. `take_off` may be called when a part of `put_on` was done, and twice. It looks at what is there instead
#    of trusting what was done.
# 2. Where an exception ended the recording, whatever was entered inside is over: modes, hooks, grad mode
#    and autocast are those of before, also where an interrupt kept an inner context manager from leaving.
#    An autocast that was not left would go on handing out casts of old weights, so its cache is emptied.
# 3. What can't be asked in some version of torch (the hooks on top) is done once, as in a plain exit.

_autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
_top_hooks: Callable[[bool], Any] | None = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]
_tell_compiler: Callable[[bool], None] | None = getattr(
    _python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None
)
_AUTOCAST = "cpu", "cuda"
# Without both, a compiler's hook into frames stays as an interrupt left it.
_frames = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_compiler: Callable[[], Any] = getattr(_frames, "get_eval_frame_callback", lambda: None)
_set_compiler: Callable[[Any], Any] = getattr(
    _frames if hasattr(_frames, "get_eval_frame_callback") else None, "set_eval_frame", lambda _: None
)

Hooks = tuple[Callable[..., Any], Callable[..., Any]]


def are_on_top(pack: Callable[..., Any]) -> bool:
    """Whether hooks with this one to pack are those that autograd asks; False where that can't be known."""
    top = None if _top_hooks is None else _top_hooks(False)
    return top is not None and top[0] == pack


def has_others(pack: Callable[..., Any] | None) -> bool:
    """Whether autograd asks other hooks than those with this one to pack; False where nobody tells."""
    top = None if _top_hooks is None else _top_hooks(False)
    return top is not None and top[0] != pack


class OnThread:
    """A mode and a pair of hooks on this thread, and what it had on before them."""

    __slots__ = (
        "_autocast", "_compiler", "_flags", "_grad", "_hooks", "_mode", "_modes", "_nesting", "_pushed",
    )  # fmt: skip

    def __init__(self, mode: TorchDispatchMode, hooks: Hooks) -> None:
        self._mode, self._hooks, self._pushed = mode, hooks, False
        self._modes = _get_current_dispatch_mode_stack() if _len_torch_dispatch_stack() else []
        self._flags = [getattr(_python_dispatch, name) for name in _FLAGS]
        self._grad, self._compiler = torch.is_grad_enabled(), _compiler()
        self._autocast = [torch.is_autocast_enabled(kind) for kind in _AUTOCAST]
        self._nesting = _autocast_nesting()

    def put_on(self) -> None:
        """Put the hooks and the mode on."""
        _autograd._push_saved_tensors_default_hooks(*self._hooks)
        self._pushed = True
        self._mode.__enter__()

    def take_off(self, failed: bool) -> None:
        """Take them off; ``failed``: and make the thread as it was."""
        if not failed and _get_current_dispatch_mode() is self._mode:
            self._mode.__exit__(None, None, None)
        else:
            self._restore_modes(failed)
        self._restore_hooks(failed)
        if failed:
            torch._C._set_grad_enabled(self._grad)
            _set_compiler(self._compiler)
            self._restore_autocast()

    def _restore_modes(self, failed: bool) -> None:
        there = _get_current_dispatch_mode_stack()
        wanted = self._modes if failed else [mode for mode in there if mode is not self._mode]
        while _len_torch_dispatch_stack():
            _pop_mode()
        for mode in wanted:
            _push_mode(mode)
        for name, value in zip(_FLAGS, self._flags, strict=True):
            setattr(_python_dispatch, name, value)
            if _tell_compiler is not None and name.endswith("without_ignore_compile_internals"):
                _tell_compiler(value)

    def _restore_hooks(self, failed: bool) -> None:
        if _top_hooks is None:
            if self._pushed:
                self._pushed = False
                _autograd._pop_saved_tensors_default_hooks()
            return
        above: list[Hooks] = []
        found = False
        while not found and (top := _top_hooks(True)) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            found = top[0] is self._hooks[0]
            if not found:
                above.append(top)
        if not (found and failed):
            for hooks in reversed(above):
                _autograd._push_saved_tensors_default_hooks(*hooks)

    def _restore_autocast(self) -> None:
        for kind, enabled in zip(_AUTOCAST, self._autocast, strict=True):
            if torch.is_autocast_enabled(kind) is not enabled:
                torch.set_autocast_enabled(kind, enabled)
        if _autocast_nesting() > self._nesting:
            torch.clear_autocast_cache()
            while _autocast_nesting() > self._nesting:
                torch.autocast_decrement_nesting()


def _autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
