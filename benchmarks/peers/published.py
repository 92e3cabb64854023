"""The published reversible procedure, the baseline of the reversible blocks (Zhang & Zhang, AAAI 2024).

Written anew from the paper and the behaviour of its code: streams in plain floating point, one autograd
function over the chain, ``.backward()`` called inside its backward for each branch in turn, so that
parameters get their gradients on the side, and running statistics that count each batch twice.
"""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from snn_reversible_plugin import RevSBlock, RevSSequence


class PublishedChain(nn.Module):
    """The blocks of a :class:`RevSSequence`, rebuilt the published way.

    ``rebuild_error`` is the largest difference of the rebuilt input to the real one where ``check`` is on.
    """

    def __init__(self, chain: RevSSequence) -> None:
        super().__init__()
        self.blocks = chain.blocks
        self.check = False
        self.original: Tensor | None = None
        self.rebuild_error: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Chain.apply(x, self)
        functional.reset_net(self)
        return y


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, chain: PublishedChain) -> Tensor:
        if chain.check:
            chain.original = x.detach().clone()
        for block in chain.blocks:
            x1, x2 = x.chunk(2, block.dim)
            y1 = x1 + block.f(x2)
            x = torch.cat((y1, x2 + block.g(y1)), block.dim)
        ctx.chain, ctx.y = chain, x.detach()
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        chain, y = ctx.chain, ctx.y
        del ctx.y
        for block in reversed(chain.blocks):
            y, dy = _undo(block, y, dy)
        if chain.original is not None:
            chain.rebuild_error = float((y - chain.original).abs().max())
            chain.original = None
        return dy, None


def _undo(block: RevSBlock, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    y1, y2 = y.chunk(2, block.dim)
    dy1, dy2 = dy.chunk(2, block.dim)
    del y, dy
    g_out, g_in = _branch(block.g, y1, dy2)
    x2, dx1 = y2 - g_out, dy1 + g_in
    del y2, dy1, g_out, g_in
    f_out, f_in = _branch(block.f, x2, dx1)
    x1, dx2 = y1 - f_out, dy2 + f_in
    del y1, dy2, f_out, f_in
    return torch.cat((x1, x2), block.dim), torch.cat((dx1, dx2), block.dim)


def _branch(branch: nn.Module, x: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = branch(x)
        out.backward(d_out)
    functional.reset_net(branch)
    assert x.grad is not None
    return out.detach(), x.grad


def publish(model: nn.Module) -> nn.Module:
    """Put the published procedure in place of every reversible chain, with float streams."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RevSSequence):
            for block in module.blocks:
                block.bits = None
            model.set_submodule(name, PublishedChain(module))
    return model
