"""snnTorch neurons under settings, autograd features and states as users treat them, against stock."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
from snntorch import surrogate, utils
from snntorch.functional.quant import state_quant
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.registry import reversible_type
from snn_reversible_plugin.snntorch import RevLapicque, RevLeaky, RevSynaptic
from snntorch_against_stock import (
    RESETS,
    STATES,
    assert_same,
    attributes,
    charged_fixture,  # noqa: F401
    converted,
    equal,
    inputs,
    make,
    one_thread_fixture,  # noqa: F401
    trajectory,
)

# Settings.


@pytest.mark.one_in(2)
@pytest.mark.parametrize("delay", [True, False], ids=["delayed", "undelayed"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_graded_spikes(learned: bool, delay: bool) -> None:
    for factor, reset in itertools.product((1.0, 0.3, torch.tensor([1.0]), torch.rand(4)), RESETS):
        neuron = snntorch.Leaky(
            0.9,
            graded_spikes_factor=factor,
            learn_graded_spikes_factor=learned,
            reset_mechanism=reset,
            reset_delay=delay,
        )
        assert_same(neuron, inputs(4, 3, 4))


def test_inhibition() -> None:
    with pytest.warns(UserWarning, match="unstable"):
        neuron = snntorch.Leaky(0.9, inhibition=True, learn_beta=True, learn_threshold=True)
    assert_same(neuron, inputs(4, 3, 4))


@pytest.mark.parametrize("kind", STATES)
def test_state_quant_runs_stocks_step(kind: str, charged: list[str]) -> None:
    neuron = make(kind, True, state_quant=state_quant(num_bits=4, uniform=True))
    assert reversible_type(neuron).treatment == "stock step, replayed from its states"
    twin = assert_same(neuron, inputs(4, 3, 4))
    assert isinstance(twin, getattr(snntorch, kind))
    assert not charged


def test_surrogate_disable() -> None:
    for learned in (False, True):
        assert_same(make("Leaky", learned, surrogate_disable=True), inputs(4, 3, 4))


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 0.7},
        {"beta": 0.7, "R": 2.0},
        {"beta": 0.7, "C": 2.0},
        {"R": torch.tensor(2), "C": torch.tensor(3)},
        {"R": 1.0, "C": 2.0, "per_neuron": (torch.rand(4) + 1, torch.rand(4) + 1)},
        {"R": 1.0, "C": 2.0, "time_step": 0.5},
    ],
    ids=["beta", "beta R", "beta C", "integers", "each neuron", "time_step"],
)
def test_lapicque_constants(given: dict[str, Any], charged: list[str]) -> None:
    scalars = {name: value for name, value in given.items() if name != "per_neuron"}
    for reset in RESETS:
        neuron = snntorch.Lapicque(**scalars, learn_threshold=True, reset_mechanism=reset)
        if "per_neuron" in given:
            neuron.R, neuron.C = given["per_neuron"]
        assert_same(neuron, inputs(4, 3, 4))
    assert charged


def test_lapicque_whose_constants_are_learned_runs_stocks_step(charged: list[str]) -> None:
    neuron = snntorch.Lapicque(beta=0.7, learn_beta=True)
    assert reversible_type(neuron).treatment == "stock step, replayed from its states"
    x, w = torch.randn(3, 4), torch.randn(3, 4)
    gradients = []
    for cls in (type(neuron), reversible_type(neuron)):
        one = snntorch.Lapicque(beta=0.7, learn_beta=True)
        one.__class__ = cls
        with tape.recording():
            spk, mem = one(x.clone().requires_grad_())
        ((spk + mem) * w).sum().backward()
        gradients.append(one.beta.grad)
    assert equal(*gradients)
    assert not charged


def test_alpha_with_a_learned_beta_runs_stocks_step(charged: list[str]) -> None:
    for reset in RESETS:
        assert_same(make("Alpha", True, learn_beta=True, reset_mechanism=reset), inputs(4, 3, 4))
    assert not charged


def test_settings_changed_later() -> None:
    neuron = make("Leaky", True)
    neuron.reset_mechanism = "zero"  # in snnTorch 1.0 this changes the reset without delay alone
    assert_same(neuron, inputs(4, 3, 4))
    neuron.reset_delay = False
    assert_same(neuron, inputs(4, 3, 4))
    neuron.spike_grad = torch.sigmoid
    assert_same(neuron, inputs(4, 3, 4))
    neuron.load_state_dict(make("Leaky", True, reset_mechanism="none").state_dict())
    assert_same(neuron, inputs(4, 3, 4))


@pytest.mark.parametrize("where", ["subclass", "instance"])
@pytest.mark.parametrize("method", ["fire", "mem_reset", "_base_state_function"])
@pytest.mark.parametrize("graph", [False, True])
def test_overridden_methods_are_called(method: str, where: str, graph: bool) -> None:
    """Also one that reads the neuron's states, and a reset that has a gradient."""

    def changed(self: Any, value: Tensor) -> Tensor:
        if graph:
            return getattr(snntorch.Leaky, method)(self, value) * self.mem.mean()
        return getattr(snntorch.Leaky, method)(self, value) * 0.5

    results = []
    for base in (snntorch.Leaky, RevLeaky):
        if where == "subclass":
            neuron = type("Own", (base,), {method: changed})(0.9, learn_beta=True)
        else:
            neuron = base(0.9, learn_beta=True)
            setattr(neuron, method, changed.__get__(neuron))
        torch.manual_seed(4)
        results.append(trajectory(neuron, inputs(4, 3, 4)))
    assert equal(*results)


