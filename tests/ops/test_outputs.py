"""Membranes take what stock's take: retain_grad, and then a write in place."""

import pytest
import snntorch
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import differentiated


def scale(state):
    state.mul_(0.75)


def part(state):
    state[:, 0] = 0.25


@pytest.mark.parametrize("write", [scale, part])
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
@pytest.mark.parametrize("kind", [
    neuron.IFNode, neuron.ParametricLIFNode, neuron.QIFNode,
    lambda: snntorch.Alpha(alpha=0.9, beta=0.8, init_hidden=True),
    lambda: snntorch.Synaptic(alpha=0.9, beta=0.8, init_hidden=True),
], ids=["IF", "ParametricLIF", "QIF", "Alpha", "Synaptic"])  # fmt: skip
def test_a_membrane_whose_gradient_is_retained_is_written_to(kind, arithmetic, write):
    x_seq, found = torch.rand(3, 2, 4) * 2, []
    for converted in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), kind())
        if converted or arithmetic != "stock":
            srp.convert_to_reversible(net, arithmetic=arithmetic)
        loss, retained = 0, []
        with torch.enable_grad() if converted or arithmetic == "stock" else differentiated(net):
            for x in x_seq:
                spikes = net(x)
                state = net[1].v if hasattr(net[1], "v") else net[1].mem
                state.retain_grad()
                retained.append(state)
                write(state)
                loss = loss + spikes.sum() + state.sum()
        loss.backward()
        found.append([*(state.grad for state in retained), net[0].weight.grad])
    assert all(map(torch.equal, *found))
