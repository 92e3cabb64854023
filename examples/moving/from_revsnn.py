"""Reversible blocks and temporal columns as RevSNN and T-RevSNN have them, with this package's classes."""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp


def branch(channels: int) -> nn.Sequential:
    """F or G of a block: neurons, convolution, batch norm. Your own modules stay as they are."""
    net = nn.Sequential(
        neuron.IFNode(), layer.Conv2d(channels, channels, 3, padding=1), layer.BatchNorm2d(channels)
    )
    functional.set_step_mode(net, "m")
    return net


class RevNet(nn.Module):
    """RevSNN: a stem, a chain of blocks on two halves of the channels, a head."""

    def __init__(self, channels: int = 8, depth: int = 6) -> None:
        super().__init__()
        self.stem = layer.Conv2d(2, 2 * channels, 3, padding=1, step_mode="m")
        blocks = [srp.RevSBlock(branch(channels), branch(channels)) for _ in range(depth)]
        self.chain = srp.RevSSequence(blocks, states="reset")
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return self.head(self.chain(self.stem(x_seq)).mean((0, 3, 4)))


class Level(nn.Module):
    """A level of a sub-network: from the level below, and from the level above at the time step before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.below, self.above = branch(channels), branch(channels)

    def forward(self, below: torch.Tensor, above: torch.Tensor | None = None) -> torch.Tensor:
        functional.reset_net(self)
        out = self.below(below)
        return out if above is None else out + self.above(above)


class RevColumns(nn.Module):
    """T-RevSNN: a sub-network for each time step; its states go on to the next one's by factors alpha."""

    def __init__(self, steps: int = 3, channels: int = 8, levels: int = 2) -> None:
        super().__init__()
        self.stem = layer.Conv2d(2, channels, 3, padding=1, step_mode="m")
        subnets = [[Level(channels) for _ in range(levels)] for _ in range(steps)]
        alphas = [[nn.Parameter(torch.full((channels, 1, 1), 0.5)) for _ in range(levels)] for _ in subnets]
        self.chain = srp.RevSColumns(subnets, alphas)
        self.head = nn.Linear(channels, 10)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        states, _ = self.chain([x.unsqueeze(0) for x in self.stem(x_seq)])
        return self.head(states[-1].mean((0, 3, 4)))


def train(network: type[nn.Module] = RevNet, reversible: bool = True) -> list[float]:
    torch.manual_seed(0)
    net = network()
    net.chain.reversible = reversible  # False: the same function under autograd
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        x_seq, label = torch.rand(3, 4, 2, 8, 8), torch.randint(10, (4,))
        loss = F.cross_entropy(net(x_seq), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train(RevNet), train(RevColumns))