# Autograd.


def test_the_gradient_of_a_membrane_contains_what_comes_through_its_spikes() -> None:
    for kind, reset in itertools.product(STATES, RESETS):
        neuron = make(kind, True, reset_mechanism=reset)
        found = []
        for one in (neuron, converted(neuron)):
            torch.manual_seed(6)
            state: tuple[Tensor, ...] = ()
            states, loss = [], torch.zeros(())
            for x in inputs(3, 5, 4):
                out = one(x.requires_grad_(), *state)
                state = out[-STATES[kind] :]
                states += [s for s in state if s.requires_grad]
                loss = loss + (out[0] * torch.randn(5, 4)).sum() + (out[-1] * torch.randn(5, 4)).sum()
            for s in states:
                s.retain_grad()
            partial = torch.autograd.grad(loss, states, retain_graph=True, allow_unused=True)
            loss.backward()
            found.append([list(partial), [s.grad for s in states]])
        assert equal(*found), (kind, reset)


def test_several_backward_passes() -> None:
    neuron = make("Leaky", True, reset_mechanism="zero")
    found = []
    for one, context in ((neuron, nullcontext()), (converted(neuron), tape.recording())):
        torch.manual_seed(7)
        x = torch.randn(5, 4).requires_grad_()
        with context:
            spk, mem = one(x * 1, torch.randn(5, 4))
            spk, mem = one(x * 2, mem)
        spk.sum().backward(retain_graph=True)
        (mem * 2).sum().backward(retain_graph=True)
        (spk + mem).sum().backward()
        found.append([x.grad, *[p.grad for p in one.parameters()]])
        with pytest.raises(RuntimeError, match="second time"):
            mem.sum().backward()
    assert equal(*found)


