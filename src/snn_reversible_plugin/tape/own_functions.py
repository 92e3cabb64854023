"""What an autograd function of the user's saves that computes a block of layers itself: kept as it is.

The one idea: a function that runs convolutions in its forward, where nothing is recorded for autograd, is a
checkpoint or a reversible block: its backward runs them again. If the tape rebuilt what it saves, the same
would be run twice, and both would be alive at the peak.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import STRIDED, size_in_bytes
from snn_reversible_plugin.tape.copies import copy_of
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.operators import Kind, Operator
from snn_reversible_plugin.tape.origins import enter, is_ended, look_up, older_among
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.recipes import tensors_among
from snn_reversible_plugin.tape.replayed import Replayed

# NOTE [Room for a kernel]
#
# Inside a function (there is no grad mode) what an operation makes may be room for a kernel that torch
# doesn't see, which fills it. That is what allocates, and all that is made of nothing that is known:
# `torch.arange(n)`, `torch.tensor(numbers)`, `torch.cat([zeros, zeros])`. It is nobody's recipe. What has a
# gradient was handed in: operations outside computed it, and it has no recipe because it is an anchor. A
# state of an earlier call has been filled by now.

# NOTE [Who saves]
#
# 1. A function's forward runs without grad mode, and what it saves is packed when that has returned, in the
#    very call that ran it: by the same frame, at the same instruction. An operation that comes after it
#    saves from another place, and gets a recipe as ever: a layer that is written as a function is replayed.
# 2. Bits are less than what stock holds, so what is rebuilt from bits alone, without a product, is.


def may_be_filled(operator: Operator, operands: list[torch.Tensor], began: int) -> bool:
    """Whether what an operation makes of these may be filled by what torch doesn't see.

    ``began``: when this recording began.
    """
    if torch.is_grad_enabled() or operator.kind is Kind.VIEW:
        return False
    return operator.allocates or (all(map(_may_be_room, operands)) and not older_among(operands, began))


def enter_unknown(operator: Operator, args: Sequence[Any], out: Any) -> None:
    """Write down what an operation made that may be filled."""
    copy = copy_of(args[0], out) if operator.name == "clone" else None
    if copy is not None:
        return enter(out, copy)
    for tensor in tensors_among((out,)):
        bit = operator.binary or tensor.dtype is torch.bool
        enter(tensor, Packed() if bit and operator.kind is not Kind.VIEW else None)


def _may_be_room(tensor: torch.Tensor) -> bool:
    return look_up(tensor) is None and not (tensor.requires_grad or is_ended(tensor))


class OwnFunctions:
    """Knows whether what is packed now is saved by a function that has just run a product itself.

    ``calls``: the frames that ran the last one, and where they stood.
    """

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls: set[tuple[int, int]] = set()

    def product(self) -> None:
        """A convolution or matrix product has run without grad mode."""
        self.calls.clear()
        frame: FrameType | None = sys._getframe(3)  # what runs the mode that calls this
        while frame is not None:
            self.calls.add((id(frame), frame.f_lasti))
            frame = frame.f_back

    def over(self) -> None:
        """An operation runs in grad mode."""
        self.calls.clear()

    def keeps(self, tensor: torch.Tensor, handle: object, caller: FrameType | None) -> bool:
        """Whether a tensor that has this handle, and is saved from this frame, is to be kept as it is."""
        if not self.calls or caller is None or not isinstance(handle, Replayed):
            return False
        return (id(caller), caller.f_lasti) in self.calls and not is_from_bits(handle, tensor.nbytes)


def is_from_bits(handle: Replayed, size: int) -> bool:
    """Whether a value is rebuilt by no product, and from nothing large that is not bits."""
    waiting: list[Handle] = [handle]
    seen: set[Handle] = {handle}
    while waiting:
        one = waiting.pop()
        if isinstance(one, Replayed) and one.products:
            return False
        if isinstance(one, Kept):
            kept = one.tensor
            held = kept.nbytes if kept.layout is STRIDED else size_in_bytes(kept)
            if 8 * held >= size:
                return False
        more = [operand for operand in one.relies_on() if operand not in seen]
        seen.update(more)
        waiting += more
    return True
