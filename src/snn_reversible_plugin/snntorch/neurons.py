"""Leaky, Lapicque, Synaptic, Alpha and their recurrent siblings, each with a step that holds little.

The one idea: a reversible neuron is its stock class with another ``forward``: the analytic step where that
is stock's arithmetic, stock's own elsewhere. What tells the types apart is written down as a
:class:`~.snntorch.steps.Spec`.

Source: the classes of the same names in ``snntorch/_neurons``, version 1.0 (Eshraghian et al.,
Proceedings of the IEEE 111, 2023).
"""

from __future__ import annotations

from typing import Any

import snntorch
from torch import Tensor

from snn_reversible_plugin.grid.decays import AFTER, BEFORE, NONE, SUBTRACT
from snn_reversible_plugin.neurons.leaky.reference import (
    AlphaCharge,
    LapicqueCharge,
    LeakyCharge,
    SynapticCharge,
)
from snn_reversible_plugin.snntorch.last_reset import LastReset
from snn_reversible_plugin.snntorch.steps import Spec, analytic, anchored


def _leaky(currents: list[Tensor], states: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    return [*currents, states[-1], *parameters]


def _lapicque(currents: list[Tensor], states: list[Tensor], rc: list[Tensor]) -> list[Tensor]:
    return [*states, *currents, *rc]


def _synaptic(currents: list[Tensor], states: list[Tensor], decays: list[Tensor]) -> list[Tensor]:
    (syn, mem), (alpha, beta) = states[-2:], decays
    return [mem, beta, *currents, syn, alpha]


def _alpha(currents: list[Tensor], states: list[Tensor], decays: list[Tensor]) -> list[Tensor]:
    (current,), (exc, inh, _) = currents, states
    return [current, inh, current, exc, *decays]


_RESETS = {"_base_sub": SUBTRACT, "_base_zero": AFTER, "_base_int": NONE}

LEAKY = Spec(
    snntorch.Leaky,
    ("mem",),
    ("beta",),
    LeakyCharge,
    _leaky,
    _RESETS | {"_base_zero": BEFORE},
    undelayed=True,
)
LAPICQUE = Spec(
    snntorch.Lapicque,
    ("mem",),
    ("R", "C", "time_step"),
    LapicqueCharge,
    _lapicque,
    _RESETS,
    constant=True,
)
SYNAPTIC = Spec(
    snntorch.Synaptic,
    ("syn", "mem"),
    ("alpha", "beta"),
    SynapticCharge,
    _synaptic,
    _RESETS,
    undelayed=True,
)
ALPHA = Spec(
    snntorch.Alpha,
    ("syn_exc", "syn_inh", "mem"),
    ("alpha", "beta"),
    AlphaCharge,
    _alpha,
    {"_base_zero": AFTER, "_base_int": NONE},
    constant=True,
    on_grid_only=(NONE,),
)
RLEAKY = LEAKY._replace(stock_type=snntorch.RLeaky, states=("spk", "mem"), resets=_RESETS, recurrent=True)
# Its undelayed reset changes nothing that it returns, and fails where no spikes are passed.
RSYNAPTIC = SYNAPTIC._replace(
    stock_type=snntorch.RSynaptic,
    states=("spk", "syn", "mem"),
    undelayed=False,
    always_delayed=True,
    recurrent=True,
)


class RevLeaky(LastReset, snntorch.Leaky):
    """snnTorch's ``Leaky`` that holds its membrane and nothing else.

    ``mem[t] = clamp(beta, 0, 1) * mem[t-1] + input_[t] - spk[t-1] * threshold``, with the other reset
    mechanisms, learned parameters and surrogates of the stock class; same signature, attributes and
    ``state_dict``, outputs and gradients bit for bit. Of each step it holds 4 bytes a neuron (float32)
    for the backward, where stock holds 8 to 16; on a converted model the next layer keeps the spikes as
    one bit.

    Args:
        beta: decay of the membrane, clipped to [0, 1]; a number, or a tensor that broadcasts to ``input_``.
        **kwargs: as ``snntorch.Leaky``, with its defaults.

    Shapes: ``input_`` and ``mem`` [N, ...]; ``forward`` returns ``(spk, mem)`` of that shape, or ``spk``
    alone with ``init_hidden=True`` and ``output=False``.

    Raises:
        TypeError: ``mem`` is passed while ``init_hidden=True``, as stock does.
        RuntimeError: a double backward, or ``mem`` or a parameter was changed in place before the backward.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevLeaky
        >>> lif = RevLeaky(beta=0.9)
        >>> spk, mem = lif(torch.full((2, 3), 1.5), lif.reset_mem())
        >>> spk.sum().item()
        6.0
    """

    treatment = "analytic step"
    arithmetic = "stock"
    lean = True

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step."""
        result = analytic(self, LEAKY, input_, (mem,))
        return anchored(self, LEAKY, super().forward(input_, mem)) if result is None else result


class RevLapicque(LastReset, snntorch.Lapicque):
    """snnTorch's ``Lapicque`` (an RC circuit) that holds its membrane and nothing else.

    ``mem[t] = input_ * R * (1 / RC) * dt + (1 - dt / RC) * mem[t-1]``, and the reset. Signature, shapes,
    errors and guarantee as :class:`RevLeaky`'s, against ``snntorch.Lapicque``.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevLapicque
        >>> lif = RevLapicque(beta=0.5)
        >>> spk, mem = lif(torch.ones(2, 3), lif.reset_mem())
        >>> mem.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"
    lean = True

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step."""
        result = analytic(self, LAPICQUE, input_, (mem,))
        return anchored(self, LAPICQUE, super().forward(input_, mem)) if result is None else result


class RevSynaptic(LastReset, snntorch.Synaptic):
    """snnTorch's ``Synaptic`` (a decaying input current) that holds its membrane and nothing else.

    ``syn[t] = clamp(alpha, 0, 1) * syn[t-1] + input_``, ``mem[t] = clamp(beta, 0, 1) * mem[t-1] + syn[t]``,
    and the reset; ``syn`` is held too where ``alpha`` is learned. Signature, shapes, errors and guarantee
    as :class:`RevLeaky`'s, against ``snntorch.Synaptic``; returns ``(spk, syn, mem)``.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevSynaptic
        >>> lif = RevSynaptic(alpha=0.9, beta=0.8)
        >>> spk, syn, mem = lif(torch.ones(2, 3), *lif.reset_mem())
        >>> syn.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"
    lean = True

    def forward(self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None) -> Any:
        """One time step."""
        result = analytic(self, SYNAPTIC, input_, (syn, mem))
        return anchored(self, SYNAPTIC, super().forward(input_, syn, mem)) if result is None else result


class RevAlpha(LastReset, snntorch.Alpha):
    """snnTorch's ``Alpha`` that holds its membrane; its two currents where ``beta`` is learned.

    Signature, shapes, errors and guarantee as :class:`RevLeaky`'s, against ``snntorch.Alpha``; returns
    ``(spk, syn_exc, syn_inh, mem)``.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevAlpha
        >>> lif = RevAlpha(alpha=0.9, beta=0.8)
        >>> spk, syn_exc, syn_inh, mem = lif(torch.ones(2, 3), *lif.reset_mem())
        >>> mem.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"
    lean = True

    def forward(
        self,
        input_: Tensor,
        syn_exc: Tensor | None = None,
        syn_inh: Tensor | None = None,
        mem: Tensor | None = None,
    ) -> Any:
        """One time step."""
        result = analytic(self, ALPHA, input_, (syn_exc, syn_inh, mem))
        if result is None:
            result = anchored(self, ALPHA, super().forward(input_, syn_exc, syn_inh, mem))
        return result


class RevRLeaky(LastReset, snntorch.RLeaky):
    """snnTorch's ``RLeaky``: as :class:`RevLeaky`, its recurrent layer an ordinary one, fed with spikes.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevRLeaky
        >>> lif = RevRLeaky(beta=0.9, linear_features=3)
        >>> spk, mem = lif(torch.ones(2, 3), *lif.reset_mem())
        >>> spk.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"
    lean = True

    def forward(self, input_: Tensor, spk: Tensor | None = None, mem: Tensor | None = None) -> Any:
        """One time step."""
        result = analytic(self, RLEAKY, input_, (spk, mem))
        return anchored(self, RLEAKY, super().forward(input_, spk, mem)) if result is None else result


class RevRSynaptic(LastReset, snntorch.RSynaptic):
    """snnTorch's ``RSynaptic``: as :class:`RevSynaptic`, its recurrent layer an ordinary one.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevRSynaptic
        >>> lif = RevRSynaptic(alpha=0.9, beta=0.8, linear_features=3)
        >>> spk, syn, mem = lif(torch.ones(2, 3), *lif.reset_mem())
        >>> syn.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"
    lean = True

    def forward(
        self,
        input_: Tensor,
        spk: Tensor | None = None,
        syn: Tensor | None = None,
        mem: Tensor | None = None,
    ) -> Any:
        """One time step."""
        result = analytic(self, RSYNAPTIC, input_, (spk, syn, mem))
        if result is None:
            result = anchored(self, RSYNAPTIC, super().forward(input_, spk, syn, mem))
        return result
