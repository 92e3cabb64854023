"""Neurons that no framework has: convert all the same, and ask what became of them."""

import torch
import torch.nn.functional as F
from torch import nn

import snn_reversible_plugin as srp


class Spike(torch.autograd.Function):
    """A step forward, the derivative of an arctan backward."""

    @staticmethod
    def forward(ctx, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (v,) = ctx.saved_tensors
        return gradient / (1 + (3.14159 * v).square())


class AdaptiveLIF(nn.Module):
    """A threshold that rises with each spike; currents ``[T, N, ...]`` in, spikes out."""

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        v = a = torch.zeros_like(x_seq[0])
        spikes = []
        for x in x_seq:
            v = 0.8 * v + x
            s = Spike.apply(v - 1 - a)
            v = v - s * (1 + a)
            a = 0.9 * a + 0.1 * s
            spikes.append(s)
        return torch.stack(spikes)


def make() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 128), AdaptiveLIF(), nn.Linear(128, 128), AdaptiveLIF(), nn.Linear(128, 10)
    )


def train() -> list[float]:
    torch.manual_seed(0)
    net = make()
    net = srp.convert_to_reversible(net)  # was: nothing
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        x_seq, label = 3 * torch.rand(10, 8, 20), torch.randint(10, (8,))
        loss = F.cross_entropy(net(x_seq).mean(0), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
    srp.memory_report(srp.convert_to_reversible(make()), torch.rand(10, 8, 20)).print()