def test_double_backward_is_refused() -> None:
    x = torch.randn(5, 4).requires_grad_()
    spk, mem = RevLeaky(0.9)(x, torch.randn(5, 4).requires_grad_())
    (grad,) = torch.autograd.grad((spk * mem).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_changes_in_place_before_the_backward() -> None:
    def run(neuron: nn.Module, change: str) -> Tensor:
        torch.manual_seed(8)
        x = torch.randn(5, 4).requires_grad_()
        spk, mem = neuron(x, torch.randn(5, 4))
        with torch.no_grad():
            target = mem if change == "mem" else getattr(neuron, change)
            target.mul_(0.5)
        (spk * torch.randn(5, 4)).sum().backward()
        assert x.grad is not None
        return x.grad

    for change in ("mem", "threshold"):
        expected = run(snntorch.Leaky(0.9), change)
        with tape.recording():
            assert equal(run(RevLeaky(0.9), change), expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(RevLeaky(0.9), change)


def test_spikes_and_membranes_may_be_masked_in_place() -> None:
    found = []
    for cls, context in ((snntorch.Leaky, nullcontext()), (RevLeaky, tape.recording())):
        torch.manual_seed(9)
        neuron, mask = cls(0.9, learn_beta=True), (torch.rand(5, 4) > 0.5).float()
        x, mem = torch.randn(5, 4).requires_grad_(), torch.randn(5, 4)
        with context:
            for _ in range(3):
                spk, mem = neuron(x + 0.5, mem)
                spk *= mask
                mem = mem + spk
        (spk + mem).square().sum().backward()
        found.append([x.grad, neuron.beta.grad, neuron.reset])
    assert equal(*found)


def test_without_a_gradient_the_stock_step_runs(charged: list[str]) -> None:
    neuron = make("Leaky", True)
    twin = converted(neuron)
    x = torch.randn(3, 4)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert equal(neuron(x), twin(x))
    assert not charged


# States.


def test_passing_a_hidden_state_fails_as_in_stock() -> None:
    for kind in STATES:
        neuron = make(kind, init_hidden=True)
        for one in (neuron, converted(neuron)):
            with pytest.raises(TypeError, match="init_hidden=True"):
                one(torch.randn(3, 4).requires_grad_(), mem=torch.zeros(3, 4))


@pytest.mark.parametrize("kind", STATES)
def test_another_shape_starts_from_zeros(kind: str) -> None:
    neuron = make(kind, True, init_hidden=True, output=True)
    assert_same(neuron, [*inputs(2, 3, 4), *inputs(2, 5, 4), *inputs(2, 3, 4)])


@pytest.mark.parametrize("kind", STATES)
def test_truncated_backpropagation(kind: str) -> None:
    """Losses of two steps at a time, states detached in place between them; then a fresh sequence."""
    torch.manual_seed(10)
    net = nn.Sequential(nn.Linear(4, 4), make(kind, True, init_hidden=True), nn.Linear(4, 2))
    other = srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock")
    xs = inputs(6, 5, 4)
    found = []
    for one in (net, other):
        snntorch.SpikingNeuron.instances = [one[1]]
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        losses = []
        for _ in range(2):
            utils.reset(one)
            assert not one[1].mem.any()
            for first in range(0, 6, 2):
                loss = sum(one(x).square().mean() for x in xs[first : first + 2])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                type(one[1]).detach_hidden()
                if kind == "RSynaptic":
                    one[1].spk.detach_()  # snnTorch 1.0 forgets it
                losses.append(loss.detach())
        found.append([losses, [p.detach() for p in one.parameters()], attributes(one[1])])
    assert equal(*found)


def test_resets_of_states() -> None:
    for cls, method in ((RevLeaky, "init_leaky"), (RevLapicque, "init_lapicque")):
        neuron = cls(beta=0.9, init_hidden=True)
        neuron(torch.ones(3, 4).requires_grad_())
        assert neuron.mem.requires_grad
        assert not getattr(neuron, method)().any()
        assert not neuron.mem.requires_grad
        neuron(torch.ones(3, 4).requires_grad_())
        cls.reset_hidden()
        assert not neuron.mem.any()
    neuron = RevSynaptic(0.9, 0.8)
    assert all(not state.any() for state in neuron.init_synaptic())


def test_instances_keep_their_identity() -> None:
    neuron = make("Leaky", True)
    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(4, 4), neuron), arithmetic="stock")
    assert net[1] is neuron
    assert any(one is neuron for one in snntorch.SpikingNeuron.instances)
    assert type(neuron) is RevLeaky
    srp.restore(net)
    assert type(neuron) is snntorch.Leaky


def straight(x: Tensor) -> Tensor:
    return surrogate.StraightThroughEstimator.apply(x)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.one_in(3)
def test_copies_and_files(kind: str, quantized: bool) -> None:
    neuron = make(kind, True, spike_grad=straight)
    net = nn.Sequential(nn.Linear(4, 4), neuron)
    if quantized:
        neuron.state_quant = torch.round
    keys = list(net.state_dict())
    srp.convert_to_reversible(net)
    assert list(net.state_dict()) == keys
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(stream, weights_only=False)
    x = torch.randn(3, 4)
    expected = net(x)
    for one in copies:
        assert type(one[1]) is type(neuron)
        assert one[1].state_function.__self__ is one[1]
        assert equal(one(x), expected)
