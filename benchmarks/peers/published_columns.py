"""The published procedure of temporal columns, a baseline (Hu et al., ICML 2024).

Written anew from the paper and the behaviour of its code: each sub-network is an autograd function of its
own that saves its input and the states of its levels; its backward runs the levels again one after the
other, keeps their graphs until the last one is done, and divides what is left of a state by alpha in
floating point.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.blocks import RevSColumns
from snn_reversible_plugin.blocks.columns import Columns


class PublishedColumns(nn.Module):
    """The sub-networks of :class:`RevSColumns`, undone the published way.

    ``errors``: of each level's state of the first time step, where ``check`` is on, the largest that the
    rebuild made.
    """

    def __init__(self, columns: RevSColumns) -> None:
        super().__init__()
        self.subnets, self.alphas, self.tops_at = columns.subnets, columns.alphas, columns.tops_at
        self.check = False
        self.first: list[Tensor] = []
        self.errors: list[float] = []

    def forward(self, x: Tensor | list[Tensor]) -> Columns:
        xs = [x] * len(self.subnets) if isinstance(x, Tensor) else x
        states: tuple[Any, ...] = (None,) * len(self.subnets[0])
        tops = []
        for step, x_now in enumerate(xs):
            # Parameters are no inputs of the function: of events alone, autograd would call no backward.
            x_now = x_now if x_now.requires_grad else x_now.detach().requires_grad_()
            states = _SubNetwork.apply(self, step, x_now, *states)
            if self.check and not step:
                self.first = [state.detach().clone() for state in states]
            if step in self.tops_at:
                tops.append(states[-1])
        return Columns(tuple(states), tuple(tops))


class _SubNetwork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: PublishedColumns, step: int, x: Tensor, *before: Any) -> Any:
        levels, alphas = columns.subnets[step], columns.alphas[step]
        states: list[Tensor] = []
        for k, level in enumerate(levels):
            above = () if before[0] is None else before[k + 1 : k + 2]
            out = level(states[k - 1] if k else x, *above)
            states.append(out if before[0] is None else out + before[k] * alphas[k])
        ctx.columns, ctx.step, ctx.is_first = columns, step, before[0] is None
        ctx.save_for_backward(x, *states)
        return tuple(states)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *states = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        levels, alphas = ctx.columns.subnets[ctx.step], ctx.columns.alphas[ctx.step]
        left: list[Any] = [None] * len(states)
        g_left: list[Any] = [None] * len(states)
        outs = []
        for k in range(len(states) - 1, -1, -1):
            g = grads[k] if states[k].grad is None else grads[k] + states[k].grad
            above = [] if ctx.is_first else left[k + 1 : k + 2]
            with torch.enable_grad():
                outs.append(levels[k](states[k - 1] if k else x, *above))
                torch.autograd.backward(outs[-1], g, retain_graph=True)
            if ctx.is_first:
                continue
            if above and above[0].grad is not None:
                g_left[k + 1] = g_left[k + 1] + above[0].grad
            with torch.no_grad():
                left[k] = ((states[k] - outs[-1]) / alphas[k]).requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(left[k].detach() * alphas[k], g)
            g_left[k] = g * alphas[k].detach()
        if ctx.columns.check and ctx.step == 1:
            ctx.columns.errors = [
                float((ours - theirs).abs().max())
                for ours, theirs in zip(left, ctx.columns.first, strict=True)
            ]
        return (None, None, x.grad, *g_left)


def publish_columns(model: nn.Module) -> nn.Module:
    """Put the published procedure in place of the columns of a model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RevSColumns):
            model.set_submodule(name, PublishedColumns(module))
    return model
