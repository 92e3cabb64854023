"""SpikingJelly's form of the coupled node: a module with a memory and two step modes.

The one idea: everything is in :mod:`.neurons.coupled`; here are a membrane that ``functional.reset_net``
knows, and which surrogate functions the node can do with.
Source: Lei et al., arXiv 2308.08649.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import stream_dtype
from snn_reversible_plugin.modules.registry import register_reversible
from snn_reversible_plugin.neurons.coupled.call import run_sequence, run_step
from snn_reversible_plugin.neurons.coupled.module import Coupled, Run, as_it_is, leak_parameter
from snn_reversible_plugin.neurons.coupled.reference import constants_of
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops.chunks import chunk_size
from snn_reversible_plugin.spikingjelly.copies import installed
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd, is_heaviside, proved

if not installed().has_operators:
    raise ImportError("CoupledLIF needs SpikingJelly 2.0: pip install 'spikingjelly>=2.0'")
base: Any = installed().base
surrogate: Any = installed().surrogate


class CoupledLIF(Coupled, base.MemoryModule):
    r"""The reversible node of Lei et al.: two groups of channels, coupled so that time can be undone.

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
        self.w = leak_parameter(tau, "CoupledLIF") if learn_tau else None
        self.constants = constants_of(
            "CoupledLIF", tau=None if learn_tau else tau, alpha=alpha, beta=beta, v_threshold=v_threshold,
            bits=bits, detach_reset=detach_reset,
        )  # fmt: skip
        self.surrogate_function = surrogate_function or surrogate.ATan()
        self.step_mode = step_mode
        self.register_memory("v", 0.0)

    def single_step_functional_forward(
        self, inputs: tuple[Any, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One time step from explicit states, (v,) of shape [N, C, ...] or a number for all."""
        return self._from(run_step, inputs[0], inputs[0].shape, states[0])

    def multi_step_functional_forward(
        self, inputs: tuple[Any, ...], states: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All time steps from explicit states."""
        steps, (v,) = self._from(run_sequence, inputs[0], inputs[0].shape[1:], states[0])
        if inputs[0].shape[0] > 1:
            tape.returns(self, v, inputs[0].shape[0])
        return steps, (v,)

    def _from(self, run: Run, x: Tensor, shape: torch.Size, v: Any) -> Any:
        dtype = stream_dtype(x.dtype)
        if not isinstance(v, Tensor):
            v = None if v == 0 else torch.full(shape, v, dtype=dtype, device=x.device)
        y, v = self._run(run, x, v, surrogate_of(self.surrogate_function, dtype, x.device, shape))
        return (y,), (v,)

    def extra_repr(self) -> str:
        return f"{self._settings('v_threshold')}, {super().extra_repr()}"


def surrogate_of(function: Any, dtype: torch.dtype, device: torch.device, shape: torch.Size) -> Surrogate:
    """A SpikingJelly surrogate for the coupled node, whose steps have this shape.

    Raises:
        ValueError: it is not known to work element by element and to give zeros and ones.
    """
    if is_heaviside(function):
        return as_autograd(function, dtype)
    chunk = min(shape.numel() or 1, chunk_size(device))
    group = torch.Size((shape[0] or 1, shape[1] // 2, *shape[2:]))
    known = proved(function, group, dtype, device, chunk)
    if known is None or not known.spikes:
        raise ValueError(
            f"CoupledLIF can't undo a step with the surrogate {function!r}: it must be element-wise, "
            "deterministic, and give zeros and ones. Take one of spikingjelly's with spiking=True."
        )
    return known


register_reversible(CoupledLIF, subclasses=True)(as_it_is)
