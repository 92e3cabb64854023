"""Which grid a neuron gets: its bits follow its threshold, and are fixed at the conversion."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import convert, grid
from snn_reversible_plugin.modules.swap import ON_GRID
from snntorch_against_stock import one_thread_fixture  # noqa: F401


class Loop(nn.Module):
    """Currents on the scale of the threshold, in a loop that trains."""

    def __init__(self, threshold: float, framework: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 16), nn.Linear(16, 4)
        self.fc2.weight.data.mul_(3)
        self.threshold = threshold
        if framework == "snntorch":
            self.lif1, self.lif2 = (snntorch.Leaky(0.9, threshold=threshold) for _ in range(2))
        else:
            self.lif1, self.lif2 = (
                neuron.LIFNode(decay_input=False, v_threshold=threshold, v_reset=None) for _ in range(2)
            )

    def forward(self, x_seq: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.lif1, neuron.BaseNode):
            functional.reset_net(self)
        else:
            mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spikes, membranes = [], []
        for x in x_seq:
            if isinstance(self.lif1, neuron.BaseNode):
                spikes.append(self.lif2(self.fc2(self.lif1(self.fc1(x) * self.threshold)) * self.threshold))
                membranes.append(self.lif2.v)
            else:
                spk, mem1 = self.lif1(self.fc1(x) * self.threshold, mem1)
                spk, mem2 = self.lif2(self.fc2(spk) * self.threshold, mem2)
                spikes.append(spk)
                membranes.append(mem2)
        return torch.stack(spikes), torch.stack(membranes)


def train(net: Loop, x_seq: Tensor) -> Tensor:
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.05), []
    for _ in range(3):
        spikes, membranes = net(x_seq)
        losses.append((spikes.mean() - 0.2).square() + (membranes / net.threshold).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("error:.*goes on in stock's arithmetic")
@pytest.mark.parametrize("framework", ["snntorch", "spikingjelly"])
def test_training_is_as_near_to_stock_whatever_the_threshold(framework: str) -> None:
    """In thresholds. Where no spike flips, that is: a flip is as far from stock on any grid."""
    distance = {}
    for threshold in (1.0, 0.01, 20.0, 100.0):
        torch.manual_seed(0)
        net, x_seq = Loop(threshold, framework), torch.randn(20, 8, 5) * 4
        stock = copy.deepcopy(net)
        srp.convert_to_reversible(net)
        (spikes, membranes), (of_stock, expected) = net(x_seq), stock(x_seq)
        same = (spikes == of_stock).all(0)
        assert spikes.any() and same.sum() > 24  # of 32 neurons
        distance[threshold] = float((membranes - expected)[:, same].abs().median()) / threshold
        reset(net), reset(stock)
        assert torch.allclose(train(net, x_seq), train(stock, x_seq), rtol=0.05)
        assert convert.is_on_grid(net.lif1) and not net.lif1.off_grid_reason
        assert grid.limit(net.lif1.bits_in_use) > 128 * threshold
    assert 0 < max(distance.values()) < 1e-3
    assert all(one < 16 * distance[1.0] for one in distance.values()), distance


def reset(net: Loop) -> None:
    """SpikingJelly's neurons can't be copied with a graph on them, nor start anew without it."""
    if isinstance(net.lif1, neuron.BaseNode):
        functional.reset_net(net)


def bits_of(**settings: Any) -> int:
    net = srp.convert_to_reversible(nn.Sequential(nn.Identity(), snntorch.Leaky(0.9, **settings)))
    return net[1].bits_in_use


def test_bits_follow_thresholds_and_resets() -> None:
    assert [bits_of(threshold=one) for one in (0.01, 1.0, 1.9, 20.0, 127.0)] == [20, 16, 16, 12, 10]
    assert bits_of(threshold=-20.0) == 12
    assert bits_of(threshold=0.0) == 16
    assert bits_of(threshold=torch.tensor([0.1, 3.0, 70.0])) == 10
    for node, bits in ((neuron.IFNode(20.0), 12), (neuron.IFNode(1.0, -60.0), 11), (neuron.IFNode(), 16)):
        assert srp.convert_to_reversible(nn.Sequential(node))[0].bits_in_use == bits


class Readout(nn.Module):
    """Its membrane is the answer, under a threshold that it never comes near."""

    def __init__(self, framework: str, threshold: float) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        if framework == "snntorch":
            self.lif = snntorch.Leaky(0.9, threshold=threshold, init_hidden=True, output=True)
        else:
            self.lif = neuron.LIFNode(v_threshold=threshold)

    def forward(self, x_seq: Tensor) -> Tensor:
        self.lif.reset() if isinstance(self.lif, neuron.BaseNode) else self.lif.reset_mem()
        membranes = []
        for x in x_seq:
            self.lif(self.fc(x))
            membranes.append(self.lif.v if isinstance(self.lif, neuron.BaseNode) else self.lif.mem)
        return torch.stack(membranes)


@pytest.mark.parametrize("framework", ["snntorch", "spikingjelly"])
@pytest.mark.parametrize("threshold", [1000.0, 20000.0, 1e9])
def test_a_threshold_that_nothing_reaches_rounds_no_membrane(framework: str, threshold: float) -> None:
    torch.manual_seed(0)
    net, x_seq = Readout(framework, threshold), torch.randn(7, 3, 5)
    converted = srp.convert_to_reversible(copy.deepcopy(net))
    seen = []
    for model in (net, converted):
        out = model(x_seq)
        out.square().sum().backward()
        seen.append([out, model.fc.weight.grad, model.fc.bias.grad])
    assert all(map(torch.equal, *seen))
    reason = convert.off_grid_reason("lif", converted.lif, convert.settings_of(converted))
    assert f"is {threshold:g}: multiples of 2^-" in reason


@pytest.mark.parametrize("framework", ["snntorch", "spikingjelly"])
def test_bits_of_ones_own_put_a_neuron_on_the_grid_whatever_its_threshold(framework: str) -> None:
    net = Readout(framework, 300.0)
    net.lif.grid_bits = 8
    assert srp.convert_to_reversible(net).lif.bits_in_use == 8


def test_bits_are_fixed_until_the_next_conversion() -> None:
    net = srp.convert_to_reversible(
        nn.Sequential(nn.Identity(), snntorch.Leaky(0.9, learn_threshold=True, init_hidden=True))
    )
    lif = net[1]
    with torch.no_grad():
        lif.threshold.fill_(20.0)
    with torch.no_grad():
        net(torch.rand(2, 3))
    assert lif.bits_in_use == 16 and copy.deepcopy(net)[1].bits_in_use == 16
    net[1].reset_mem()
    lif.grid_bits = 14
    assert lif.bits_in_use == 14
    del lif.grid_bits
    assert srp.convert_to_reversible(net)[1].bits_in_use == 12
    srp.restore(net)
    assert ON_GRID.of(lif) is None


def of_spikes(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return outputs[0].sum() + outputs[1].square().sum()


def test_reports_say_which_grid_it_is() -> None:
    net = srp.convert_to_reversible(Loop(20.0, "snntorch"))
    x_seq = torch.randn(3, 2, 5)
    report = srp.verify(net, x_seq, loss=of_spikes, repeats=1)
    assert report.grid_bits == {"lif1": 12, "lif2": 12}
    assert report.to_dict()["grid_bits"]["lif1"] == 12
    rows = {row.name: row for row in srp.memory_report(net, x_seq, loss=of_spikes).modules}
    assert rows["lif1"].grid_bits == 12 and rows["fc1"].grid_bits is None
