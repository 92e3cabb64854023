"""Copies that an autograd function makes of what it is given: ``ctx.save_for_backward(v.clone())``.

The one idea: a copy may be room for a kernel that torch doesn't see, so nothing vouches for it. When
something first relies on it, the kernel has run. On a CPU the copy is then compared with what it was made
of: where all bits are equal, the handle of that one is the copy's, and no second tensor is held.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import is_dense, is_plain
from snn_reversible_plugin.tape.by_values import packed_by_values
from snn_reversible_plugin.tape.handles import Handle, Passing
from snn_reversible_plugin.tape.origins import look_up


class Copy(Passing):
    """Leads to what a tensor is a copy of, if it still is one."""

    __slots__ = ("_copy", "_handle", "_source")

    def __init__(self, copy: torch.Tensor, source: torch.Tensor, handle: Handle) -> None:
        self._copy, self._source, self._handle = weakref.ref(copy), weakref.ref(source), handle

    def leads_to(self) -> Handle | None:
        copy, source = self._copy(), self._source()
        if copy is None or source is None or look_up(source) is not self._handle:
            return None
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            same = torch.equal(_bytes(copy), _bytes(source))
        return self._handle if same else None


def copy_of(source: torch.Tensor, out: torch.Tensor) -> Copy | None:
    """The handle of a copy; None where it can't be compared with what it is made of."""
    handle = look_up(source)
    if not isinstance(handle, Handle) or isinstance(handle, Passing) or source.device.type != "cpu":
        return None
    fits = is_plain(source) and is_dense(source) and source.stride() == out.stride()
    return Copy(out, source, handle) if fits else None


def known_of(tensor: torch.Tensor) -> Any:
    """What :func:`look_up` says of an operand, or else its values; it is entered.

    A copy that is computed with is kept: it may be a state (a trace of spikes), which lives anyway.
    """
    handle = look_up(tensor)
    return packed_by_values(tensor) if handle is None or isinstance(handle, Copy) else handle


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
