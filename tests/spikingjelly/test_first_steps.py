"""A fresh neuron's first step is made of its current alone, so nothing of it is held."""

import copy
from contextlib import nullcontext

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.final_membrane import FinalMembrane
from spikingjelly_against_stock import settings_of

THREE = (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode)


def network(kind, settings):
    """Every weight has a step's spikes or an image before it."""
    return nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1), kind(**settings),
        layer.Conv2d(16, 16, 3, padding=1), kind(v_reset=None, **settings),
        layer.Conv2d(16, 4, 1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", THREE)
def test_one_step_holds_bits(kind):
    net = network(kind, settings_of(kind)[0])
    x = torch.rand(2, 2, 32, 32)

    def loss():
        functional.reset_net(net)
        return net(x).square().mean()

    stock, _ = count_step(loss)
    srp.convert_to_reversible(net, arithmetic="stock")
    ours, _ = count_step(loss)
    assert ours < stock / 20


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", THREE)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("read", ["never", "in the loss", "after the backward"])
def test_and_equals_stock(kind, steps, read):
    for settings in settings_of(kind):
        found, stock = [], network(kind, settings)
        ours = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")
        for net in (stock, ours):
            for _ in range(2):  # the second time it is known whether there are several steps
                functional.reset_net(net)
                net.zero_grad()
                torch.manual_seed(1)
                x_seq = torch.rand(steps, 2, 2, 8, 8) * 2
                out, seen = sum(net(x) for x in x_seq), []
                if read == "in the loss":
                    seen = [net[1].v, net[3].v]
                loss = out.square().sum() + sum(
                    (one * (at + 0.5)).sin().sum() for at, one in enumerate(seen)
                )
                loss.backward()
                if read == "after the backward":
                    seen = [net[1].v, net[3].v]
                found.append([out, *seen, *(p.grad for p in net.parameters())])
        for one in found[1:]:
            assert all(map(torch.equal, one, found[0]))


def test_who_takes_several_steps_promises_once():
    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(5, 5), neuron.LIFNode()), arithmetic="stock")
    node, x = net[1], torch.rand(3, 5, requires_grad=True)
    promised = []
    for _ in range(2):
        functional.reset_net(net)
        net(x * 1)
        promised.append(isinstance(dict.__getitem__(node._memories, "v"), FinalMembrane))
        net(x * 2).sum().backward()
    assert promised == [True, False]


@pytest.mark.parametrize("kind", THREE)
@pytest.mark.one_in(3)
def test_one_right_after_another(kind):
    """On the grid, a first step whose current is the spikes of another neuron as they are."""
    net = nn.Sequential(nn.Linear(4, 6), kind(), kind(v_threshold=0.4), nn.Linear(6, 2))
    srp.convert_to_reversible(net)
    x, found = torch.rand(3, 4) * 4, []
    for context in (nullcontext(), switches.autograd(), nullcontext()):
        functional.reset_net(net)
        net.zero_grad()
        with context:
            out = net(x) + net(x) + net(x)
            out.square().sum().backward()
        found.append([out, *(p.grad for p in net.parameters())])
    assert all(all(map(torch.equal, one, found[0])) for one in found[1:])
