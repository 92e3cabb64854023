"""How much may stand in a backward: as much as stood in its forward.

The one idea: where a product of the forward runs, its input and its result stand, both whole, in any mode.
So a backward, whose gradient is overwritten layer by layer, has room for one rebuilt tensor beside it, and
the step's peak is no higher. Sizes tell, so that equal shapes give equal choices.

Source: this package's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from snn_reversible_plugin.ops.layouts import is_plain, size_in_bytes
from snn_reversible_plugin.tape.recipes import tensors_among
from snn_reversible_plugin.tape.replayed import bytes_cached

# NOTE [Room]
#
# 1. A residual stream and its gradient are on neither side: the one stands beside the branch's forward, the
#    other beside its backward. Nor is what is held, a bit a spike.
# 2. What the backward has cached takes room, and so do gradients of parameters, until an optimizer has
#    stepped and freed them: those that stand by now and did not when the forward ran.
#
# For example, a VGG of equal layers of 32 MiB: forward, spikes and the convolution's result are 64. So are,
# in the backward, the gradient and that result. With 1 MiB of parameters' gradients they are 65, and the
# result is rebuilt a slice at a time, as often as it is asked for.


class Room:
    """What the products of one recording's forward had standing, each at its turn."""

    def __init__(self) -> None:
        self._stood = 0
        self._without_gradient: dict[int, weakref.ref[Tensor]] = {}  # parameters, by id

    def product(self, operands: Iterable[Tensor], out: Any) -> None:
        """A product was computed; ``out``: its result, or several."""
        stood = sum(map(size_in_bytes, tensors_among((out,))))
        for one in operands:
            if not is_plain(one):
                continue
            whole = one if one._base is None else one._base
            if not (whole.is_leaf and whole.requires_grad):
                stood += min(one.nbytes, one.untyped_storage().nbytes())  # none while it is in bits
            elif whole.grad is None:
                self._without_gradient[id(whole)] = weakref.ref(whole)
        self._stood = max(self._stood, stood)

    def has(self, nbytes: int, gradients: int) -> bool:
        """Whether there is room for so many bytes, in the backward that runs, beside a node's gradients."""
        return nbytes + gradients + bytes_cached() + self._of_parameters() <= self._stood

    def _of_parameters(self) -> int:
        found = 0
        for ref in self._without_gradient.values():
            parameter = ref()
            gradient = None if parameter is None else parameter.grad
            if gradient is not None and is_plain(gradient):
                found += gradient.nbytes
        return found
