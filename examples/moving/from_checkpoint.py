"""A network with torch.utils.checkpoint by hand, moved over: take the checkpoints out, and convert."""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

import snn_reversible_plugin as srp

__all__ = ["checkpoint", "srp"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(layer.Conv2d(before, 8, 3, padding=1), neuron.IFNode()) for before in (2, 8, 8)
        )
        self.head = layer.Linear(8 * 64, 10)
        functional.set_step_mode(self, "m")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            functional.reset_net(block)  # or a checkpoint would start again from where the neurons ended
            x_seq = block(x_seq)  # was: x_seq = checkpoint(again(block), x_seq, use_reentrant=False)
        return self.head(x_seq.flatten(2)).mean(0)


def again(block: nn.Module):
    """The block from fresh states, as often as the checkpoint runs it."""

    def run(x_seq: torch.Tensor) -> torch.Tensor:
        functional.reset_net(block)
        return block(x_seq)

    return run


def train() -> list[float]:
    torch.manual_seed(0)
    net = Net()
    net = srp.convert_to_reversible(net)  # was: nothing
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        x_seq, label = torch.rand(4, 8, 2, 8, 8), torch.randint(10, (8,))
        loss = F.cross_entropy(net(x_seq), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
