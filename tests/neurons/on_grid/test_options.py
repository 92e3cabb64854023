"""snnTorch's neurons under every option: those that the grid has equations for, and the others."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import convert
from snn_reversible_plugin.neurons.surrogates import of_users
from snn_reversible_plugin.reports.measure import count_step
from snntorch_against_stock import RESETS, STATES, equal, make, one_thread_fixture  # noqa: F401


class Triangle(torch.autograd.Function):
    """A surrogate as users write them."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).float()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return g * (1 - u.abs()).clamp_min(0)


class AtTheThreshold(Triangle):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).float()


def by_hand(u: Tensor) -> Tensor:
    """Straight through, without an autograd function."""
    return (u > 0).float() + (u.sigmoid() - u.sigmoid().detach())


SURROGATES = (Triangle.apply, AtTheThreshold.apply, lambda u: Triangle.apply(u))


class Loop(nn.Module):
    """Two layers in a user's loop; returns all spikes and states."""

    def __init__(self, make_neuron: Any, features: int = 4) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(5, features), make_neuron()
        self.fc2, self.lif2 = nn.Linear(features, features), make_neuron()
        self.recurrent = hasattr(self.lif1, "recurrent")

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        first: tuple[Tensor, ...] = ()
        second: tuple[Tensor, ...] = ()
        self.lif1.reset_mem(), self.lif2.reset_mem()
        for x in x_seq:
            out = self.lif1(self.fc1(x), *first)
            first = out if self.recurrent else out[1:]
            seen += out
            out = self.lif2(self.fc2(out[0]), *second)
            second = out if self.recurrent else out[1:]
            seen += out
        return seen


def train(net: nn.Module, x_seq: Tensor) -> list[Any]:
    x_seq = x_seq.clone().requires_grad_()
    outputs, generator = net(x_seq), torch.Generator().manual_seed(3)
    terms = [
        (out * torch.randn(out.shape, generator=generator)).sum() for out in outputs if out.requires_grad
    ]
    torch.stack(terms).sum().backward()
    gradients = [x_seq.grad, *(p.grad for p in net.parameters())]
    net.zero_grad()
    return [[out.detach() for out in outputs], gradients]


def options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Kinds and settings: every two options meet, others by chance, the same at every run."""
    generator = random.Random(0)
    for kind, reset in itertools.product(STATES, RESETS):
        if kind == "Alpha" and reset == "subtract":
            continue
        undelayed = kind in ("Leaky", "RLeaky", "Synaptic")
        extras: list[dict[str, Any]] = [{}, {"inhibition": True}]
        extras += [{"spike_grad": one, "threshold": 0.5} for one in SURROGATES]
        if undelayed:
            extras += [{"reset_delay": False}, {"reset_delay": False, "spike_grad": Triangle.apply}]
        if kind == "Leaky":
            extras += [
                {"graded_spikes_factor": factor, "learn_graded_spikes_factor": learned}
                for factor, learned in ((0.3, False), (torch.rand(4), True))
            ]
        for extra in extras:
            learned = generator.random() < 0.5
            yield kind, {"learned": learned, "reset_mechanism": reset, **extra}


@pytest.mark.one_in(6)
@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize(("kind", "settings"), list(options()))
def test_options(kind: str, settings: dict[str, Any]) -> None:
    """Bit for bit what autograd does on the same grid, and near stock, with the same gradients given."""
    net = Loop(lambda: make(kind, **settings))
    x_seq = torch.randn(7, 3, 5) * 2 + 0.3
    stock = train(copy.deepcopy(net), x_seq)
    srp.convert_to_reversible(net)
    assert all(map(convert.is_on_grid, (net.lif1, net.lif2)))
    twin = copy.deepcopy(net)
    with convert.differentiated(twin):
        expected = train(twin, x_seq)
    actual = train(net, x_seq)
    assert not net.lif1.off_grid_reason
    assert equal(actual, expected)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*stock), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=5e-3, rtol=1e-3)
    with torch.no_grad():
        assert equal(net(x_seq), actual[0])


@pytest.mark.filterwarnings("ignore:.*it goes on in stock's arithmetic")
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delayed", [True, False])
def test_leaving_the_range_at_the_step_that_autograd_leaves_it(
    kind: str, reset: str, delayed: bool
) -> None:
    """Though the reset at once brings the state back."""
    net = Loop(lambda: make(kind, reset_mechanism=reset, reset_delay=delayed))
    with torch.no_grad():
        net.fc1.weight.abs_().mul_(300)
    x_seq = torch.rand(6, 3, 5) * 2
    srp.convert_to_reversible(net)
    twin = copy.deepcopy(net)
    with convert.differentiated(twin):
        expected = train(twin, x_seq)
    actual = train(net, x_seq)
    assert net.lif1.off_grid_reason
    assert equal(actual, expected)


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [
        ("Leaky", {"inhibition": True, "spike_grad": Triangle.apply}, 0.45),
        ("Leaky", {"reset_delay": False}, 0.6),
        ("Synaptic", {"learned": True}, 0.4),
        ("Synaptic", {"reset_mechanism": "zero"}, 0.8),
        ("RSynaptic", {"all_to_all": True, "linear_features": 128}, 0.45),
        ("Alpha", {"alpha": 0.95, "beta": 0.9}, 0.8),
    ],
)
def test_bytes_that_a_neuron_and_step_hold(kind: str, settings: dict[str, Any], most: float) -> None:
    """Stock holds 8 to 16, the analytic step 4."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif, self.out = nn.Linear(8, 128), make(kind, **settings), nn.Linear(128, 4)

        def forward(self, x_seq: Tensor) -> Tensor:
            state, total = self.lif.reset_mem(), torch.zeros(())
            state = state if isinstance(state, tuple) else (state,)
            for x in x_seq:
                out = self.lif(self.fc(x), *state)
                state = out if kind.startswith("R") else out[1:]
                total = total + self.out(out[0]).sum()
            return total

    net, held = srp.convert_to_reversible(Net()), []
    for steps in (8, 24):
        x_seq = torch.rand(steps, 64, 8) * 0.7
        held.append(count_step(lambda x_seq=x_seq: net(x_seq))[0])
    assert convert.is_on_grid(net.lif)
    assert (held[1] - held[0]) / (16 * 64 * 128) < most


