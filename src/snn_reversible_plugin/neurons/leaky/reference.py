"""The charge of each snnTorch neuron, before any reset, and its gradient.

The one idea: every charge of snnTorch is linear in its streams (input current, recurrent current, earlier
states), so its gradient needs no current at all: only a state where the factor in front of it is
learned. A :class:`Charge` is those equations and nothing else; firing and resets, which all neurons
share, are in ``step.py``.

Each charge takes its tensors ``x`` in the order in which autograd would hand out their gradients, that
is in descending order of the operations that use them: see NOTE [The order of gradients] in ``step.py``.

Source: ``_base_state_function`` of the classes in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = list[Tensor | None]


class Charge:
    """Equations of one neuron type, on states whose last one is the membrane.

    ``membrane`` is the position of the earlier membrane in ``x`` (None: the charge doesn't read it), and
    ``zeroed`` the states that a reset to zero clears.
    """

    membrane: int | None
    zeroed: tuple[int, ...] = (0,)

    @staticmethod
    def states(x: Sequence[Tensor]) -> list[Tensor]:
        """The charged states, in buffers that nobody else holds."""
        raise NotImplementedError

    @staticmethod
    def keep(x: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """``x`` without what :meth:`gradients` won't need."""
        raise NotImplementedError

    @staticmethod
    def gradients(
        x: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> Gradients:
        """From gradients of the charged states to gradients of ``x``; only those that are needed."""
        raise NotImplementedError

    @staticmethod
    def differentiable(needs: Sequence[bool]) -> list[bool]:
        """Which charged states have a gradient when these of ``x`` do."""
        raise NotImplementedError


def clamped(factor: Tensor) -> Tensor:
    """A decay factor, as snnTorch uses it."""
    return factor.clamp(0, 1)


def factor_gradient(factor: Tensor, state: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``factor`` in ``clamp(factor, 0, 1) * state``."""
    return through_clamp(factor, (grad * state).sum_to_size(factor.shape).to(factor.dtype))


def through_clamp(factor: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``factor`` from that of ``clamped(factor)``."""
    if _passes_at_bounds():
        inside = (factor >= 0).logical_and_(factor <= 1)
    else:
        inside = (factor > 0).logical_and_(factor < 1)
    return torch.where(inside, grad, 0.0)


@functools.cache
def _passes_at_bounds() -> bool:
    """Whether a clamp's gradient passes where the bound is met: versions of torch differ."""
    with torch.inference_mode(False), torch.enable_grad():
        bound = torch.ones((), device="cpu", requires_grad=True)
        (grad,) = torch.autograd.grad(clamped(bound), bound)
    return bool(grad)


class LeakyCharge(Charge):
    """``beta * mem + current [+ recurrent]``, with x = ([recurrent,] current, mem, beta)."""

    membrane = -2

    @staticmethod
    def states(x: Sequence[Tensor]) -> list[Tensor]:
        *currents, mem, beta = x
        charged = clamped(beta) * mem
        for current in reversed(currents):
            charged.add_(current)
        return [charged]

    @staticmethod
    def keep(x: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        kept: list[Tensor | None] = [None] * len(x)
        if needs[-1]:
            kept[-2] = x[-2]
        if needs[-1] or needs[-2]:
            kept[-1] = x[-1]
        return kept

    @staticmethod
    def gradients(
        x: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> Gradients:
        (grad,) = grads
        mem, beta = x[-2], x[-1]
        found: Gradients = [grad] * (len(x) - 2) + [None, None]
        if grad is not None and beta is not None:
            if needs[-2]:
                found[-2] = grad * clamped(beta)
            if needs[-1] and mem is not None:
                found[-1] = factor_gradient(beta, mem, grad)
        return found

    @staticmethod
    def differentiable(needs: Sequence[bool]) -> list[bool]:
        return [any(needs)]


class LapicqueCharge(Charge):
    """``current * R * (1 / RC) * dt + (1 - dt / RC) * mem``, with x = (mem, current, R, C, dt)."""

    membrane = 0

    @staticmethod
    def states(x: Sequence[Tensor]) -> list[Tensor]:
        mem, current, r, c, dt = x
        return [current * r * (1 / (r * c)) * dt + (1 - dt / (r * c)) * mem]

    @staticmethod
    def keep(x: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        return [None, None, *x[2:]]

    @staticmethod
    def gradients(
        x: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> Gradients:
        (grad,) = grads
        r, c, dt = x[2:]
        found: Gradients = [None] * 5
        if grad is not None and r is not None and c is not None and dt is not None:
            if needs[0]:
                found[0] = grad * (1 - dt / (r * c))
            if needs[1]:
                found[1] = grad * dt * (1 / (r * c)) * r
        return found

    @staticmethod
    def differentiable(needs: Sequence[bool]) -> list[bool]:
        return [needs[0] or needs[1]]


class SynapticCharge(Charge):
    """A current that decays, and a membrane that collects it.

    ``syn = alpha * syn + current [+ recurrent]``, ``mem = beta * mem + syn``, with
    x = (mem, beta, [recurrent,] current, syn, alpha). A reset to zero leaves ``syn`` as it is.
    """

    membrane = 0
    zeroed = (1,)

    @staticmethod
    def states(x: Sequence[Tensor]) -> list[Tensor]:
        mem, beta, *currents, syn, alpha = x
        charged = clamped(alpha) * syn
        for current in reversed(currents):
            charged.add_(current)
        return [charged, (clamped(beta) * mem).add_(charged)]

    @staticmethod
    def keep(x: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        kept: list[Tensor | None] = [None] * len(x)
        for state, factor in ((0, 1), (-2, -1)):
            if needs[factor]:
                kept[state] = x[state]
            if needs[factor] or needs[state]:
                kept[factor] = x[factor]
        return kept

    @staticmethod
    def gradients(
        x: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> Gradients:
        grad_syn, grad = grads
        if grad is not None:
            grad_syn = grad if grad_syn is None else grad_syn + grad
        found: Gradients = [grad_syn] * len(x)
        for state, factor, through in ((0, 1, grad), (-2, -1, grad_syn)):
            found[state] = found[factor] = None
            value, decay = x[state], x[factor]
            if through is not None and decay is not None:
                if needs[state]:
                    found[state] = through * clamped(decay)
                if needs[factor] and value is not None:
                    found[factor] = factor_gradient(decay, value, through)
        return found

    @staticmethod
    def differentiable(needs: Sequence[bool]) -> list[bool]:
        syn = any(needs[2:])
        return [syn, syn or needs[0] or needs[1]]


class AlphaCharge(Charge):
    """An exciting and an inhibiting current whose sum is the membrane.

    ``exc = alpha * exc + current``, ``inh = beta * inh - current``, ``mem = tau * (exc + inh)`` with
    ``tau = log(alpha) / (log(beta) - log(alpha)) + 1``, and x = (current, inh, current, exc, alpha, beta).
    Neither factor may be learned: ``tau`` would carry its gradient too.
    """

    membrane = None
    zeroed = (0, 1, 2)

    @staticmethod
    def tau(alpha: Tensor, beta: Tensor) -> Tensor:
        """The factor of the membrane."""
        alpha, beta = clamped(alpha), clamped(beta)
        return torch.log(alpha) / (torch.log(beta) - torch.log(alpha)) + 1

    @staticmethod
    def states(x: Sequence[Tensor]) -> list[Tensor]:
        current, inh, _, exc, alpha, beta = x
        exc = (clamped(alpha) * exc).add_(current)
        inh = (clamped(beta) * inh).sub_(current)
        return [exc, inh, AlphaCharge.tau(alpha, beta) * (exc + inh)]

    @staticmethod
    def keep(x: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        return [None, None, None, None, *x[4:]]

    @staticmethod
    def gradients(
        x: Sequence[Tensor | None], needs: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> Gradients:
        grad_exc, grad_inh, grad = grads
        alpha, beta = x[4:]
        found: Gradients = [None] * 6
        if alpha is None or beta is None:
            return found
        if grad is not None:
            grad = grad * AlphaCharge.tau(alpha, beta)
            grad_exc = grad if grad_exc is None else grad_exc + grad
            grad_inh = grad if grad_inh is None else grad_inh + grad
        if grad_inh is not None:
            found[0] = -grad_inh if needs[0] else None
            found[1] = grad_inh * clamped(beta) if needs[1] else None
        if grad_exc is not None:
            found[2] = grad_exc
            found[3] = grad_exc * clamped(alpha) if needs[3] else None
        return found

    @staticmethod
    def differentiable(needs: Sequence[bool]) -> list[bool]:
        exc, inh = needs[2] or needs[3], needs[0] or needs[1]
        return [exc, inh, exc or inh]
