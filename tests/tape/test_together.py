"""A network that is called several times before one backward, within a budget: all its step is measured."""

import copy
import re
import threading

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import snn_reversible_plugin as srp
from peak_of_step import total, train
from snn_reversible_plugin.convert import settings_of


def build(step_mode="s"):
    layers = []
    for inputs in (2, 16, 16, 16):
        layers += [layer.Conv2d(inputs, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode()]
    model = nn.Sequential(*layers, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(16 * 64, 10))
    functional.set_step_mode(model, step_mode)
    return model


def once_a_step(model, x):
    loss = sum(model(one) for one in x).square().sum()
    loss.backward()


def two_calls(model, x):
    first = model(x[0])
    functional.reset_net(model)
    (first - model(x[1])).square().sum().backward()


def two_backwards(model, x):
    out = sum(model(one) for one in x)
    out.square().sum().backward(retain_graph=True)
    out.sum().backward()


def truncated(model, x):
    for part in x.split(2):
        sum(model(one) for one in part).square().sum().backward()
        functional.detach_net(model)


def in_contexts(model, x):
    outs = []
    for one in x:
        with srp.reversible(model, budget=in_contexts.budget):
            outs.append(model(one))
    sum(outs).square().sum().backward()


def step(run, model, x):
    train(run, model, x)
    return [parameter.grad.clone() for parameter in model.parameters()]


RUNS = once_a_step, two_calls, two_backwards, truncated
X = 16, 8, 2, 16, 16


@pytest.mark.parametrize("run", RUNS)
def test_a_budget_below_what_the_first_step_took_is_refused_and_others_train_as_without(run):
    stock, x = build(), torch.rand(X)
    needs = total(run, srp.convert_to_reversible(copy.deepcopy(stock)), x)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget=int(1.1 * needs))
    other = srp.convert_to_reversible(copy.deepcopy(stock), mode="memory")
    for _ in range(3):
        expected, found = step(run, other, x), step(run, model, x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not torch.autograd._profiler_enabled()
    assert total(run, model, x) <= 1.1 * needs
    (plan,) = settings_of(model).plans.by_first.values()
    assert abs(plan.peak / needs - 1) < 0.05

    model = srp.convert_to_reversible(copy.deepcopy(stock), budget=int(0.9 * needs))
    if run is not truncated:  # where the second part follows a backward
        step(run, model, x)
    with pytest.raises(RuntimeError, match=r"takes [\d,]+, with nothing kept") as refusal:
        step(run, model, x)
    takes = int(re.search(r"takes ([\d,]+)", str(refusal.value))[1].replace(",", ""))
    assert abs(takes / needs - 1) < 0.05
    with pytest.raises(RuntimeError, match="with nothing kept"):
        step(run, model, x)
    step(run, srp.restore(model), x)


def test_states_that_are_copied_between_two_calls_count_once():
    """They are a third of what the step takes, and are let go of while the next call runs."""
    stock, x = build(), torch.rand(X)
    needs = total(once_a_step, srp.convert_to_reversible(copy.deepcopy(stock)), x)
    model = srp.convert_to_reversible(stock, budget="1GiB")
    for _ in range(2):
        step(once_a_step, model, x)
    (plan,) = settings_of(model).plans.by_first.values()
    assert abs(plan.peak / needs - 1) < 0.02


def test_contexts_are_measured_together():
    model, x = build(), torch.rand(X)
    in_contexts.budget = "1GiB"
    needs = total(in_contexts, model, x)
    in_contexts.budget = int(0.9 * needs)
    step(in_contexts, model, x)
    with pytest.raises(RuntimeError, match=r"takes [\d,]+, with nothing kept"):
        step(in_contexts, model, x)
    assert not torch.autograd._profiler_enabled()


def test_a_forward_that_raises_in_between_leaves_nothing_on():
    stock, x = build(), torch.rand(X)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget="1GiB")
    other = srp.convert_to_reversible(stock, mode="memory")
    for one in (other, model):
        functional.reset_net(one)
        outs = [one(x[0]), one(x[1])]
        with pytest.raises(RuntimeError, match="channels"):
            one(torch.rand(8, 3, 16, 16))
        assert not torch.autograd._profiler_enabled()
        sum(outs).sum().backward()
    for _ in range(3):
        expected, found = step(once_a_step, other, x), step(once_a_step, model, x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not settings_of(model).plans.by_first  # what such a step takes says nothing of the next ones


def on_another_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


class Seen(TorchDispatchMode):
    """Whether a profiler is on while operations run."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(torch.autograd._profiler_enabled())
        return func(*args, **(kwargs or {}))


def test_another_thread_is_no_part_of_the_step():
    """It calls the network while the first step is under way, and so is no call of that."""
    stock, x = build(), torch.rand(X)
    model = srp.convert_to_reversible(copy.deepcopy(stock), budget="1GiB")
    other = srp.convert_to_reversible(stock, mode="memory")

    def run(model, x):
        outs, enabled = [model(x[0])], []
        functional.reset_net(model)
        outs.append(model(x[1]))

        def look():
            with Seen(enabled):
                functional.reset_net(model)
                model(x[2]).sum().backward()

        on_another_thread(look)
        sum(outs).square().sum().backward()
        assert not any(enabled)

    for _ in range(2):
        expected, found = step(run, other, x), step(run, model, x)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    (plan,) = settings_of(model).plans.by_first.values()
    assert plan.peak is not None


def test_what_two_threads_have_under_way_is_not_mixed_up():
    """Each has a call whose backward is to come; the one's second call is no second call of the other's."""
    model, x = srp.convert_to_reversible(build(), budget="1GiB"), torch.rand(X)
    first, go = threading.Event(), threading.Event()

    def other():
        outs = [model(x[0])]
        first.set()
        go.wait()
        outs.append(model(x[1]))
        sum(outs).sum().backward()

    thread = threading.Thread(target=other)
    thread.start()
    first.wait()
    functional.reset_net(model)
    out = model(x[0])
    plans = settings_of(model).plans
    functional.reset_net(model)
    go.set()
    thread.join()
    assert plans.together is not None
    assert not plans.together.is_here
    out.sum().backward()
