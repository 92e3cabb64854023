"""Converted snnTorch networks against stock: every type of the namespace, the tutorials, bytes held."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import snntorch
import torch
import torch.nn.functional as F
from snntorch import functional, surrogate, utils
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.modules.registry import StaysStock, reversible_type
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.snntorch import RevLapicque, RevLeaky, RevSynaptic, register
from snntorch_against_stock import (
    STATES,
    charged_fixture,  # noqa: F401
    equal,
    make,
    one_thread_fixture,  # noqa: F401
)

# The converter.

OTHERS = {
    "SLSTM": lambda: snntorch.SLSTM(4, 4, init_hidden=True),
    "SConv2dLSTM": lambda: snntorch.SConv2dLSTM(2, 2, 3, init_hidden=True),
    "LeakyParallel": lambda: snntorch.LeakyParallel(4, 4, beta=0.9),
    "StateLeaky": lambda: snntorch.StateLeaky(beta=0.9, channels=4, learn_beta=True),
    "LinearLeaky": lambda: snntorch.LinearLeaky(beta=0.9, in_features=4, out_features=4),
    "AssociativeLeaky": lambda: snntorch.AssociativeLeaky(4, 2, 2, 4),
    "DeltaLeaky": lambda: snntorch.DeltaLeaky(0.5, beta=0.9, init_hidden=True),
}
ABSTRACT = {"SpikingNeuron", "LIF"}
SINCE_1_0 = {"StateLeaky", "LinearLeaky", "AssociativeLeaky", "DeltaLeaky"}
TYPES = [
    pytest.param(name, marks=pytest.mark.skipif(not hasattr(snntorch, name), reason="new in snnTorch 1.0"))
    for name in [*STATES, *OTHERS]
]


def namespace() -> list[str]:
    register()
    return sorted(
        name
        for name, value in vars(snntorch).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and value.__module__.startswith("snntorch")
        and not name.startswith(("BatchNorm", "Graded"))
        and name not in ABSTRACT
    )


def test_every_type_of_the_namespace_is_answered_for() -> None:
    here, known = set(namespace()), {*STATES, *OTHERS}
    assert here <= known
    assert known - here in (set(), SINCE_1_0)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_converted_equals_stock(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(2, 2, 3, padding=1) if name == "SConv2dLSTM" else nn.Linear(4, 4)
            self.neuron = OTHERS[name]() if name in OTHERS else make(name, True, init_hidden=True)
            self.last = snntorch.Leaky(0.8, init_hidden=True)

        def forward(self, xs: Tensor) -> Tensor:
            whole = name in ("LeakyParallel", "StateLeaky", "LinearLeaky", "AssociativeLeaky")
            outs = [self.neuron(self.inner(x)) for x in ([xs] if whole else xs)]
            return torch.stack([self.last(out[0] if isinstance(out, tuple) else out) for out in outs])

    net = Net()
    other = srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock")
    xs = torch.randn(3, 2, 2, 5, 5) if name == "SConv2dLSTM" else torch.randn(3, 2, 4)
    found = []
    for one in (net, other):
        torch.manual_seed(11)
        out = one(xs)
        (out * torch.randn_like(out)).sum().backward()
        found.append([out.detach(), [p.grad for p in one.parameters()]])
    assert equal(*found)
    if name in STATES:
        assert other.neuron.treatment == "analytic step"
        assert other.neuron.arithmetic == "stock"
        assert isinstance(other.neuron, getattr(snntorch, name))
    else:
        assert type(other.neuron) is getattr(snntorch, name)
        with pytest.raises(StaysStock) as refusal:
            reversible_type(net.neuron)
        reasons = ("LSTM", "torch.nn.RNN", "whole sequence", "never reset")
        assert any(reason in str(refusal.value) for reason in reasons)


def test_an_unknown_subclass_stays_stock() -> None:
    class Own(snntorch.Leaky):
        pass

    assert reversible_type(Own(0.9)) is None


def test_register() -> None:
    register()
    assert snntorch.RevLeaky is RevLeaky
    assert snntorch.RevLapicque is RevLapicque
    assert snntorch.RevSynaptic is RevSynaptic


# Networks.


class Tutorial5(nn.Module):
    """The fully connected network of snnTorch's tutorial 5, its loop over time in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 1000)
        self.lif1 = snntorch.Leaky(beta=0.95)
        self.fc2 = nn.Linear(1000, 10)
        self.lif2 = snntorch.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spk_rec, mem_rec = [], []
        for _ in range(25):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def test_tutorial_5() -> None:
    net = Tutorial5()
    other = srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock")
    data, targets = torch.rand(16, 784), torch.randint(10, (16,))
    found = []
    for one in (net, other):
        optimizer = torch.optim.Adam(one.parameters(), lr=5e-4, betas=(0.9, 0.999))
        spk_rec, mem_rec = one(data)
        assert spk_rec.any()
        loss = sum(F.cross_entropy(mem, targets) for mem in mem_rec)
        loss.backward()
        optimizer.step()
        found.append([loss, [p.grad for p in one.parameters()], [p.detach() for p in one.parameters()]])
    assert equal(*found)