def test_surrogates_that_users_wrote() -> None:
    slope = nn.Parameter(torch.ones(()))
    for function, reason in (
        (torch.sigmoid, "no comparison"),
        (lambda u: (u > 0).float(), "has no gradient"),
        (lambda u: Triangle.apply(u) + 0 * slope, "learns"),
        (lambda u: Triangle.apply(u) * (torch.rand_like(u) < 2), "draws random numbers"),
        (lambda u: Triangle.apply(u * (u == u.max())), "no comparison"),
        (lambda u: Triangle.apply(u).double(), "float32 for each"),
        (lambda u: Triangle.apply(u).sum(), "float32 for each"),
        (lambda u: Triangle.apply(u.view(3, 3)), "does not take a vector"),
        (nn.PReLU(), "learns"),
    ):
        found = of_users(function)
        assert isinstance(found, str) and reason in found
    state = torch.get_rng_state()
    of_users(lambda u: Triangle.apply(u) * torch.rand(1).clamp_min(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert of_users(SURROGATES[0]) is of_users(SURROGATES[0])
    strict = [of_users(function).strict for function in (*SURROGATES, by_hand)]
    assert strict == [True, False, True, True]


def test_a_surrogate_that_fires_otherwise_than_on_the_sample_is_seen() -> None:
    """It leaves the grid for that sequence, before anything is lost."""

    def bounded(u: Tensor) -> Tensor:
        return Triangle.apply(u) * (u.abs() != 1.5)

    assert not isinstance(of_users(bounded), str)
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Identity(), snntorch.Leaky(0.5, spike_grad=bounded, init_hidden=True))
        x = torch.tensor([[0.4, 2.5]]).requires_grad_()
        if converted:
            srp.convert_to_reversible(net)
            with pytest.warns(UserWarning, match="other spikes than a comparison"):
                spikes = net(x)
            assert net[1].off_grid_reason
        else:
            spikes = net(x)
        spikes.sum().backward()
        found.append([spikes.detach(), x.grad])
    assert equal(*found)


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
def test_reasons() -> None:
    def changed() -> nn.Module:
        lif = make("Leaky", reset_delay=False)
        lif.reset_mechanism = "zero"
        return lif

    for lif, reason in (
        (make("Alpha", learn_beta=True), "its constants are learned"),
        (make("Alpha", reset_mechanism="subtract"), "its reset is not written for the grid"),
        (make("Lapicque", beta=0.7, learn_beta=True), "its constants are learned"),
        (make("RSynaptic", reset_delay=False), "its reset has no delay"),
        (make("Leaky", reset_delay=False, inhibition=True), "its neighbours take part in its reset"),
        (make("Leaky", state_quant=torch.round), "its states are quantized"),
        (changed(), "its two resets are of two kinds"),
        (make("Leaky", surrogate_disable=True), "its surrogate has no gradient"),
    ):
        net = srp.convert_to_reversible(nn.Sequential(nn.Identity(), lif))
        assert reason in convert.settings_of(net).off_grid["1"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "network", "input"])
