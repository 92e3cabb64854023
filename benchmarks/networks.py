"""Networks that no framework's zoo has in the form that the benchmarks need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model.ms_resnet import MSResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from snn_reversible_plugin import RevSBlock, RevSSequence


def multi_step(model: nn.Module) -> nn.Module:
    functional.set_step_mode(model, "m")
    return model


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
    return multi_step(nn.Sequential(*layers, layer.Flatten(), layer.Linear(64 * 8 * 8, 10)))


class _MSResNetForSmallImages(MSResNet):
    _first_stage_stride = 1


def ms_resnet34() -> nn.Module:
    """MS-ResNet34 as RevSResNet37's authors compare with: 3x3 stem, full resolution in the first stage,
    IF neurons, 100 classes (arXiv 2312.07922). Batch norms start at one, so that every branch counts."""
    model = _MSResNetForSmallImages(
        T=4,
        num_classes=100,
        layers=(3, 4, 6, 3),
        stem_kernel_size=3,
        stem_stride=1,
        spiking_neuron=neuron.IFNode,
        detach_reset=True,
        surrogate_function=surrogate.ATan(),
    )
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.ones_(module.weight)
    return model


def reversible_chain(depth: int, width: int = 16) -> Callable[[], nn.Module]:
    """A stem, a chain of reversible blocks whose branches are (IF, 3x3 conv, bn), and a head."""

    def branch() -> nn.Module:
        fire = neuron.IFNode(detach_reset=True, surrogate_function=surrogate.ATan())
        return nn.Sequential(
            fire, layer.Conv2d(width, width, 3, padding=1, bias=False), layer.BatchNorm2d(width)
        )

    def make() -> nn.Module:
        blocks = [RevSBlock(multi_step(branch()), multi_step(branch())) for _ in range(depth)]
        stem = layer.Conv2d(2, 2 * width, 3, padding=1)
        head = nn.Sequential(layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(2 * width, 10))
        return nn.Sequential(multi_step(stem), RevSSequence(blocks, states="reset"), multi_step(head))

    return make


class Loop(nn.Module):
    """Linear-neuron-Linear-neuron-Linear, stepped by a loop in forward."""

    def __init__(
        self, width: int, neuron_of: Callable[[], nn.Module], inputs: int | None = None, outputs: int = 10
    ) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(inputs or width, width), neuron_of()
        self.fc2, self.lif2 = nn.Linear(width, width), neuron_of()
        self.fc3 = nn.Linear(width, outputs)


class LeakyLoop(Loop):
    """In snnTorch, as its tutorial 5 does it; ``settings`` are those of the neurons."""

    def __init__(
        self, width: int = 512, inputs: int | None = None, outputs: int = 10, **settings: Any
    ) -> None:
        super().__init__(width, lambda: snntorch.Leaky(**{"beta": 0.9} | settings), inputs, outputs)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        total, _ = self.steps(x_seq, self.lif1.init_leaky(), self.lif2.init_leaky())
        return total / len(x_seq)

    def steps(
        self, x_seq: torch.Tensor, mem1: torch.Tensor, mem2: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        total = torch.zeros((), device=x_seq.device)
        for x in x_seq:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            total = total + self.fc3(spk2)
        return total, (mem1, mem2)


class LIFLoop(Loop):
    """In SpikingJelly, from fresh states; ``settings`` are those of the neurons."""

    def __init__(self, width: int = 512, **settings: Any) -> None:
        super().__init__(width, lambda: neuron.LIFNode(**{"v_threshold": 0.25} | settings))

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        functional.reset_net(self)
        return self.steps(x_seq) / len(x_seq)

    def steps(self, x_seq: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=x_seq.device)
        for x in x_seq:
            total = total + self.fc3(self.lif2(self.fc2(self.lif1(self.fc1(x)))))
        return total


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
