"""What the coupled node's modules have in common: its settings, and a call.

The one idea: a framework adds how its modules are called and where they keep a state; the rest is here.
Source: Lei et al., arXiv 2308.08649.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from snn_reversible_plugin.grid import stream_dtype
from snn_reversible_plugin.neurons.coupled.call import run_sequence
from snn_reversible_plugin.neurons.coupled.reference import Constants, Node
from snn_reversible_plugin.neurons.surrogates import Surrogate

Run = Callable[[Tensor, Tensor | None, Node], tuple[Tensor, Tensor]]
"""``run_sequence`` or ``run_step`` of :mod:`.call`."""


def leak_parameter(tau: float, name: str) -> nn.Parameter:
    """``w``, of which ``sigmoid(w)`` is 1 / tau.

    Raises:
        ValueError: no such w gives this tau.
    """
    if not (math.isfinite(tau) and tau > 1):
        raise ValueError(f"{name}: tau={tau!r}: to be learned it has to start above 1")
    return nn.Parameter(torch.as_tensor(-math.log(tau - 1)))


class Coupled:
    """Mixin in front of a framework's neuron base. ``w`` is None where tau is a constant."""

    treatment = "reversed in time"
    arithmetic = "grid"
    constants: Constants
    w: nn.Parameter | None

    @property
    def tau(self) -> float:
        """The time constant as it is now."""
        leak = self.constants.leak
        if leak is None:
            assert self.w is not None
            leak = float(self.w.detach().sigmoid())
        return 1 / leak

    @torch.compiler.disable
    def _run(self, run: Run, x: Tensor, s: Tensor | None, known: Surrogate) -> tuple[Tensor, Tensor]:
        """Outputs and states, by one of the calls; s None: from zeros."""
        leak = None if self.w is None else self.w.sigmoid().to(stream_dtype(x.dtype))
        step = x.shape[1:] if run is run_sequence else x.shape
        return run(x, s, Node(self.constants, known, f"{type(self).__name__} on {tuple(step)}", leak))

    def _settings(self, threshold: str) -> str:
        """For ``extra_repr``; ``threshold`` is the framework's word for it."""
        constants = self.constants
        return (
            f"tau={self.tau:g}, alpha={constants.alpha:g}, beta={constants.beta:g}, "
            f"{threshold}={constants.v_threshold:g}, detach_reset={constants.detach_reset}, "
            f"bits={constants.bits}"
        )


def as_it_is(module: nn.Module) -> type[nn.Module]:
    """The converter's answer for a node, which is reversible as it stands."""
    return type(module)
