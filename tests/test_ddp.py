"""DistributedDataParallel with two gloo processes: converted trains as stock does."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import snn_reversible_plugin as srp
from two_processes import together

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer  # noqa: E402


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        neuron.LIFNode(),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(8 * 16, 32),
        neuron.ParametricLIFNode(),
        layer.Linear(32, 4),
    )
    functional.set_step_mode(model, "m")
    return model


def train(rank):
    parameters = []
    for convert in (False, True):
        model = srp.convert_to_reversible(make()) if convert else make()
        ddp = DistributedDataParallel(model, static_graph=False)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(10 + rank)
        for _ in range(3):
            optimizer.zero_grad()
            functional.reset_net(model)
            ddp(torch.rand(4, 3, 2, 8, 8) * 3).square().sum().backward()
            optimizer.step()
        parameters.append([p.detach().clone() for p in model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    moved = not torch.equal(parameters[0][0], next(make().parameters()))
    return same, moved


def test_two_processes(tmp_path):
    assert together(tmp_path, train) == [(True, True), (True, True)]
