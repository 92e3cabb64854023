"""Sequences in float32 where half precision comes in, of neurons that the user wants fused.

The one idea: ``arithmetic="fused"`` is stock's own code in float32 between two casts. That sentence is the
specification, and what runs where nothing better is known; the formulas and kernels take the casts in.

Source: SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12, each by its own order of operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.modules.kinds import is_multi_step
from snn_reversible_plugin.modules.swap import FUSED
from snn_reversible_plugin.spikingjelly.copies import copy_of
from snn_reversible_plugin.spikingjelly.surrogates import fused, surrogate_of
from snn_reversible_plugin.spikingjelly.types import equations_of

# NOTE [What runs fused]
#
# 1. Membranes and their gradients are float32, those that are stored (v_seq) too; spikes, and the gradients
#    of currents, have the currents' dtype.
# 2. A membrane that somebody left in half precision is widened: 2.0 casts it, and the older releases' torch
#    code promotes, which may round a product before it does. That is theirs, and so their own code runs it.
# 3. In evaluation too: a network whose membranes were float32 in training has them there. 0.0.0.0.14 runs
#    its scripted code for evaluation then, between the casts, without a surrogate gradient as ever.
# 4. TorchScript casts by rules of its own under autocast, but nothing that is float32 already.


def may_fuse(module: Any) -> bool:
    """Whether a neuron has sequences that can be fused: one of the three, whatever it is set to now."""
    copy = copy_of(type(module))
    if copy is None or equations_of(module) is None:
        return False
    return copy.has_step_modes or is_multi_step(module)


def is_wide(module: Any, x: Any) -> bool:
    """Whether a call computes in float32 what stock computes in half precision, as the user said."""
    halves = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return bool(halves and FUSED.of(module) and is_multi_step(module) and fused(surrogate_of(module)))


def dtype_of(module: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a call computes."""
    return torch.float32 if is_wide(module, x) else x.dtype


def why_not_fused(module: Any) -> str:
    """Why sequences of a neuron that the user wants fused are not; empty where they are, or he doesn't."""
    if not FUSED.of(module) or not is_multi_step(module) or fused(surrogate_of(module)):
        return ""
    name = type(surrogate_of(module)).__name__
    return f"not fused: its surrogate {name}, as it is set, has no known formula"
