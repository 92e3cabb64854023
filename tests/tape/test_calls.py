"""What a training step takes of Python: calls of the package's own functions, whatever a machine's load.

At tiny shapes these are most of the time that a converted network takes beyond stock's.
"""

import os
import sys

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from two_processes import alone

STEPS, LAYERS = 20, 2
HOME = os.path.dirname(srp.__file__)


class Loop(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(width, width) for _ in range(LAYERS)])
        self.lif = nn.ModuleList([self.make() for _ in range(LAYERS)])


class OfSpikingJelly(Loop):
    def make(self):
        return neuron.LIFNode(surrogate_function=surrogate.ATan())

    def forward(self, x_seq):
        functional.reset_net(self)
        seen = []
        for x in x_seq:
            for fc, lif in zip(self.fc, self.lif, strict=True):
                x = lif(fc(x))
            seen.append(x)
        return torch.stack(seen)


class OfSnnTorch(Loop):
    def make(self):
        return snntorch.Leaky(0.9)

    def forward(self, x_seq):
        states, seen = [lif.reset_mem() for lif in self.lif], []
        for x in x_seq:
            for at, (fc, lif) in enumerate(zip(self.fc, self.lif, strict=True)):
                x, states[at] = lif(fc(x), states[at])
            seen.append(x)
        return torch.stack(seen)


class Sequence(nn.Sequential):
    def __init__(self):
        layers = [
            (layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4),
             neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True))
            for _ in range(LAYERS)
        ]  # fmt: skip
        super().__init__(*[module for one in layers for module in one])
        functional.set_step_mode(self, "m")

    def forward(self, x_seq):
        functional.reset_net(self)
        return super().forward(x_seq)


def calls(net, x):
    """Of functions of the package, in the second of two equal training steps."""
    found = []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(HOME):
            found.append(frame.f_code)

    for _ in range(2):
        found.clear()
        sys.setprofile(count)
        try:
            net(x).square().sum().backward()
        finally:
            sys.setprofile(None)
    return len(found)


MAKES = {make.__name__: make for make in (OfSpikingJelly, OfSnnTorch, Sequence)}


def every_count():
    """For each neuron and step of the loops, its layer included; for each layer of the sequence."""
    found = {}
    for name, make in MAKES.items():
        shape, each = ((4, 2, 4, 4, 4), LAYERS) if make is Sequence else ((STEPS, 2, 8), STEPS * LAYERS)
        for mode in ("memory", "speed", "auto", "minimal"):
            net = srp.convert_to_reversible(make(), mode=mode)
            found[f"{name} {mode}"] = calls(net, torch.rand(shape)) / each
        if make is not Sequence:  # of tensors that have several slices, and weights that are larger
            net = srp.convert_to_reversible(make(512), mode="minimal")
            found[f"{name} minimal, wide"] = calls(net, torch.rand(STEPS, 64, 512)) / each
    return found


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """In a process of its own: one that has seen functions of a user's asks more of each operation."""
    return alone(tmp_path_factory.mktemp("counts"), every_count)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("OfSpikingJelly memory", 225),
        ("OfSpikingJelly speed", 198),
        ("OfSpikingJelly auto", 228),
        ("OfSpikingJelly minimal", 266),
        ("OfSpikingJelly minimal, wide", 303),
        ("OfSnnTorch memory", 238),
        ("OfSnnTorch speed", 214),
        ("OfSnnTorch minimal", 269),
        ("OfSnnTorch minimal, wide", 307),
        ("Sequence memory", 708),
        ("Sequence speed", 704),
        ("Sequence auto", 721),
        ("Sequence minimal", 905),
    ],
)
def test_calls_of_a_training_step(counts, name, most):
    assert most / 2 < counts[name] <= most
