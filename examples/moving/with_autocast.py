"""Mixed precision: nothing else changes, autocast stands around the forward as before."""

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make() -> nn.Module:
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(8 * 64, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net.to(DEVICE)


def train() -> list[float]:
    torch.manual_seed(0)
    net = make()
    net = srp.convert_to_reversible(net)  # was: nothing
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, enabled=DEVICE == "cuda")
    losses = []
    for _ in range(4):
        x_seq = torch.rand(4, 8, 2, 8, 8, device=DEVICE)
        label = torch.randint(10, (8,), device=DEVICE)
        functional.reset_net(net)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x_seq).mean(0), label)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
