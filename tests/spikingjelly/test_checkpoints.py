"""A checkpoint around layers that nothing resets inside runs them again from what the first run left."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

import snn_reversible_plugin as srp

NEURONS = {
    "IF": (neuron.IFNode, {}),
    "LIF, soft, detached": (neuron.LIFNode, {"tau": 1.7, "v_reset": None, "detach_reset": True}),
    "PLIF": (neuron.ParametricLIFNode, {}),
    "an unfused surrogate": (neuron.LIFNode, {"surrogate_function": surrogate.Erf()}),
    "v_seq stored": (neuron.LIFNode, {"store_v_seq": True}),
}


def gradients(net, x_seq, step_mode):
    functional.reset_net(net)
    net.zero_grad()
    x_seq = x_seq.clone().requires_grad_()
    calls = [x_seq] if step_mode == "m" else x_seq
    # Called by its children, as it is, so that no conversion of the whole sees the call.
    outputs = [checkpoint_sequential(net, 2, x, use_reentrant=False) for x in calls]
    sum((out - 0.5).square().sum() for out in outputs).backward()
    return [*outputs, x_seq.grad, *(parameter.grad for parameter in net.parameters())]


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("features", [8, 1])
def test_gradients_are_those_of_stock(name, step_mode, features):
    kind, settings = NEURONS[name]
    if step_mode == "s":
        settings = {key: value for key, value in settings.items() if key != "store_v_seq"}
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(6, features), kind(**settings), layer.Linear(features, features), kind(**settings)
    )
    functional.set_step_mode(net, step_mode)
    x_seq = torch.rand(4, 1, 6) * 5
    converted = srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock")
    stock, ours = (gradients(one, x_seq, step_mode) for one in (net, converted))
    assert all(map(torch.equal, stock, ours)) and any(g.any() for g in stock[-2:])
