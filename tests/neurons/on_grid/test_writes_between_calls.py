"""States that a user writes to between two calls: reinforcement learning zeroes the ended episodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import convert
from snn_reversible_plugin.reports.measure import count_step
from snntorch_against_stock import equal, make, one_thread_fixture  # noqa: F401


class Net(nn.Sequential):
    """Hidden states, one call a step."""

    def states(self) -> list[tuple[Any, str]]:
        names = ("mem", "syn", "syn_exc", "v")
        return [(one, name) for one in (self[1], self[3]) for name in names if hasattr(one, name)]


def network(kind: str, features: int = 4, **settings: Any) -> Net:
    def node() -> nn.Module:
        if kind == "LIFNode":
            return neuron.LIFNode(**settings)
        return make(kind, init_hidden=True, **settings)

    return Net(nn.Linear(5, features), node(), nn.Linear(features, 4), node())


def run(net: Net, x_seq: Tensor, write: str) -> list[Any]:
    utils.reset(net) if hasattr(net[1], "mem") else functional.reset_net(net)
    x_seq, loss = x_seq.clone().requires_grad_(), torch.zeros(())
    for t, x in enumerate(x_seq):
        loss = loss + (t + 1) * net(x).square().sum()
        for module, name in net.states() if t % 3 == 1 else ():
            state = getattr(module, name)
            with torch.no_grad():
                if write == "zero":
                    state[1] = 0
                elif write == "scale":
                    state.mul_(0.5)
                else:
                    state.copy_(torch.ones_like(state))
            loss = loss + state.sum()
    loss.backward()
    found = [loss.detach(), x_seq.grad, *(p.grad for p in net.parameters())]
    net.zero_grad()
    return found


GRID = [
    ("Leaky", {}), ("Leaky", {"reset_mechanism": "zero", "learned": True}), ("Synaptic", {"learned": True}),
    ("Alpha", {}), ("Leaky", {"reset_delay": False}), ("LIFNode", {}), ("LIFNode", {"v_reset": None}),
]  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("write", ["zero", "scale", "copy"])
@pytest.mark.parametrize(("kind", "settings"), GRID)
def test_on_the_grid(kind: str, settings: dict[str, Any], write: str) -> None:
    net, x_seq = srp.convert_to_reversible(network(kind, **settings)), torch.randn(9, 3, 5) * 2
    twin = copy.deepcopy(net)
    with convert.differentiated(twin):
        expected = run(twin, x_seq, write)
    assert equal(run(net, x_seq, write), expected)
    assert convert.is_on_grid(net[1]) and not net[1].off_grid_reason


@pytest.mark.parametrize("write", ["zero", "scale", "copy"])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
def test_in_stock_arithmetic(kind: str, write: str) -> None:
    net, x_seq = network(kind), torch.randn(9, 3, 5) * 2
    expected = run(copy.deepcopy(net), x_seq, write)
    assert equal(run(srp.convert_to_reversible(net, arithmetic="stock"), x_seq, write), expected)


def test_a_call_a_step_holds_bits() -> None:
    net, held = srp.convert_to_reversible(network("Leaky", 128)), []

    def loss(steps: int) -> Tensor:
        utils.reset(net)
        return torch.stack([net(x).sum() for x in torch.rand(steps, 32, 5)]).sum()

    for steps in (8, 24):
        held.append(count_step(lambda steps=steps: loss(steps))[0])
    assert (held[1] - held[0]) / (16 * 32 * 128) < 0.6


@pytest.mark.filterwarnings("ignore:.*goes on in stock's arithmetic")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_states_that_are_no_floating_point_numbers_are_stocks(dtype: torch.dtype) -> None:
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        lif, mem = snntorch.Leaky(0.9), (torch.rand(3, 4) * 2).to(dtype)
        if converted:
            srp.convert_to_reversible(lif)
        x_seq, outputs = (torch.randn(5, 3, 4) * 2).requires_grad_(), []
        for x in x_seq:
            spikes, mem = lif(x, mem)
            outputs += [spikes, mem]
        sum(out.square().sum() for out in outputs).backward()
        found.append([*(out.detach() for out in outputs), x_seq.grad])
    assert equal(*found)
