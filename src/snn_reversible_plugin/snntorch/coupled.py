"""snnTorch's form of the coupled node: ``spk, mem = node(input_, mem)``, in the user's own loop.

The one idea: everything is in :mod:`.neurons.coupled`; here is a membrane that snnTorch's resets know.
Source: Lei et al., arXiv 2308.08649.
"""

from __future__ import annotations

from typing import Any

import snntorch
import torch
from snntorch import surrogate
from torch import Tensor, nn

from snn_reversible_plugin.grid import stream_dtype
from snn_reversible_plugin.modules.registry import register_reversible
from snn_reversible_plugin.neurons.coupled.call import run_step
from snn_reversible_plugin.neurons.coupled.module import Coupled, as_it_is, leak_parameter
from snn_reversible_plugin.neurons.coupled.reference import constants_of
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.snntorch.surrogates import in_dtype, known_surrogate


class CoupledLIF(Coupled, snntorch.Leaky):
    """The reversible node of Lei et al. for snnTorch: ``spk, mem = node(input_, mem)``.

    Equations, guarantee, memory, settings and errors are those of
    :class:`.spikingjelly.coupled.CoupledLIF`, in the paper's notation: ``beta``
    couples the groups, and the membrane's decay is ``1 - 1 / tau``. What is returned first is not binary
    but ``O + beta X``. It subclasses ``Leaky`` for ``snntorch.utils.reset``, ``reset_hidden`` and
    ``detach_hidden`` to find it, and shares no equation with it. It fires where the membrane is *above* the
    threshold, as snnTorch does.

    Args:
        tau, alpha, beta, threshold, detach_reset, learn_tau, bits: see there.
        spike_grad: one of ``snntorch.surrogate``'s without randomness; arctangent by default.
        init_hidden: the membrane is kept here, and ``forward`` takes and returns none of it.
        output: return it all the same.

    Shapes: ``input_`` and ``mem`` [N, C, ...], C even.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch.coupled import CoupledLIF
        >>> node = CoupledLIF(tau=2.0)
        >>> mem = node.reset_mem()
        >>> x = torch.rand(100, 8, 6, requires_grad=True)
        >>> for step in x:
        ...     spk, mem = node(step, mem)
        >>> spk.sum().backward()
        >>> x.grad.shape, mem.shape
        (torch.Size([100, 8, 6]), torch.Size([8, 6]))
    """

    mem: Tensor

    def __init__(
        self,
        tau: float = 2.0,
        alpha: float = 0.0,
        beta: float = 0.25,
        threshold: float = 1.0,
        spike_grad: Any = None,
        detach_reset: bool = False,
        init_hidden: bool = False,
        output: bool = False,
        learn_tau: bool = False,
        bits: int = 16,
    ) -> None:
        constants = constants_of(
            "CoupledLIF", tau=None if learn_tau else tau, alpha=alpha, beta=beta, v_threshold=threshold,
            bits=bits, detach_reset=detach_reset,
        )  # fmt: skip
        w = leak_parameter(tau, "CoupledLIF") if learn_tau else None
        nn.Module.__init__(self)
        snntorch.SpikingNeuron.instances.append(self)
        self.constants, self.init_hidden, self.output = constants, init_hidden, output
        self.spike_grad = spike_grad or surrogate.atan()
        self.w = w
        self._init_mem()

    def reset_mem(self) -> Tensor:
        """A fresh membrane, of the next input's shape."""
        self.mem = self.mem.new_zeros(0)
        return self.mem

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step."""
        if mem is not None and self.init_hidden:
            raise TypeError("`mem` should not be passed as an argument while `init_hidden=True`")
        state: Tensor | None = self.mem if mem is None else mem
        assert state is not None
        # As in snnTorch, a membrane that is fresh or left over from another batch size means zeros.
        if state.shape == (0,) or (mem is None and state.shape != input_.shape):
            state = None
        known = surrogate_of(self.spike_grad, stream_dtype(input_.dtype))
        spk, self.mem = self._run(run_step, input_, state, known)
        return spk if self.init_hidden and not self.output else (spk, self.mem)

    def extra_repr(self) -> str:
        return self._settings("threshold")


def surrogate_of(spike_grad: Any, dtype: torch.dtype) -> Surrogate:
    """A snnTorch surrogate for the coupled node.

    Raises:
        ValueError: it is none of snnTorch's own, or a random one.
    """
    known = known_surrogate(spike_grad)
    if known is None:
        raise ValueError(
            f"CoupledLIF can't undo a step with the surrogate {spike_grad!r}: it must be one of "
            "snntorch.surrogate's that draw no random numbers."
        )
    return in_dtype(known, dtype)


register_reversible(CoupledLIF, subclasses=True)(as_it_is)
