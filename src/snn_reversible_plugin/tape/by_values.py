"""Tensors of two values that no operation vouches for: zeros and one other number, found by looking.

The one idea: what an autograd function of the user's allocates is nobody's recipe, because a kernel that
torch doesn't see may fill it (``spike = zeros_like(v); spike[v >= 1] = 1``). When something outside
first relies on it, its values are there. On a CPU they are looked at, all of them, and where there are
two, a bit an element says which: a copy of what was found, whatever happens to the tensor later.
"""

from __future__ import annotations

import math

import torch

from snn_reversible_plugin.ops.layouts import is_dense, is_plain
from snn_reversible_plugin.tape.origins import enter
from snn_reversible_plugin.tape.packed import Packed, PackedTwo

LEAST = 1024  # elements, below which it isn't worth a look
_SAMPLE = 64
_AS_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

# NOTE [When to look]
#
# 1. In grad mode, where the functions that allocate for kernels are over. Inside one, a tensor may still be
#    filled. What one saves of its own outputs is kept.
# 2. Bits, and not numbers, are compared: -0.0 is another value than 0, and no NaN is like another.
# 3. A few elements first: nearly all tensors that are none of these end there.
# 4. A device is not waited for.


def packed_by_values(tensor: torch.Tensor) -> Packed | None:
    """A handle for a tensor without a recipe that holds zeros and one other number; it is entered."""
    integers = _AS_INTEGERS.get(tensor.dtype)
    if integers is None or tensor.numel() < LEAST or tensor.device.type != "cpu":
        return None
    if not (torch.is_grad_enabled() and is_plain(tensor) and is_dense(tensor)):
        return None
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        high = _other_value(tensor.detach().as_strided((tensor.numel(),), (1,)), integers)
    if high is None:
        return None
    handle = PackedTwo(high)
    enter(tensor, handle)
    return handle


def _other_value(flat: torch.Tensor, integers: torch.dtype) -> float | None:
    bits = flat.view(integers)
    others = set(bits[:: max(1, len(bits) // _SAMPLE)].tolist()) - {0}
    if len(others) > 1:
        return None
    other = others.pop() if others else int(bits.max())
    if other and torch.count_nonzero(bits) != torch.count_nonzero(bits == other):
        return None
    if not other and bits.any():
        return None
    value = float(torch.tensor(other, dtype=integers).view(flat.dtype)) if other else 1.0
    return value if math.isfinite(value) and value else None
