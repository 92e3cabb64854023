"""A budget: as many products are kept as it takes, and what can't be met is refused before the backward."""

import copy
import re
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import peak_of_step
import snn_reversible_plugin as srp
from peak_of_step import train
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.ops import allocations
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.tape import measured


def build():
    layers = []
    for inputs in (2, 16, 16, 16):
        layers += [layer.Conv2d(inputs, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode()]
    model = nn.Sequential(*layers, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10))
    functional.set_step_mode(model, "m")
    return model


class Stream(nn.Module):
    """Residual sums in floating point, which are rebuilt together."""

    def __init__(self):
        super().__init__()
        parts = layer.Conv2d(2, 16, 3, padding=1), layer.BatchNorm2d(16)
        self.stem = nn.Sequential(*parts)
        self.blocks = nn.ModuleList(
            nn.Sequential(neuron.LIFNode(), layer.Conv2d(16, 16, 3, padding=1), layer.BatchNorm2d(16))
            for _ in range(4)
        )
        self.head = nn.Sequential(layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10))
        functional.set_step_mode(self, "m")

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def run(model, x):
    model(x).square().sum().backward()


def step(model, x):
    train(run, model, x)
    return [parameter.grad.clone() for parameter in model.parameters()]


total = partial(peak_of_step.total, run)


def kept(model):
    (plan,) = settings_of(model).plans.by_first.values()
    return sum(plan.kept)


X = 4, 8, 2, 16, 16


@pytest.mark.slow
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


class Reversed(nn.Module):
    """A chain of reversible blocks, whose backward runs its branches again in its nodes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            layer.Conv2d(2, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode()
        )
        self.chain = srp.RevSSequence([srp.RevSBlock(branch(), branch()) for _ in range(2)])
        self.head = nn.Sequential(layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10))
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.head(self.chain(self.stem(x)))


def branch():
    return nn.Sequential(neuron.LIFNode(), layer.Conv2d(8, 8, 3, padding=1), layer.BatchNorm2d(8))


class Checkpointed(Stream):
    def forward(self, x):
        x = self.stem(x)
        for fire, *layers in self.blocks:
            x = x + checkpoint(nn.Sequential(*layers), fire(x), use_reentrant=False)
        return self.head(x)


class Loop(nn.Module):
    """More weights than a step takes beside them, and many nodes."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.node = nn.Linear(2 * 256, 512), nn.Linear(512, 10), neuron.LIFNode()

    def forward(self, x):
        return torch.stack([self.fc2(self.node(self.fc1(one.flatten(1)))) for one in x])


class Node(nn.Module):
    """A neuron of one's own, whose membrane is an attribute."""

    def forward(self, x):
        self.mem, spikes = 0.0, []
        for current in x:
            self.mem = self.mem + (current - self.mem) / 2
            spikes.append(torch.sigmoid(4 * self.mem - 2))
        return torch.stack(spikes)


def with_own_neurons():
    conv1, conv2 = layer.Conv2d(2, 16, 3, padding=1), layer.Conv2d(16, 16, 3, padding=1)
    head = layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10)
    model = nn.Sequential(conv1, Node(), neuron.LIFNode(), conv2, Node(), neuron.LIFNode(), *head)
    functional.set_step_mode(model, "m")
    return model


