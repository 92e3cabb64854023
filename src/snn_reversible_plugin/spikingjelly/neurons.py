"""RevIFNode, RevLIFNode and RevParametricLIFNode: the installed SpikingJelly's, with an analytic backward.

The one idea: a type of its own in front of each of the three, for code that names types; what it does is in
:mod:`.spikingjelly.analytic`. In 0.0.0.0.12 they take one time step a call, as what they derive from.
"""

from __future__ import annotations

from typing import Any

from snn_reversible_plugin.modules.registry import register_reversible
from snn_reversible_plugin.spikingjelly.analytic import Analytic
from snn_reversible_plugin.spikingjelly.copies import installed

neuron: Any = installed().neuron


@register_reversible(neuron.IFNode)
class RevIFNode(Analytic, neuron.IFNode):
    """Integrate-and-fire neuron that keeps its input current, or nothing under a tape, for the backward.

    Stands in for ``spikingjelly.activation_based.neuron.IFNode``: same signature, same outputs, states
    and gradients bit for bit, in both step modes. The equations (SpikingJelly, eqs. 2-4)::

        h[t] = v[t-1] + x[t]
        s[t] = h[t] >= v_threshold
        v[t] = h[t] - v_threshold * s[t]                  soft reset (v_reset=None)
        v[t] = v_reset * s[t] + (1 - s[t]) * h[t]         hard reset

    Args:
        v_threshold: firing threshold, in the unit of the input. Default 1.0.
        v_reset: membrane after a spike, or None for the soft reset. Default 0.0.
        surrogate_function: firing function with a surrogate gradient. Default ``Sigmoid()``.
        detach_reset: cut the gradient through the reset. Default False.
        step_mode: ``"s"`` takes x [N, ...], ``"m"`` takes x_seq [T, N, ...]. Default ``"s"``.
        store_v_seq: keep the membranes of all steps in ``v_seq`` [T, N, ...]. Default False.

    Raises:
        AssertionError: ``v_threshold`` or ``v_reset`` is no float (as in stock).

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevIFNode
        >>> node = RevIFNode(step_mode="m")
        >>> x_seq = torch.full((3, 1), 0.6, requires_grad=True)
        >>> node(x_seq).flatten().tolist()
        [0.0, 1.0, 0.0]
    """


@register_reversible(neuron.LIFNode)
class RevLIFNode(Analytic, neuron.LIFNode):
    """Leaky integrate-and-fire neuron; see :class:`RevIFNode`.

    Stands in for ``spikingjelly.activation_based.neuron.LIFNode``. With v_rest = v_reset, or 0 for the
    soft reset, it charges to::

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_rest)) / tau          decay_input=True
        h[t] = v[t-1] - (v[t-1] - v_rest) / tau + x[t]            decay_input=False

    Args:
        tau: membrane time constant, in time steps; above 1. Default 2.0.
        decay_input: whether the input is divided by tau too. Default True.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: as in
            :class:`RevIFNode`.

    Raises:
        AssertionError: ``tau`` is no float above 1, and as in :class:`RevIFNode`.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevLIFNode
        >>> node = RevLIFNode(tau=2.0, detach_reset=True, step_mode="m")
        >>> x_seq = torch.full((3, 1), 1.5, requires_grad=True)
        >>> node(x_seq).flatten().tolist()
        [0.0, 1.0, 0.0]
    """


@register_reversible(neuron.ParametricLIFNode)
class RevParametricLIFNode(Analytic, neuron.ParametricLIFNode):
    """Leaky integrate-and-fire neuron that learns its time constant; see :class:`RevIFNode`.

    Stands in for ``spikingjelly.activation_based.neuron.ParametricLIFNode`` (Fang et al., ICCV 2021):
    1 / tau is ``sigmoid(w)``, one learnable scalar ``w`` for the layer.

    Args:
        init_tau: tau at the start, in time steps; above 1. Default 2.0.
        decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: as
            in :class:`RevLIFNode`.

    Raises:
        AssertionError: ``init_tau`` is no float above 1, and as in :class:`RevIFNode`.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevParametricLIFNode
        >>> node = RevParametricLIFNode(step_mode="m")
        >>> node(torch.full((3, 1), 1.5, requires_grad=True)).sum().backward()
        >>> node.w.grad is not None
        True
    """
