"""Networks that a compiler has to do with: neurons of one's own in a loop, and a break in the graph."""

import torch
from spikingjelly.activation_based import neuron
from torch import nn


class Fire(torch.autograd.Function):
    """A spike of a user's own, with a triangle for its gradient."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * (1 - v.abs()).clamp(min=0)


class Rounded(torch.autograd.Function):
    """Integer spikes, straight through inside of the range."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return v.clamp(0, 4).round()

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * ((v > 0) & (v < 4))


class Loop(nn.Module):
    """A loop over time with neurons of its own; spikes are written into slices."""

    def __init__(self, fire=Fire, recurrent=False):
        super().__init__()
        self.fire, self.recurrent = fire, recurrent
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 24)
        self.back = nn.Linear(24, 24) if recurrent else None

    def forward(self, x_seq):
        v1 = v2 = spikes = torch.zeros(())
        out = torch.zeros(len(x_seq), x_seq.shape[1], 24)
        for t, x in enumerate(x_seq):
            v1 = 0.8 * v1 + self.first(x)
            fired = self.fire.apply(v1 - 0.3)
            v1 = v1 - fired * 0.3
            current = self.second(fired)
            if self.recurrent and t:
                current = current + self.back(spikes)
            v2 = 0.5 * v2 + current
            spikes = self.fire.apply(v2 - 0.1)
            v2 = v2 * (1 - spikes)
            out[t] = spikes
        return out


class Broken(nn.Module):
    """Something between two layers that the compiler can't look into."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 32), neuron.IFNode(step_mode="m"))
        self.second = nn.Sequential(nn.Linear(32, 16), neuron.IFNode(step_mode="m"), nn.Linear(16, 4))

    def forward(self, x_seq):
        x_seq = self.first(x_seq)
        torch._dynamo.graph_break()
        return self.second(x_seq)