def tutorial_6() -> nn.Sequential:
    """The convolutional network of snnTorch's tutorial 6."""
    spike_grad = surrogate.fast_sigmoid(slope=25)
    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        snntorch.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True, output=True),
    )


def forward_pass(net: nn.Module, num_steps: int, data: Tensor) -> tuple[Tensor, Tensor]:
    mem_rec, spk_rec = [], []
    utils.reset(net)
    for _ in range(num_steps):
        spk_out, mem_out = net(data)
        spk_rec.append(spk_out)
        mem_rec.append(mem_out)
    return torch.stack(spk_rec), torch.stack(mem_rec)


def test_tutorial_6() -> None:
    net = tutorial_6()
    other = srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock")
    data, targets = torch.rand(4, 1, 28, 28) * 3, torch.randint(10, (4,))
    loss_fn = functional.ce_rate_loss()
    found, held = [], []
    for one in (net, other):
        snntorch.SpikingNeuron.instances = [m for m in one.modules() if isinstance(m, snntorch.Leaky)]
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2, betas=(0.9, 0.999))
        held.append(count_step(lambda one=one: loss_fn(forward_pass(one, 8, data)[0], targets))[0])
        optimizer.zero_grad()
        spk_rec, _ = forward_pass(one, 8, data)
        loss = loss_fn(spk_rec, targets)
        loss.backward()
        optimizer.step()
        found.append([loss, [p.grad for p in one.parameters()], [p.detach() for p in one.parameters()]])
    assert equal(*found)
    assert 2 * held[1] <= held[0]


def test_a_step_loop_holds_the_membrane_and_a_bit() -> None:
    class Net(nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(2)])
            self.neurons = nn.ModuleList([snntorch.Leaky(0.9, **settings) for _ in range(2)])
            self.head = nn.Linear(256, 10)

        def forward(self, xs: Tensor) -> Tensor:
            mems = [neuron.reset_mem() for neuron in self.neurons]
            outs = []
            for x in xs:
                for i, (layer, neuron) in enumerate(zip(self.layers, self.neurons, strict=True)):
                    x, mems[i] = neuron(layer(x), mems[i])
                outs.append(self.head(x))
            return torch.stack(outs)

    xs = (torch.rand(40, 32, 256) < 0.2).float()
    zero = {"reset_mechanism": "zero"}
    learned = {"learn_beta": True, "learn_threshold": True}
    for settings in ({}, zero, learned, zero | learned, {"reset_delay": False}):
        net = srp.convert_to_reversible(Net(**settings))
        held, _peak = count_step(lambda net=net: net(xs).square().mean())
        assert held / (2 * 32 * 256 * 40) <= 4.5
