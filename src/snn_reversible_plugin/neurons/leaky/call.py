"""One time step of a snnTorch neuron as two autograd functions: charge (with reset), and fire.

The one idea: a step's gradient needs the membrane after the step, which lives anyway because the next
step starts from it, and no current. So what is held is the membrane, shared by storage between
two steps, and what a learned factor or a reset asks for beyond it; a step is two nodes instead of about
ten. Two and not one, because the membrane between them is the user's: its gradient can be asked for,
and has to contain the part that comes through the spikes. Both are applied under ``tape.paused()``.

Source: ``forward``, ``fire`` and ``mem_reset`` of ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin.grid.decays import AFTER, BEFORE, SUBTRACT
from snn_reversible_plugin.neurons.leaky.reference import Charge, Gradients
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops.batched import one_by_one

# NOTE [The order of gradients]
#
# 1. Autograd runs nodes in descending order of their creation, and adds what meets at a tensor in the
#    order of arrival. Three terms don't associate, so a function in place of many nodes must hand
#    out several gradients for one tensor *one by one*: it takes that tensor as an argument several
#    times. Gradients leave in the order of the arguments.
# 2. A reset to zero of the `AFTER` kind charges twice in stock's code, so the charge's tensors `x` are
#    passed twice, the second charge first.
# 3. A tensor that stock's user can see between two operations (a membrane before its spikes, a synaptic
#    current before its membrane) is an output of one function and an input of the next.
# 4. Where stock's tensors change dtype between two nodes (spikes are float32, states may be float64)
#    its engine casts the gradient on that edge, and so does the code here.
# 5. In-place forms are used only where the result has the strides that stock's has: the layout of a
#    gradient decides which kernel the next layer runs.


class Kind(NamedTuple):
    """How a step charges.

    ``recompute``: the spikes of the reset can be computed again from the membrane that is kept.
    """

    charge: type[Charge]
    reset: str
    recompute: bool


# One object for all steps, because their graph nodes hold it.
kind_of: Callable[..., Kind] = functools.cache(Kind)


def fired(mem: Tensor, threshold: Tensor) -> Tensor:
    """The spikes of a membrane: float32, as snnTorch's surrogates give them."""
    shift = mem - threshold
    return shift.gt_(0) if shift.dtype is torch.float32 else shift.gt(0).float()


class Before(NamedTuple):
    """What a step starts from that carries no gradient.

    ``mem`` is the earlier membrane, ``reset`` its spikes; ``saved``: what is saved in place of a state.
    """

    mem: Tensor
    reset: Tensor
    saved: Callable[[Tensor], Tensor]


def charged(kind: Kind, before: Before, threshold: Tensor, xs: Sequence[Tensor]) -> list[Tensor]:
    """The charged and reset states, in buffers that nobody else holds."""
    charge, (mem, reset, _), x = kind.charge, before, list(xs)
    if kind.reset == AFTER:
        x = x[len(x) // 2 :]
    if kind.reset == BEFORE:
        assert charge.membrane is not None
        x[charge.membrane] = (1 - reset) * mem
    states = charge.states(x)
    if kind.reset == SUBTRACT:
        states[-1].sub_(reset * threshold)
    elif kind.reset == AFTER:
        # Only a recurrent layer can have given the second charge other tensors.
        same = all(a is b for a, b in zip(xs, x, strict=False))
        again = states if same else charge.states(xs[: len(x)])
        for index in charge.zeroed:
            states[index].sub_(again[index] * reset)
    return states


class Charging(torch.autograd.Function):
    """``Charging.apply(kind, before, threshold, *x)`` -> the charged and reset states."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, kind: Kind, before: Before, threshold: Tensor, *xs: Tensor
    ) -> Any:
        charge = kind.charge
        mem, reset, saved = before
        states = charged(kind, before, threshold, xs)
        x = list(xs[len(xs) // 2 :] if kind.reset == AFTER else xs)
        if kind.reset == BEFORE:
            x[charge.membrane] = mem  # type: ignore[index]

        of_threshold = ctx.needs_input_grad[2] and kind.reset == SUBTRACT
        needs = ctx.needs_input_grad[3 : 3 + len(x)]
        kept = charge.keep(x, needs)
        uses_reset = of_threshold or (kind.reset in (BEFORE, AFTER) and any(needs))
        recompute = uses_reset and kind.recompute and charge.membrane is not None
        if recompute or (uses_reset and kind.reset == BEFORE):
            assert charge.membrane is not None
            kept[charge.membrane] = mem
        saved_reset = reset if uses_reset and not recompute else None
        kept = [None if one is None else saved(one) for one in kept]
        ctx.save_for_backward(saved_reset, threshold if uses_reset else None, *kept)
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        differentiable = charge.differentiable(needs)
        differentiable[-1] |= of_threshold
        if not all(differentiable):
            plain = [state for state, yes in zip(states, differentiable, strict=True) if not yes]
            ctx.mark_non_differentiable(*plain)
        return states[0] if len(states) == 1 else tuple(states)

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kind: Kind = ctx.kind
        charge = kind.charge
        reset, threshold, *x = ctx.saved_tensors
        needs = ctx.needs_input_grad[3 : 3 + len(x)]
        if reset is None and threshold is not None:
            reset = fired(x[charge.membrane], threshold)
        grad = grads[-1]
        by_reset = None
        if ctx.needs_input_grad[2] and kind.reset == SUBTRACT and grad is not None:
            minus = (-grad).to(torch.result_type(reset, threshold))
            by_reset = (minus * reset).sum_to_size(threshold.shape)
        if not any(needs):
            return None, None, by_reset, *[None] * (len(ctx.needs_input_grad) - 3)
        if kind.reset == AFTER:
            of_zeros: Gradients = [None] * len(grads)
            for index in charge.zeroed:
                part = grads[index]
                of_zeros[index] = None if part is None else -part * reset
            of_x = charge.gradients(x, needs, of_zeros) + charge.gradients(x, needs, grads)
        elif kind.reset == BEFORE:
            assert charge.membrane is not None
            passed = 1 - reset
            x[charge.membrane] = passed * x[charge.membrane]
            of_x = charge.gradients(x, needs, grads)
            through = of_x[charge.membrane]
            of_x[charge.membrane] = None if through is None else through * passed
        else:
            of_x = charge.gradients(x, needs, grads)
        return None, None, by_reset, *of_x


class Firing(torch.autograd.Function):
    """``Firing.apply(surrogate, mem, threshold, saved)`` -> spikes, float32 as snnTorch's are.

    ``saved``: what is saved in place of ``mem``, and what has to be saved beside it.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, surrogate: Surrogate, mem: Tensor, threshold: Tensor, saved: Sequence[Tensor]
    ) -> Tensor:
        ctx.save_for_backward(threshold, *saved)
        ctx.surrogate = surrogate
        return fired(mem, threshold)

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        threshold, mem, *_ = ctx.saved_tensors
        of_mem = ctx.surrogate.vjp(grad, mem - threshold).to(mem.dtype)
        _, to_mem, to_threshold, _ = ctx.needs_input_grad
        of_threshold = (-of_mem).sum_to_size(threshold.shape) if to_threshold else None
        return None, of_mem if to_mem else None, of_threshold, None
