"""Autograd functions of the user's that rebuild a block themselves: never more than stock, in any mode."""

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import Fire, gradients, lif, spikes
from snn_reversible_plugin.reports.measure import count_step


class Reversible(torch.autograd.Function):
    """y + f(x), run again in the backward; saves its output too, as T-RevSNN's does."""

    @staticmethod
    def forward(ctx, f, x, y):
        with torch.no_grad():
            z = f(x) + y
        ctx.f = f
        ctx.save_for_backward(x, z)
        return z

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.f(x)
        out.backward(grad)
        return None, x.grad, grad


class Checkpoint(torch.autograd.Function):
    """f(x), run again; holds what it likes."""

    @staticmethod
    def forward(ctx, f, x, y):
        ctx.f = f
        ctx.save_for_backward(x)
        return f(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.f(x)
        out.backward(grad)
        return None, x.grad, None


class Undone(torch.autograd.Function):
    """A chain of x + f(x) with f of its own second half; only the last output is saved."""

    @staticmethod
    def forward(ctx, fs, x):
        a, b = x.chunk(2, 1)
        for f in fs:
            a, b = b, a + f(b)
        ctx.fs = fs
        out = torch.cat([a, b], 1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors[0].chunk(2, 1)
        grad_a, grad_b = grad.chunk(2, 1)
        for f in reversed(ctx.fs):
            before = a.detach().requires_grad_()
            with torch.enable_grad():
                branch = f(before)
            branch.backward(grad_b)
            a, b = b - branch.detach(), before.detach()
            grad_a, grad_b = grad_b, grad_a + before.grad
        return None, torch.cat([grad_a, grad_b], 1)


class Spiking(nn.Module):
    """A block whose spikes its user holds, for a loss on rates."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn, self.held = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            [],
        )

    def forward(self, x):
        spikes = Fire.apply(self.bn(self.conv(x)))
        self.held.append(spikes.detach())
        return self.conv(spikes)


class Net(nn.Module):
    def __init__(self, apply, make_block, blocks=6):
        super().__init__()
        self.apply_block, self.stem = apply, nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(make_block() for _ in range(blocks))

    def forward(self, x):
        a = b = self.stem(x)
        if self.apply_block is Undone:
            return Undone.apply(list(self.blocks), torch.cat([a, b], 1))
        for block in self.blocks:
            a, b = b, self.apply_block(block, b, a)
        return a + b


def conv():
    return nn.Conv2d(16, 16, 3, padding=1)


BLOCKS = {
    "conv": conv,
    "two convs": lambda: nn.Sequential(conv(), nn.BatchNorm2d(16), nn.ReLU(), conv()),
    "conv, hardtanh": lambda: nn.Sequential(conv(), nn.Hardtanh()),
    "conv, bn": lambda: nn.Sequential(conv(), nn.BatchNorm2d(16)),
    "spiking": lambda: Spiking(16),
}
FUNCTIONS = {
    "reversible": Reversible.apply,
    "checkpoint": Checkpoint.apply,
    "undone": Undone,
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_never_more_than_stock(function, block):
    torch.manual_seed(0)
    net, x = Net(FUNCTIONS[function], BLOCKS[block]), torch.rand(2, 3, 32, 32)

    def clear():
        held = 0
        for module in net.blocks:
            for one in getattr(module, "held", []):
                held += one.nbytes
            if isinstance(module, Spiking):
                module.held = []
        return held

    held, peak = count_step(lambda: net(x).square().mean())
    by_user, expected = clear(), gradients(net)
    for mode in ("memory", "speed"):

        def taped(mode=mode):
            with srp.reversible(net, mode=mode):
                return net(x).square().mean()

        ours, our_peak = count_step(taped)
        clear()
        assert ours <= held + by_user / 32 + 4096
        # What a function returns and nobody saves is kept in place of a sum with it, which is replayed.
        sums = x.nbytes // 3 * 16 if (function, mode) == ("checkpoint", "speed") else 0
        assert our_peak <= 1.02 * peak + 65536 + sums
        for stock, found in zip(expected, gradients(net), strict=True):
            assert torch.equal(stock, found)


class Product(torch.autograd.Function):
    """A layer that is written as a function, as in PyTorch's tutorial."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        out = x @ weight.t()
        out += bias
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, 1).t() @ x.flatten(0, 1), grad.sum((0, 1))


def test_a_layer_that_is_a_function_is_replayed():
    class Layer(nn.Linear):
        def forward(self, x):
            return Product.apply(x, self.weight, self.bias)

    class Network(nn.Sequential):
        def forward(self, x):
            for layer in self:
                x = lif(layer(x))
            return x

    net, x = Network(*[Layer(128, 128) for _ in range(3)]), spikes(6, 128)
    held, _ = count_step(lambda: net(x).mean())
    expected = gradients(net)

    def taped():
        with srp.reversible(net):
            return net(x).mean()

    assert held / count_step(taped)[0] > 60
    for stock, found in zip(expected, gradients(net), strict=True):
        assert torch.equal(stock, found)
