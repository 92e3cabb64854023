"""A budget: as many products are kept as it takes, and what can't be met is refused before the backward."""

import copy
import gc
import re

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.reports.measure import AllocationCounter


def build():
    layers = []
    for inputs in (2, 16, 16, 16):
        layers += [layer.Conv2d(inputs, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode()]
    model = nn.Sequential(*layers, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10))
    functional.set_step_mode(model, "m")
    return model


def step(model, x):
    functional.reset_net(model)
    model.zero_grad()
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def total(model, x):
    """The allocator's peak of a step, what lives anyway included."""
    step(model, x)
    model.zero_grad()
    gc.collect()
    with AllocationCounter() as counter:
        functional.reset_net(model)
        model(x).square().sum().backward()
        peak = counter.peak
    lives = (x, *model.parameters(), *model.buffers())
    return peak + sum(tensor.nbytes for tensor in lives)


def kept(model):
    (plan,) = settings_of(model).plans.by_first.values()
    return sum(plan.kept)


X = 4, 8, 2, 16, 16


def test_more_budget_keeps_more_and_none_is_overdrawn():
    stock, x = build(), torch.rand(X)
    expected = step(copy.deepcopy(stock), x)
    needs = total(srp.convert_to_reversible(copy.deepcopy(stock)), x)
    found = []
    for more in (1.05, 1.3, 1.6, 3):
        budget = int(more * needs)
        model = srp.convert_to_reversible(copy.deepcopy(stock), budget=budget)
        step(model, x)
        model.load_state_dict(stock.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(expected, step(model, x), strict=True))
        assert total(model, x) <= budget
        found.append(kept(model))
    assert found == sorted(found)
    assert found[0] < found[-1] == 4


def test_a_budget_that_can_t_be_met_is_refused_before_the_backward():
    stock, x = build(), torch.rand(X)
    needs = total(srp.convert_to_reversible(copy.deepcopy(stock)), x)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget="100 KiB")
    with pytest.raises(RuntimeError, match=r"budget=102,400 bytes: .* at least [\d,]+") as refusal:
        model(x)
    least = int(re.search(r"at least ([\d,]+)", str(refusal.value))[1].replace(",", ""))
    assert 0.5 * needs < least <= needs
    assert "largest_batch" in str(refusal.value)
    step(srp.restore(model), x)


def test_the_tape_alone_takes_a_budget():
    model, x = build(), torch.rand(X)
    for _ in range(2):
        functional.reset_net(model)
        with srp.reversible(model, budget="1GiB"):
            loss = model(x).square().sum()
        with AllocationCounter() as counter:
            loss.backward()
        last = counter.peak
    functional.reset_net(model)
    with srp.reversible(model, mode="memory"):
        loss = model(x).square().sum()
    with AllocationCounter() as counter:
        loss.backward()
    assert last < counter.peak
    with pytest.raises(RuntimeError, match="budget="), srp.reversible(model, budget=1000):
        model(x)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"budget": "much"}, "no number of bytes"),
        ({"budget": "1GiB", "mode": "speed"}, "leave one of them"),
    ],
)
def test_what_is_no_budget_is_refused(settings, why):
    model = build()
    with pytest.raises(ValueError, match=why):
        srp.convert_to_reversible(model, **settings)
    with pytest.raises(ValueError, match=why), srp.reversible(model, **settings):
        pass
    assert type(model[2]) is neuron.LIFNode
