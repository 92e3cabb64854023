"""Networks of snnTorch's tutorials and what is built on them: a loop over time in the forward.

Source: Eshraghian et al., Proceedings of the IEEE 2023, whose code this is written after.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .family import Family


def convolutional(_sj, width):
    """Tutorial 6: hidden states as local variables, learned decays, outputs collected in lists."""
    import snntorch as snn
    from snntorch import surrogate

    grad = surrogate.fast_sigmoid(slope=25)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.lif1 = nn.Conv2d(2, width, 3), snn.Leaky(beta=0.5, spike_grad=grad)
            self.conv2 = nn.Conv2d(width, 2 * width, 3)
            self.lif2 = snn.Leaky(beta=0.9, spike_grad=grad, learn_beta=True, threshold=0.5)
            self.fc1, self.lif3 = nn.Linear(2 * width, 10), snn.Leaky(beta=0.8, spike_grad=grad)

        def forward(self, x):
            mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
            spk_rec, mem_rec = [], []
            for step in range(x.shape[0]):
                cur1 = F.max_pool2d(self.conv1(x[step]), 2)
                spk1, mem1 = self.lif1(cur1, mem1)
                spk2, mem2 = self.lif2(self.conv2(spk1), mem2)
                spk3, mem3 = self.lif3(self.fc1(spk2.mean((-1, -2))), mem3)
                spk_rec.append(spk3)
                mem_rec.append(mem3)
            return torch.stack(spk_rec, dim=0), torch.stack(mem_rec, dim=0)

    return Net()


def rate_loss(model, x):
    """Cross entropy of the membranes, summed over the steps."""
    _, membranes = model(x)
    labels = torch.arange(x.shape[1], device=x.device) % 10
    return sum(F.cross_entropy(step.float(), labels) for step in membranes)


def regression(_sj, width):
    """A sequential network that holds its states, reset as a call starts; a membrane is its output."""
    import snntorch as snn
    from snntorch import utils

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(6, width), snn.Synaptic(alpha=0.9, beta=0.8, threshold=0.3, init_hidden=True),
                nn.Linear(width, width),
                snn.RLeaky(beta=0.7, threshold=0.2, init_hidden=True, all_to_all=False, V=0.5),
                nn.Linear(width, 3),
                snn.Leaky(beta=0.9, init_hidden=True, output=True, reset_mechanism="none"),
            )  # fmt: skip

        def forward(self, x):
            utils.reset(self.net)
            return torch.stack([self.net(step)[1] for step in x])

    return Net()


FAMILIES = (
    Family(
        "snnTorch, convolutional", convolutional, None, (4, (5, 2, 2, 8, 8)), (32, (50, 14, 2, 24, 24)),
        rate_loss,
    ),
    Family("snnTorch, regression", regression, None, (8, (7, 3, 6)), (512, (100, 128, 6))),
)  # fmt: skip