def test_half_precision_has_stocks_dtypes(half: torch.dtype, how: str) -> None:
    on_the_grid = 0
    for kind, reset in itertools.product(STATES, RESETS):
        found = []
        for converted in (False, True):
            torch.manual_seed(1)
            net, x_seq = Loop(lambda kind=kind, reset=reset: make(kind, reset_mechanism=reset)), []
            x_seq = torch.randn(4, 3, 5)
            if how == "network":
                net, x_seq = net.to(half), x_seq.to(half)
            if converted:
                srp.convert_to_reversible(net)
            with (
                torch.autocast("cpu", half, enabled=how == "autocast"),
                warnings.catch_warnings(action="ignore"),
            ):
                if how != "autocast" and "R" in kind:
                    continue  # stock's recurrent layer doesn't take its own float32 spikes
                elif how == "input":
                    outputs = [*net.lif1(x_seq[0, :, :4].to(half).requires_grad_())]
                elif how == "network":
                    first = net.lif1(net.fc1(x_seq[0]))
                    outputs = [*first, *net.lif1(net.fc1(x_seq[1]), *first[1:])]
                else:
                    outputs = net(x_seq)
            torch.stack([out.float().sum() for out in outputs]).sum().backward()
            found.append([*outputs, *(p.grad for p in net.parameters())])
            on_the_grid += converted and convert.is_on_grid(net.lif1)
        for stock, ours in zip(*found, strict=True) if found else ():
            assert (stock is None) == (ours is None)
            assert stock is None or stock.dtype is ours.dtype, (kind, reset)
    assert on_the_grid >= {"autocast": 6, "input": 4, "network": 3}[how]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Leaky", "Lapicque"])
def test_gradients_of_parameters_in_half_precision_are_rounded_as_by_autograd(
    kind: str, half: torch.dtype
) -> None:
    """The charge and the spikes both have one of a learned threshold; their sum is rounded."""
    torch.manual_seed(0)
    net = srp.convert_to_reversible(Loop(lambda: make(kind, learned=True)).to(half))
    x_seq, twin = (torch.randn(40, 3, 5) * 2).to(half), copy.deepcopy(net)
    with torch.autocast("cpu", half):
        with convert.differentiated(twin):
            expected = train(twin, x_seq)
        actual = train(net, x_seq)
    assert convert.is_on_grid(net.lif1) and not net.lif1.off_grid_reason
    assert equal(actual, expected)


class Stepped(nn.Module):
    """SpikingJelly's neurons, one time step at a time."""

    def __init__(self, make_neuron: Any) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(5, 4), make_neuron()
        self.fc2, self.lif2 = nn.Linear(4, 4), make_neuron()

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        functional.reset_net(self)
        seen = []
        for x in x_seq:
            seen += [self.lif2(self.fc2(self.lif1(self.fc1(x)))), self.lif1.v, self.lif2.v]
        return seen


@pytest.mark.one_in(2)
@pytest.mark.parametrize("function", SURROGATES)
@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_spikingjellys_neurons_with_surrogates_that_users_wrote(
    function: Any, v_reset: float | None
) -> None:
    for node, detach in itertools.product((neuron.IFNode, neuron.ParametricLIFNode), (False, True)):
        net = Stepped(
            lambda node=node, detach=detach: node(
                v_threshold=0.1, v_reset=v_reset, detach_reset=detach, surrogate_function=function
            )
        )
        x_seq = torch.randn(7, 3, 5) * 2 + 0.3
        stock = train(net, x_seq)
        functional.reset_net(net)
        srp.convert_to_reversible(net)
        assert convert.is_on_grid(net.lif1)
        with convert.differentiated(net):
            expected = train(net, x_seq)
        actual = train(net, x_seq)
        assert equal(actual, expected)
        assert torch.stack(actual[0][::3]).any()
        for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*stock), strict=True):
            assert torch.allclose(ours, theirs, atol=5e-3, rtol=1e-3)
