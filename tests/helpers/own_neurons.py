"""Neurons as users write them, for the tape alone, and what it holds for them."""

import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step


def spikes(steps, features=256, batch=64):
    return (torch.rand(steps, batch, features) > 0.5).float()


class Fire(torch.autograd.Function):
    """Zeros and ones, with the gradient of a triangle."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.abs()).clamp(min=0)


def lif(x_seq):
    """A loop over time with a hard reset."""
    v, spikes = 0.0, []
    for x in x_seq:
        v = v * 0.5 + x
        s = Fire.apply(v - 1.0)
        v = v * (1 - s)
        spikes.append(s)
    return torch.stack(spikes)


def scan(x_seq):
    """A filter without a reset, and one surrogate for all steps."""
    v, states = 0.0, []
    for x in x_seq:
        v = v + (x - v) / 2
        states.append(v)
    return Fire.apply(torch.stack(states) - 0.2)


class Scale(nn.Module):
    """A current that takes no convolution and no matrix product."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features))

    def forward(self, x):
        return x * self.weight


class Alternating(nn.Module):
    """Layers, each followed by a neuron."""

    def __init__(self, neuron, layers):
        super().__init__()
        self.neuron, self.layers = neuron, nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = self.neuron(layer(x))
        return x


def times_less(net, x, mode="memory"):
    """How many times less is held, and is alive at the peak, than in stock; the gradients are equal."""
    held, peak = count_step(lambda: net(x).mean())
    expected = gradients(net)

    def taped():
        with srp.reversible(net, mode=mode):
            return net(x).mean()

    ours, our_peak = count_step(taped)
    for stock, got in zip(expected, gradients(net), strict=True):
        assert (stock is None) == (got is None)
        assert stock is None or torch.equal(stock, got)
    return held / ours, peak / our_peak


def gradients(net):
    """The parameters' gradients, which are taken away."""
    found = [p.grad for p in net.parameters()]
    net.zero_grad()
    return found
