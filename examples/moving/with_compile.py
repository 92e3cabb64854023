"""compile: ``srp.compile`` where ``torch.compile`` stood. The first step waits for the compiler."""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp


def train() -> list[float]:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(), layer.Flatten(), layer.Linear(8 * 64, 10)
    )
    functional.set_step_mode(net, "m")
    net = srp.compile(net)  # was: net = torch.compile(net)
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
