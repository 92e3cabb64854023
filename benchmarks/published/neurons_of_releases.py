"""Neurons that build on a release's: PLIF in a loop, CLIF, PSN, and threshold-dependent and masked forms.

Source: Fang et al., ICCV 2021 (PLIF); Huang et al., ICML 2024 (CLIF); Fang et al., NeurIPS 2023 (PSN).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


def plif(sj, width):
    """A static stem, single-step neurons in the model's own loop, `+=` of what the steps give, voting."""

    def node():
        return sj.neuron.ParametricLIFNode(
            init_tau=2.0, detach_reset=True, surrogate_function=sj.surrogate.ATan()
        )

    class VotingLayer(nn.Module):
        def __init__(self, voting_size):
            super().__init__()
            self.voting = nn.AvgPool1d(voting_size, voting_size)

        def forward(self, x):
            return self.voting(x.unsqueeze(1)).squeeze(1)

    class StaticNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.T = 4
            self.static_conv = nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            )
            self.conv = nn.Sequential(
                node(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                node(),
                nn.MaxPool2d(2, 2),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                node(),
                nn.AdaptiveMaxPool2d(2),
            )
            self.fc = nn.Sequential(
                nn.Flatten(), sj.layer.Dropout(0.5), nn.Linear(4 * width, 20, bias=False), node()
            )
            self.boost = VotingLayer(2)

        def forward(self, x):
            x = self.static_conv(x)
            out_spikes_counter = self.boost(self.fc(self.conv(x)))
            for _ in range(1, self.T):
                out_spikes_counter += self.boost(self.fc(self.conv(x)))
            return out_spikes_counter

    return StaticNet()


def plif_loss(model, x):
    """Rates to one-hot labels; the script resets after the backward of each batch."""
    for module in model.modules():
        if hasattr(module, "reset"):
            module.reset()
    labels = torch.arange(len(x), device=x.device) % 10
    return F.mse_loss(model(x).float() / model.T, F.one_hot(labels, 10).float())


def clif(sj, width):
    """A subclass of the release's base with a complementary membrane, for single and for several steps."""

    class ComplementaryLIFNeuron(sj.base.MemoryModule):
        def __init__(self, tau=2.0, v_threshold=1.0):
            super().__init__()
            self.register_memory("v", 0.0)
            self.register_memory("m", 0.0)
            self.tau, self.v_threshold = tau, v_threshold
            self.surrogate_function = sj.surrogate.PiecewiseQuadratic()
            self.step_mode = "m"

        def single_step_forward(self, x):
            self.v = self.v - self.v / self.tau + x
            self.m = self.m * torch.sigmoid(self.v / self.tau)
            spike = self.surrogate_function(self.v - self.v_threshold)
            self.m += spike
            self.v = self.v - spike * (self.v_threshold + torch.sigmoid(self.m))
            return spike

    def conv(inp, out, stride=1):
        return nn.Sequential(
            sj.layer.Conv2d(inp, out, 3, stride, 1, bias=False, step_mode="m"),
            sj.layer.BatchNorm2d(out, step_mode="m"),
        )

    class Block(nn.Module):
        def __init__(self, inp, out, stride=1):
            super().__init__()
            self.conv1, self.act1, self.conv2, self.act2 = (
                conv(inp, out, stride), ComplementaryLIFNeuron(), conv(out, out), ComplementaryLIFNeuron(),
            )  # fmt: skip
            self.shortcut = nn.Sequential()
            if stride != 1 or inp != out:
                self.shortcut = conv(inp, out, stride)

        def forward(self, x):
            out = self.act1(self.conv1(x))
            out = self.conv2(out)
            out += self.shortcut(x)
            return self.act2(out)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(conv(3, width), ComplementaryLIFNeuron())
            self.blocks = nn.Sequential(Block(width, width), Block(width, 2 * width, 2))
            self.fc = sj.layer.Linear(2 * width, 10, step_mode="m")

        def forward(self, x):
            sj.functional.reset_net(self)
            x = x.unsqueeze(0).repeat(4, 1, 1, 1, 1)
            return self.fc(self.blocks(self.stem(x)).mean((-1, -2))).mean(0)

    return Net()


def psn(sj, width):
    """Parallel neurons: a matrix over time, one with a mask, one as a sliding window."""

    class PSN(nn.Module):
        def __init__(self, steps):
            super().__init__()
            self.surrogate_function = sj.surrogate.ATan()
            self.fc = nn.Linear(steps, steps)
            nn.init.constant_(self.fc.bias, -1)

        def forward(self, x_seq):
            h_seq = torch.addmm(self.fc.bias.unsqueeze(1), self.fc.weight, x_seq.flatten(1))
            spike = self.surrogate_function(h_seq)
            return spike.view(x_seq.shape)

    class MaskedPSN(PSN):
        def __init__(self, steps, k=2):
            super().__init__(steps)
            mask = torch.ones(steps, steps).tril().triu(1 - k)
            self.register_buffer("mask", mask)

        def forward(self, x_seq):
            weight = self.fc.weight * self.mask
            h_seq = F.linear(x_seq.flatten(1).t(), weight, self.fc.bias).t()
            return self.surrogate_function(h_seq).view(x_seq.shape)

    class SlidingPSN(nn.Module):
        def __init__(self, k=2):
            super().__init__()
            self.k, self.surrogate_function = k, sj.surrogate.ATan()
            self.weight = nn.Parameter(torch.tensor([2.0 ** (i - k + 1) for i in range(k)]))
            self.threshold = nn.Parameter(torch.as_tensor(-1.0))

        def forward(self, x_seq):
            steps = x_seq.shape[0]
            weight = torch.zeros(steps, steps, device=x_seq.device)
            for i in range(steps):
                end = i + 1
                start = max(0, end - self.k)
                weight[i, start:end] = self.weight[self.k - (end - start) :]
            h_seq = torch.addmm(self.threshold, weight, x_seq.flatten(1)).view(x_seq.shape)
            return self.surrogate_function(h_seq)

    def conv(inp, out):
        return (
            sj.layer.Conv2d(inp, out, 3, padding=1, bias=False, step_mode="m"),
            sj.layer.BatchNorm2d(out, step_mode="m"),
        )

    return nn.Sequential(
        *conv(2, width), PSN(4), *conv(width, width), MaskedPSN(4), sj.layer.MaxPool2d(2, 2, step_mode="m"),
        *conv(width, 2 * width), SlidingPSN(), sj.layer.Flatten(2, step_mode="s"),
        sj.layer.Linear(2 * width * 16, 10, step_mode="m"),
    ) if width < 16 else nn.Sequential(
        *conv(2, width), PSN(4), *conv(width, width), MaskedPSN(4), *conv(width, width), SlidingPSN(),
        sj.layer.AdaptiveAvgPool2d((1, 1), step_mode="m"), sj.layer.Flatten(2, step_mode="s"),
        sj.layer.Linear(width, 10, step_mode="m"),
    )  # fmt: skip


FAMILIES = (
    Family("PLIF", plif, "0.0.0.0.12", (4, (2, 3, 8, 8)), (64, (10, 3, 32, 32)), plif_loss),
    Family("CLIF", clif, "0.0.0.0.14", (4, (2, 3, 8, 8)), (64, (8, 3, 32, 32))),
    Family("PSN", psn, "0.0.0.0.14", (4, (4, 2, 2, 8, 8)), (64, (4, 10, 2, 32, 32))),
)
