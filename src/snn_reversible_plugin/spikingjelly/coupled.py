"""SpikingJelly's form of the coupled node: a module with a memory and two step modes.

The one idea: everything is in :mod:`.neurons.coupled.call`; here are settings, a membrane
that ``functional.reset_net`` knows, and which surrogate functions the node can do with.
Source: Lei et al., arXiv 2308.08649.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from spikingjelly.activation_based import base, surrogate
from torch import Tensor, nn

from snn_reversible_plugin.grid import stream_dtype
from snn_reversible_plugin.modules.registry import register_reversible
from snn_reversible_plugin.neurons.coupled.call import Call, run_sequence, run_step
from snn_reversible_plugin.neurons.coupled.reference import Firing, rule_of
from snn_reversible_plugin.ops.chunks import chunk_size
from snn_reversible_plugin.spikingjelly.surrogates import (
    by_autograd,
    derivative,
    fused_alpha,
    is_heaviside,
    is_uniform,
    proved,
)


class CoupledLIF(base.MemoryModule):
    r"""The reversible node of Lei et al.: two halves of the channels, coupled so that time can be undone.

    With inputs :math:`X = (X_1, X_2)`, states :math:`S = (S_1, S_2)` and the Heaviside step :math:`H`::

        V1 = S1  + (X1 - S1)  / tau,  O1 = H(V1 - v_threshold),  Y1 = O1 + beta X2
        S1' = (1 - O1) V1 + alpha O1 + beta S2
        V2 = S1' + (Y1 - S1') / tau,  O2 = H(V2 - v_threshold),  Y2 = O2 + beta X1
        S2' = (1 - O2) V2 + alpha O2 + beta S1

    It has no stock counterpart and is used as it is; ``convert_to_reversible`` leaves it in place. Inputs
    are rounded to multiples of 2^-bits / beta, states to multiples of 2^-bits, with gradients that pass
    straight through. On that grid the backward rebuilds each step from the one after it, bit for bit, and
    the gradient is that of the forward that ran.

    Between forward and backward a call holds its states once, whatever T, and log2(1 / beta) bits a neuron
    and step. It also needs its outputs. They are real numbers (O + beta X), which can't be packed, and in
    general the next layer holds them anyway; in a converted model they are stored as spikes, one bit, and
    rebuilt from the replayed input. In step mode "s" a step holds no state: the next one gives it back.

    Args:
        tau: membrane time constant in time steps, at least 1; with ``learn_tau`` above 1.
        alpha: what the membrane is reset to at a spike, rounded to a multiple of 2^-bits.
        beta: coupling, a power of two in (0, 1]; with 1 there are no bits to store. A neuron that never
            fires has bounded states for beta < 1 / tau; with more they grow with T, and leave the range
            sooner or later.
        v_threshold: firing threshold.
        surrogate_function: any of SpikingJelly's that spike, or one of your own that is element-wise and
            gives the result of a comparison; ATan by default.
        detach_reset: no gradient through the reset.
        step_mode: "s" for [N, C, ...], "m" for [T, N, C, ...].
        learn_tau: 1 / tau becomes the parameter ``w``, as ``sigmoid(w)``.
        bits: of the grid, 0 to 23. Outputs and states must stay below 2^(24 - bits) (float32).

    Shapes: C, dimension 1 of a step, must be even. The output has the input's shape, float32 (float64 for
    float64). The state ``v`` is (S1, S2) along the channels [N, C, ...].

    Raises:
        ValueError: a setting or a shape that does not fit, a state of another shape (reset the network).
        OverflowError: from the backward, at its end, if an output or a state left the range of the grid.
        RuntimeError: an output or a state was changed in place before the backward.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly.coupled import CoupledLIF
        >>> node = CoupledLIF(tau=2.0, step_mode="m")
        >>> x_seq = torch.rand(100, 8, 6, requires_grad=True)
        >>> node(x_seq).sum().backward()
        >>> x_seq.grad.shape, node.v.shape
        (torch.Size([100, 8, 6]), torch.Size([8, 6]))
    """

    treatment = "reversed in time"
    arithmetic = "grid"

    def __init__(
        self,
        tau: float = 2.0,
        alpha: float = 0.0,
        beta: float = 0.25,
        v_threshold: float = 1.0,
        surrogate_function: Any = None,
        detach_reset: bool = False,
        step_mode: str = "s",
        learn_tau: bool = False,
        bits: int = 16,
    ) -> None:
        super().__init__()
        if learn_tau and not (math.isfinite(tau) and tau > 1):
            raise ValueError(f"CoupledLIF: tau={tau!r}: to be learned it has to start above 1")
        self.rule = rule_of(
            "CoupledLIF", tau=None if learn_tau else tau, alpha=alpha, beta=beta, v_threshold=v_threshold,
            bits=bits, detach_reset=detach_reset,
        )  # fmt: skip
        self.w = nn.Parameter(torch.as_tensor(-math.log(tau - 1))) if learn_tau else None
        self.surrogate_function = surrogate_function or surrogate.ATan()
        self.step_mode = step_mode
        self.register_memory("v", 0.0)

    @property
    def tau(self) -> float:
        """The time constant as it is now."""
        return 1 / (self.rule.leak if self.w is None else float(self.w.detach().sigmoid()))  # type: ignore[operator]

    def single_step_functional_forward(
        self, inputs: tuple[Any, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One time step from explicit states, (v,) of shape [N, C, ...] or a number for all."""
        return self._run(run_step, inputs[0], inputs[0], states)

    def multi_step_functional_forward(
        self, inputs: tuple[Any, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All time steps from explicit states."""
        return self._run(run_sequence, inputs[0], inputs[0][:1].squeeze(0), states)

    @torch.compiler.disable
    def _run(self, run: Any, x: Tensor, step: Tensor, states: tuple[Any, ...]) -> Any:
        dtype = stream_dtype(x.dtype)
        v = states[0]
        if not isinstance(v, Tensor):
            v = None if v == 0 else torch.full_like(step, v, dtype=dtype)
        firing = firing_of(self.surrogate_function, dtype, x.device, step.shape)
        leak = None if self.w is None else self.w.sigmoid().to(dtype)
        y, v = run(x, v, Call(self.rule, firing, f"CoupledLIF on {tuple(step.shape)}"), leak)
        return (y,), (v,)

    def extra_repr(self) -> str:
        rule = self.rule
        return (
            f"tau={self.tau:g}, alpha={rule.alpha:g}, beta={rule.beta:g}, "
            f"v_threshold={rule.v_threshold:g}, detach_reset={rule.detach_reset}, bits={rule.bits}, "
            f"{super().extra_repr()}"
        )


def firing_of(function: Any, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Firing:
    """A SpikingJelly surrogate for the coupled node.

    Raises:
        ValueError: it is not known to work element by element and to give zeros and ones.
    """
    if is_heaviside(function):
        name_and_alpha = fused_alpha(function)
        formula = None if name_and_alpha is None else _trusted(*name_and_alpha, dtype)
        return Firing(function, formula or by_autograd(function), False, is_uniform(function))
    chunk = min(shape.numel() or 1, chunk_size(device))
    half = torch.Size((shape[0] or 1, shape[1] // 2, *shape[2:]))
    known = proved(function, half, dtype, device, chunk)
    if known is None or known.fire is not None:
        raise ValueError(
            f"CoupledLIF can't undo a step with the surrogate {function!r}: it must be element-wise, "
            "deterministic, and give zeros and ones. Take one of spikingjelly's with spiking=True."
        )
    return Firing(function, known.vjp, None, known.uniform)


@functools.cache
def _trusted(name: str, alpha: float, dtype: torch.dtype) -> Any:
    """The derivative in one buffer, if it is that of the surrogate itself to the bit."""
    formula = derivative(name, alpha)
    with torch.inference_mode(False), torch.enable_grad():
        u = torch.linspace(-3, 3, 203, dtype=dtype, device="cpu").requires_grad_()
        grad = torch.linspace(-1, 2, 203, dtype=dtype, device="cpu").sin_()
        (expected,) = torch.autograd.grad(getattr(surrogate, name)(alpha=alpha)(u), u, grad)
    with torch.no_grad():
        return formula if torch.equal(formula(grad, u.detach().clone()), expected) else None


@register_reversible(CoupledLIF, subclasses=True)
def _as_it_is(module: nn.Module) -> type[nn.Module]:
    return type(module)
