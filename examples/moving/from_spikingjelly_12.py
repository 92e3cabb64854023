"""A SpikingJelly script of 0.0.0.0.12, whose modules are in ``clock_driven``, moved over: one line."""

import torch
import torch.nn.functional as F
from spikingjelly.clock_driven import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp


class CSNN(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layer.SeqToANNContainer(
                nn.Conv2d(2, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            ),
            neuron.MultiStepLIFNode(surrogate_function=surrogate.ATan()),
            layer.SeqToANNContainer(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(channels * 8 * 8, 10)),
        )

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return self.features(x_seq).mean(0)


def train() -> list[float]:
    torch.manual_seed(0)
    net = CSNN()
    net = srp.convert_to_reversible(net)  # was: nothing
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        x_seq, label = torch.rand(4, 8, 2, 16, 16), torch.randint(10, (8,))
        loss = F.cross_entropy(net(x_seq), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        functional.reset_net(net)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
