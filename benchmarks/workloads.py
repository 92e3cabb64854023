"""What is trained: each workload builds a stock model and its batch, and runs one forward to a loss.

Shapes are those of the project's targets (docs/benchmarks.md). Each model comes from its framework's own
zoo or tutorials, except for the yardstick VGG, which is spelled out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import snntorch
import torch
from snntorch import surrogate as snn_surrogate
from snntorch import utils as snn_utils
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.layer.attention import SpikingSelfAttention
from spikingjelly.activation_based.model import sew_resnet, spikformer, spiking_resnet
from torch import nn

LIF = {
    "spiking_neuron": neuron.LIFNode,
    "surrogate_function": surrogate.ATan(),
    "detach_reset": True,
}


@dataclass(frozen=True)
class Workload:
    """One training step to measure.

    ``loss_of(model, x)`` resets the states, runs the forward and returns the loss. ``blocks`` are the
    module types that a user of SpikingJelly's memopt would name as its targets. ``neuron_steps`` is the
    number of neurons times time steps, where bytes for each are of interest.
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss_of: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    blocks: tuple[type[nn.Module], ...] = ()
    neuron_steps: int | None = None
    tags: frozenset[str] = field(default_factory=frozenset)


class VGGBlock(nn.Sequential):
    """A layer of the yardstick, of a type of its own for memopt to find."""


def yardstick_vgg() -> nn.Module:
    """Eight (3x3 conv 64, bn, LIF) layers, average pooling after the third and sixth."""
    layers: list[nn.Module] = []
    channels = 2
    for index in range(8):
        layers.append(
            VGGBlock(
                layer.Conv2d(channels, 64, 3, padding=1, bias=False),
                layer.BatchNorm2d(64),
                neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan()),
            )
        )
        channels = 64
        if index in (2, 5):
            layers.append(layer.AvgPool2d(2))
    return _multi_step(nn.Sequential(*layers, layer.Flatten(), layer.Linear(64 * 8 * 8, 10)))


class LeakyLoop(nn.Module):
    """Linear-Leaky-Linear-Leaky-Linear, stepped by a loop in forward, as snnTorch's tutorial 5 does."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(width, width), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(width, width), snntorch.Leaky(beta=0.9)
        self.fc3 = nn.Linear(width, 10)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        total = torch.zeros((), device=x_seq.device)
        for x in x_seq:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            total = total + self.fc3(spk2)
        return total / len(x_seq)


def tutorial_6_net() -> nn.Module:
    """The convolutional network of snnTorch's tutorial 6."""

    def leaky(**options: Any) -> nn.Module:
        fast_sigmoid = snn_surrogate.fast_sigmoid(slope=25)
        return snntorch.Leaky(beta=0.5, spike_grad=fast_sigmoid, init_hidden=True, **options)

    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        leaky(),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        leaky(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        leaky(output=True),
    )


def _multi_step(model: nn.Module) -> nn.Module:
    functional.set_step_mode(model, "m")
    return model


def _rate_loss(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    functional.reset_net(model)
    return model(x_seq).mean(0).square().sum()


def _loop_loss(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    return model(x_seq).square().sum()


def _tutorial_6_loss(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    snn_utils.reset(model)
    spikes = []
    for _ in range(50):
        spk, _mem = model(image)
        spikes.append(spk)
    return torch.stack(spikes).mean(0).square().sum()


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("vgg", yardstick_vgg, (8, 16, 2, 32, 32), _rate_loss, (VGGBlock,)),
        Workload("vgg-t32", yardstick_vgg, (32, 16, 2, 32, 32), _rate_loss, (VGGBlock,)),
        Workload(
            "sew-resnet18",
            lambda: _multi_step(sew_resnet.sew_resnet18(cnf="ADD", **LIF)),
            (8, 16, 3, 96, 96),
            _rate_loss,
            (sew_resnet.BasicBlock,),
        ),
        Workload(
            "spiking-resnet34",
            lambda: _multi_step(spiking_resnet.spiking_resnet34(**LIF)),
            (8, 16, 3, 96, 96),
            _rate_loss,
            (spiking_resnet.BasicBlock,),
        ),
        Workload(
            "spikformer",
            spikformer.spikformer_cifar10,
            (4, 4, 3, 32, 32),
            _rate_loss,
            (spikformer.SpikformerConv2dBNLIF, SpikingSelfAttention, spikformer.SpikformerMLP),
        ),
        Workload(
            "leaky-loop",
            LeakyLoop,
            (100, 128, 512),
            _loop_loss,
            neuron_steps=2 * 512 * 128 * 100,
        ),
        Workload("tutorial-6", tutorial_6_net, (128, 1, 28, 28), _tutorial_6_loss),
    )
}