class OverTime(nn.Module):
    """A neuron of one's own, which charges by a product over time steps."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.eye(4)), nn.Parameter(-torch.ones(4, 1))
        self.fire = surrogate.ATan()

    def forward(self, x):
        return self.fire(torch.addmm(self.bias, self.weight, x.flatten(1))).view(x.shape)


def with_neurons_over_time():
    """Their products need what a rebuild computes for them."""
    layers = []
    for inputs in (2, 16, 16):
        layers += [layer.Conv2d(inputs, 16, 3, padding=1), layer.BatchNorm2d(16), OverTime()]
    head = layer.AvgPool2d(2), neuron.LIFNode(), layer.Flatten(), layer.Linear(16 * 64, 10)
    model = nn.Sequential(*layers, *head)
    functional.set_step_mode(model, "m")
    return model


def with_convolutions_in_series():
    def conv(inputs):
        return layer.Conv2d(inputs, 16, 3, padding=1)

    head = layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10)
    model = nn.Sequential(conv(2), neuron.LIFNode(), conv(16), conv(16), neuron.LIFNode(), *head)
    functional.set_step_mode(model, "m")
    return model


MAKES = build, Stream, with_own_neurons, with_neurons_over_time, Reversed, Checkpointed, Loop


@pytest.mark.one_in(2)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("part", [1.15, 1.4, 1000])
def test_what_is_foreseen_is_what_the_allocator_counts(make, part):
    stock, x = make(), torch.rand(X)
    needs = total(srp.convert_to_reversible(copy.deepcopy(stock)), x)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget=int(part * needs))
    step(model, x)
    taken = total(model, x)
    (plan,) = settings_of(model).plans.by_first.values()
    assert abs(plan.least / needs - 1) < 0.05
    assert abs(plan.peak / taken - 1) < 0.05
    assert taken <= part * needs


@pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows")
@pytest.mark.parametrize("make", [with_own_neurons, with_convolutions_in_series])
def test_membranes_that_come_from_a_kept_result_are_held_no_earlier(make):
    x, found = torch.rand(X), []
    for settings in ({}, {"budget": "1GiB"}):
        model = srp.convert_to_reversible(make(), **settings)
        step(model, x)
        step(model, x)
        model.zero_grad()
        functional.reset_net(model)
        with AllocationCounter() as counter:
            loss = model(x).square().sum()
            between = counter.live
            loss.backward()
            del loss
            found.append((between, counter.live))
    (plan,) = settings_of(model).plans.by_first.values()
    results = [bytes_of(one) for one, keeps in zip(plan.products, plan.kept, strict=True) if keeps]
    (between, after), (between_kept, after_kept) = found
    assert results
    assert between_kept <= between + sum(results)
    assert after_kept <= after


def bytes_of(product):
    """Of the result of a convolution with a padding of 1."""
    (batch, _, *size), (channels, *_), *_ = product[1]
    return 4 * batch * channels * size[0] * size[1]


def test_a_budget_below_what_was_measured_is_refused_with_the_bytes_that_it_takes():
    stock, x = build(), torch.rand(X)
    needs = total(srp.convert_to_reversible(copy.deepcopy(stock)), x)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget=int(0.9 * needs))
    step(model, x)  # the least that there must be is below
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"takes [\d,]+, with nothing kept") as refusal:
            step(model, x)
    takes = int(re.search(r"takes ([\d,]+)", str(refusal.value))[1].replace(",", ""))
    assert abs(takes / needs - 1) < 0.05


def no_backward(model, x):
    model(x)


def backward_that_raises(model, x):
    def fail(_gradient):
        raise KeyError("a user's hook")

    out = model(x)
    handle = model[0].weight.register_hook(fail)
    with pytest.raises(KeyError):
        out.sum().backward()
    handle.remove()
    model.zero_grad()


def part_of_a_backward(model, x):
    torch.autograd.grad(model(x).sum(), [model[-1].weight])


def profiled(model, x):
    with torch.autograd.profiler.profile():
        model(x).sum().backward()


def profiled_backward(model, x):
    out = model(x).sum()
    with torch.autograd.profiler.profile(profile_memory=True) as found:
        out.backward()
    assert any("convolution_backward" in event.name for event in found.function_events)


def with_two_losses(model, x):
    out = model(x)
    out.sum().backward(retain_graph=True)
    out.square().sum().backward()


@pytest.mark.parametrize(
    "first",
    [no_backward, backward_that_raises, part_of_a_backward, profiled, profiled_backward, with_two_losses],
)
def test_whatever_the_first_step_is_the_next_ones_train(first):
    stock, x = build(), torch.rand(X)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget="1GiB")
    for one in (stock, model):
        first(one, x)
        one.zero_grad()
        functional.reset_net(one)
    for _ in range(4):
        expected, found = step(stock, x), step(model, x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not torch.autograd._profiler_enabled()
    assert kept(model) == 4


def test_only_steps_that_are_measured_have_a_profiler_on(monkeypatch):
    started = []
    monkeypatch.setattr(measured, "start", lambda: started.append(1) or allocations.start())
    model, x = srp.convert_to_reversible(build(), budget="1GiB"), torch.rand(X)
    counts = []
    for _ in range(4):
        started.clear()
        step(model, x)
        counts.append(len(started))
    assert counts[0] > 10
    assert max(counts[1:3]) <= 1  # up to the first product, where a plan is found
    assert counts[3] == 0


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
