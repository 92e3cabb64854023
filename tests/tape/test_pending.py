"""A budget foresees a step that starts from what an earlier one has left: membranes, outputs, gradients."""

import copy
import re

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from peak_of_step import total, train
from snn_reversible_plugin.convert import settings_of


class Detaching(neuron.LIFNode):
    """SLTT's: no gradient goes from one step to the one before."""

    def single_step_forward(self, x):
        v = self.v.detach() if isinstance(self.v, torch.Tensor) else self.v
        self.v = v * (1 - 1 / self.tau) + x
        spike = self.surrogate_function(self.v - self.v_threshold)
        self.v = self.v - spike.detach() * self.v_threshold
        return spike


def build(node, step_mode):
    layers = []
    for inputs in (2, 16, 16):
        layers += [layer.Conv2d(inputs, 16, 3, padding=1), layer.BatchNorm2d(16), node()]
    model = nn.Sequential(*layers, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10))
    functional.set_step_mode(model, step_mode)
    return model


def online(model, x):
    """A backward at each time step."""
    for one in x:
        model(one).square().sum().backward()


def in_parts(model, x):
    """Truncated: a backward for some steps, in one call."""
    for part in x.split(4):
        model(part).square().sum().backward()
        functional.detach_net(model)


def in_parts_and_steps(model, x):
    """Truncated: a backward for some steps, in a call for each."""
    for part in x.split(2):
        sum(model(one) for one in part).square().sum().backward()
        functional.detach_net(model)


def accumulating(model, x):
    """Several small batches for one step of the optimizer."""
    for part in x.split(4):
        functional.reset_net(model)
        model(part).square().sum().backward()


def beside_the_last_output(model, x):
    """Which is held for comparison while the next one is computed and differentiated."""
    last = 0
    for part in x.split(4):
        functional.reset_net(model)
        out = model(part)
        (out - last).square().sum().backward()
        last = out.detach()


def build_for_pictures():
    """Its output is as large as anything in it."""
    model = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(), layer.Conv2d(8, 8, 3, padding=1)
    )
    functional.set_step_mode(model, "m")
    return model


def build_of_weights():
    """Its gradients take more than all else."""
    wide = layer.Linear(512, 1024), neuron.LIFNode(), layer.Linear(1024, 1024), neuron.LIFNode()
    model = nn.Sequential(layer.Flatten(), *wide, layer.Linear(1024, 10))
    functional.set_step_mode(model, "m")
    return model


CASES = {
    "online": (online, lambda: build(Detaching, "s")),
    "in parts": (in_parts, lambda: build(neuron.LIFNode, "m")),
    "in parts and steps": (in_parts_and_steps, lambda: build(neuron.LIFNode, "s")),
    "accumulating": (accumulating, build_of_weights),
    "outputs": (beside_the_last_output, build_for_pictures),
}
X = 16, 8, 2, 16, 16


@pytest.mark.parametrize("name", CASES)
def test_what_is_foreseen_is_what_the_allocator_counts(name):
    run, make = CASES[name]
    stock, x = make(), torch.rand(X)
    needs = total(run, srp.convert_to_reversible(copy.deepcopy(stock)), x)
    for part in (1.2, 1000):
        model = srp.convert_to_reversible(copy.deepcopy(stock), budget=int(part * needs))
        other = srp.convert_to_reversible(copy.deepcopy(stock), mode="memory")
        for one in (model, other):
            train(run, one, x)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        taken = total(run, model, x)
        (plan,) = settings_of(model).plans.by_first.values()
        assert abs(plan.least / needs - 1) < 0.05
        assert abs(plan.peak / taken - 1) < 0.05
        assert taken <= part * needs
        assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("name", CASES)
def test_a_budget_that_such_a_step_does_not_meet_is_refused(name):
    run, make = CASES[name]
    x = torch.rand(X)
    needs = total(run, srp.convert_to_reversible(make()), x)
    model = srp.convert_to_reversible(make(), budget=int(0.93 * needs))

    def train_twice():
        train(run, model, x)
        train(run, model, x)

    with pytest.raises(RuntimeError, match=r"takes [\d,]+, with nothing kept") as refusal:
        train_twice()
    takes = int(re.search(r"takes ([\d,]+)", str(refusal.value))[1].replace(",", ""))
    assert 0.93 * needs < takes < 1.05 * needs


def test_a_script_that_leaves_more_with_each_step_is_not_measured_for_ever():
    model, x = srp.convert_to_reversible(build_for_pictures(), budget="1GiB"), torch.rand(X)
    plans, outs = settings_of(model).plans, []
    for _ in range(8):
        functional.reset_net(model)
        outs.append(model(x))
        outs[-1].square().sum().backward()
    assert not plans.pending
    assert not plans.measuring
