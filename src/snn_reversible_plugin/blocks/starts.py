"""States that a branch started from and that need not be held: zeros, and what is a number or less.

The one idea: a fresh neuron of snnTorch has a tensor of zeros for a membrane, or, new, an empty one. How
such a tensor is made again takes no memory. Source: ``reset_mem`` in ``snntorch/_neurons`` 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.modules.kinds import Table
from snn_reversible_plugin.ops.devices import may_look

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Start:
    """A state as it was before a run: how to make it again.

    Example:
        >>> start = Start.of({}, "mem", torch.zeros(2, 3))
        >>> start.make()
        tensor([[0., 0., 0.],
                [0., 0., 0.]])
        >>> Start.of({}, "mem", torch.ones(2, 3)) is None
        True
    """

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make

    @classmethod
    def of(cls, table: Table, key: str, value: Any) -> Start | None:
        """Of ``table[key]`` before the run; None where it has to be held.

        A device is not asked for values: there a state is zero if its table knows that it is.
        """
        if type(value) is not Tensor or value.requires_grad or not value.is_floating_point():
            return None
        size, stride, dtype, device = value.size(), value.stride(), value.dtype, value.device
        known = getattr(table, "is_zero", None)
        # Minus zero is no zero: it comes out of a product with another sign.
        if (known and known(key, value)) or (
            may_look(device) and not value.view(_BITS[value.element_size()]).any()
        ):
            return cls(lambda: torch.empty_strided(size, stride, dtype=dtype, device=device).zero_())
        return cls(value.clone().clone) if value.numel() <= 1 else None
