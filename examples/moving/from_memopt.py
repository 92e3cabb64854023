"""A network that SpikingJelly's memopt made smaller, moved over: no targets, no example input."""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, memopt, neuron
from torch import nn

import snn_reversible_plugin as srp

__all__ = ["memopt", "srp"]


class Block(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            layer.Conv2d(before, after, 3, padding=1), layer.BatchNorm2d(after), neuron.LIFNode()
        )


def example(net: nn.Module) -> torch.Tensor:
    """What memopt measures its plans on."""
    return net(torch.rand(4, 8, 2, 8, 8)).sum()


def train() -> list[float]:
    torch.manual_seed(0)
    net = nn.Sequential(Block(2, 8), Block(8, 8), layer.Flatten(), layer.Linear(8 * 64, 10))
    functional.set_step_mode(net, "m")
    srp.convert_to_reversible(net)  # was: memopt.optimize_memory(net, (Block,), example, level=1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        x_seq, label = torch.rand(4, 8, 2, 8, 8), torch.randint(10, (8,))
        functional.reset_net(net)
        loss = F.cross_entropy(net(x_seq).mean(0), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
