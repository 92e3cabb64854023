"""What is on around a call: whether a network's operations are computed as they are called, or watched.

The one idea: what traces, transforms or counts a network's operations has to see those of the stock
network. So where something of that kind is on, nothing of this package runs, and there is no tape.

Source: ``torch.jit.trace``, ``torch.export``, ``torch.func``, ``TorchDispatchMode``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from snn_reversible_plugin.ops.interrupts import Switch

# NOTE [Modes that somebody else has on]
#
# 1. A mode that counts operations (SpikingJelly's op counters, torch's FLOP counter) counts the network,
#    not how its training saves memory: the stock network runs, in training too.
# 2. A mode that traces or fakes operations (make_fx, torch.export, fake tensors) can't see what a kernel of
#    ours writes: stock runs.
# 3. Without a gradient there is nothing to save, and under any other mode stock runs too.
# 4. With a gradient, other modes stay what they are to a tape: they see what runs. A tool that measures
#    memory by one measures what there is.
# 5. A first run that a backward repeats has grad mode off and a gradient all the same. The two have to
#    be alike, so whoever runs it says so: `to_be_repeated`.

_COUNTERS = "op_counter", "flop_counter"
_INFRASTRUCTURE = tuple(
    getattr(torch._C._TorchDispatchModeKey, name)
    for name in ("FAKE", "PROXY", "FUNCTIONAL")
    if hasattr(torch._C._TorchDispatchModeKey, name)
)
_transforms = torch._C._functorch.peek_interpreter_stack
_depth, _mode_at = torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at
_repeated = Switch()


class OwnMode:
    """Mixin of the modes of this package, which are nothing foreign."""


def to_be_repeated() -> AbstractContextManager[None]:
    """Context manager: inside runs, without a graph, what a backward will run again with one."""
    return _repeated.on()


def runs_eagerly() -> bool:
    """Whether operations are computed here as they are called, and nobody has to see stock's.

    No compiler, no tracer, no ``torch.func`` transform, no gradient in forward mode, and none of the modes
    in the note above.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing() or _transforms() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False  # the functions of this package have formulas for the backward alone
    for at in range(_depth()):
        if not isinstance(_mode_at(at), OwnMode):
            return not _is_watched()
    return True


def _is_watched() -> bool:
    foreign = [mode for mode in _get_current_dispatch_mode_stack() if not isinstance(mode, OwnMode)]
    if not torch.is_grad_enabled() and not _repeated.is_on():
        return True
    return any(map(_counts, foreign)) or any(
        torch._C._get_dispatch_mode(key) is not None for key in _INFRASTRUCTURE
    )


def _counts(mode: Any) -> bool:
    """Whether a mode counts operations: by the name of where it comes from, which copies of it share."""
    return any(name in type(mode).__module__ for name in _COUNTERS)
