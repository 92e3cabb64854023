"""Accelerate: convert before ``prepare``."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snn_reversible_plugin as srp


def train() -> list[float]:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(32, 4, 2, 8, 8), torch.randint(10, (32,)))
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(), layer.Flatten(), layer.Linear(8 * 64, 10)
    )
    functional.set_step_mode(net, "m")
    net = srp.convert_to_reversible(net)  # was: nothing
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    accelerator = Accelerator()
    net, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(data, batch_size=8))
    losses = []
    for x, label in loader:
        functional.reset_net(net)
        loss = F.cross_entropy(net(x.transpose(0, 1)).mean(0), label)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
