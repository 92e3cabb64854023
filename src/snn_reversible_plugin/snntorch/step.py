"""One time step of a snnTorch neuron as a single autograd function.

The one idea: a step's gradient needs the membrane after the step, which lives anyway because the next
step starts from it, and no current. So what is held is the membrane, shared by storage between
two steps, and what a learned factor or a reset asks for beyond it; a step is one node instead of about
fifteen.

Source: ``forward``, ``fire`` and ``mem_reset`` of ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.snntorch.charges import Charge, Gradients
from snn_reversible_plugin.snntorch.surrogates import Derivative

# NOTE [The order of gradients]
#
# 1. Autograd runs nodes in descending order of their creation, and adds what meets at a tensor in the
#    order of arrival. Three terms don't associate, so a function in place of many nodes must hand
#    out several gradients for one tensor *one by one*: it takes that tensor as an argument several
#    times. Gradients leave in the order of the arguments.
# 2. The threshold is used by the reset (first), by the fire, and by the reset without delay (last), so
#    it is passed three times, the last use first.
# 3. A reset to zero of the `AFTER` kind charges twice in stock's code, so the charge's tensors `x` are
#    passed twice, the second charge first.
# 4. Inside the step at most three terms meet, at the charged membrane: what comes from outside (the
#    next step, the user's loss), then the reset without delay, then the fire.
# 5. Where stock's tensors change dtype between two nodes (spikes are float32, states may be float64)
#    its engine casts the gradient on that edge, and so does the code here.
# 6. In-place forms are used only where the result has the strides that stock's has: the layout of a
#    gradient decides which kernel the next layer runs.

NONE, SUBTRACT, BEFORE, AFTER = "none", "subtract", "zero, then charge", "charge, then zero"


class Plan(NamedTuple):
    """What a step does. ``undelayed`` is the reset that follows the fire in the same step, or NONE."""

    charge: type[Charge]
    reset: str
    undelayed: str
    derivative: Derivative


def fired(mem: Tensor, threshold: Tensor) -> Tensor:
    """The spikes of a membrane: float32, as snnTorch's surrogates give them."""
    shift = mem - threshold
    return shift.gt_(0) if shift.dtype is torch.float32 else shift.gt(0).float()


def _uses_reset(plan: Plan, of_threshold: bool, of_x: bool) -> bool:
    """Whether the backward needs the spikes that reset this step."""
    if plan.undelayed != NONE:
        return True
    return of_threshold if plan.reset == SUBTRACT else of_x and plan.reset != NONE


class Step(torch.autograd.Function):
    """``Step.apply(module, plan, threshold, threshold, threshold, *x)`` -> spikes, *states.

    The earlier membrane is ``module.mem``, for a charge that reads it also part of ``x``; the reset's
    spikes are left in ``module.reset``.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        module: Any,
        plan: Plan,
        threshold_undelayed: Tensor,
        threshold_fire: Tensor,
        threshold: Tensor,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        charge = plan.charge
        twice = plan.reset == AFTER
        x = list(xs[len(xs) // 2 :] if twice else xs)
        with tape.paused():
            mem = module.mem
            module.reset = reset = fired(mem, threshold)
            if plan.reset == BEFORE:
                assert charge.membrane is not None
                x[charge.membrane] = (1 - reset) * mem
            states = charge.states(x)
            if plan.reset == SUBTRACT:
                states[-1].sub_(reset * threshold)
            elif twice:
                # Only a recurrent layer can have made the second charge's tensors others.
                same = all(a is b for a, b in zip(xs, x, strict=False))
                again = states if same else charge.states(xs[: len(x)])
                for index in charge.zeroed:
                    states[index].sub_(again[index] * reset)
            charged = states[-1]
            spikes = fired(charged, threshold)
            if plan.undelayed == SUBTRACT:
                states[-1] = charged - (spikes - reset) * threshold
            elif plan.undelayed != NONE:
                states[-1] = charged - (spikes - reset) * charged

        of_threshold, needs = ctx.needs_input_grad[4], ctx.needs_input_grad[5:]
        needs = needs[: len(x)]
        kept = charge.keep(xs, needs)
        saved_reset = None
        if _uses_reset(plan, of_threshold, any(needs)):
            if charge.membrane is None or plan.undelayed != NONE:
                saved_reset = reset
                tape.mark_spikes(reset)
            else:
                kept[charge.membrane] = mem
        ctx.save_for_backward(charged, saved_reset, threshold, *kept)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        differentiable = charge.differentiable(needs)
        differentiable[-1] |= of_threshold and SUBTRACT in (plan.reset, plan.undelayed)
        if not all(differentiable):
            plain = [state for state, yes in zip(states, differentiable, strict=True) if not yes]
            ctx.mark_non_differentiable(*plain)
        return spikes, *states

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_spikes: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        charge = plan.charge
        mem, reset, threshold, *x = ctx.saved_tensors
        of_threshold, needs = ctx.needs_input_grad[4], ctx.needs_input_grad[5 : 5 + len(x)]
        if reset is None and _uses_reset(plan, of_threshold, any(needs)):
            reset = fired(x[charge.membrane], threshold)
        by_undelayed = by_fire = by_reset = None
        grad = grads[-1]

        if plan.undelayed != NONE and grad is not None:
            spikes = fired(mem, threshold)
            remaining = spikes - reset
            minus = -grad
            if plan.undelayed == SUBTRACT:
                minus = minus.to(torch.result_type(remaining, threshold))
                through = minus * threshold
                if of_threshold:
                    by_undelayed = (minus * remaining).sum_to_size(threshold.shape)
            else:
                through = minus * mem
                grad = grad + minus * remaining
            through = through.to(spikes.dtype)
            grad_spikes = through if grad_spikes is None else grad_spikes + through

        if grad_spikes is not None:
            of_mem = plan.derivative(mem - threshold, grad_spikes).to(mem.dtype)
            if of_threshold:
                by_fire = (-of_mem).sum_to_size(threshold.shape)
            if grad is None:
                grad = of_mem
            elif grad.stride() == of_mem.stride():
                grad = of_mem.add_(grad)
            else:
                grad = grad + of_mem

        if of_threshold and plan.reset == SUBTRACT and grad is not None:
            minus = (-grad).to(torch.result_type(reset, threshold))
            by_reset = (minus * reset).sum_to_size(threshold.shape)

        of_states = [*grads[:-1], grad]
        of_x: Gradients = []
        if any(needs):
            if plan.reset == AFTER:
                of_zeros: Gradients = [None] * len(of_states)
                for index in charge.zeroed:
                    part = of_states[index]
                    of_zeros[index] = None if part is None else -part * reset
                of_x = charge.gradients(x, needs, of_zeros)
            elif plan.reset == BEFORE:
                passed = 1 - reset
                x[charge.membrane] = passed * x[charge.membrane]
            of_x += charge.gradients(x, needs, of_states)
            if plan.reset == BEFORE and of_x[charge.membrane] is not None:
                of_x[charge.membrane] = of_x[charge.membrane] * passed
        else:
            of_x = [None] * (len(ctx.needs_input_grad) - 5)
        return None, None, by_undelayed, by_fire, by_reset, *of_x
