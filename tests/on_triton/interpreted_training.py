"""Converted networks on the kernels, interpreted: to the bit what stock trains to on its own kernels."""

import itertools

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from against_stock import assert_trains_like_autograd, assert_trains_like_stock
from as_cuda import as_cuda
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.neurons.integrate_fire import on_triton
from snn_reversible_plugin.spikingjelly.analytic import ByFormula, how
from snntorch_against_stock import make as make_snntorch
from spikingjelly_against_stock import (
    REV,
    channels_last,
    check,
    current,
    make,
    outcome,
    same,
    settings_of,
)  # fmt: skip

NAMES = ["Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf"]


@pytest.fixture(autouse=True)
def on_cuda():
    with as_cuda():
        yield


@pytest.fixture
def launches(monkeypatch):
    """How often the kernels ran, there and back."""
    found = {"forward": 0, "backward": 0}
    for name in found:
        call = getattr(on_triton, name)

        def counted(*args, name=name, call=call, **kwargs):
            found[name] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(on_triton, name, counted)
    return found


def cases():
    numbers = itertools.cycle(range(7))
    for cls in REV:
        for settings, reset, detach in itertools.product(
            settings_of(cls), [None, 0.0, -0.3], [False, True]
        ):
            yield cls, settings, reset, detach, NAMES[next(numbers)]


@pytest.mark.parametrize("store", [False, True])
def test_every_neuron(store, launches):
    half = itertools.islice(cases(), int(store), None, 2)
    for number, (cls, settings, reset, detach, name) in enumerate(half):
        node = make(cls, name, reset=reset, detach=detach, store=store, **settings)
        steps = 1 if number % 5 == 0 else 3
        x, v = current(steps, 3, 7), torch.randn(3, 7, requires_grad=number % 2 == 0)
        check(node, x, v if number % 3 else None, taped=(bool(number % 2),), calls=1 + number % 2)
    assert launches["forward"] > len(REV) and launches["backward"] > len(REV)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1, 1), (5, 9), (3, 2, 3, 1, 1), (2, 1, 8, 3, 3)])
def test_sizes(shape, launches):
    check(make(neuron.LIFNode), current(*shape), taped=(False, True))
    assert launches["forward"] >= 4


LAYOUTS = {
    "channels-last": channels_last,
    "every second": lambda x: torch.stack((x, x), -1)[..., 0].detach().requires_grad_(),
    "steps far apart": lambda x: x.detach().repeat(1, 2, 1, 1, 1)[:, : x.shape[1]].requires_grad_(),
    "one step for all": lambda x: x.detach()[:1].expand_as(x).requires_grad_(),
    "batch first": lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, launches):
    for cls in REV:
        x = LAYOUTS[layout](current(3, 2, 4, 3, 3))
        check(make(cls, reset=-0.3), x, taped=(False, True))
    assert launches["forward"] == (0 if layout == "batch first" else 12)


def test_gradients_of_states_alone_and_of_spikes_alone():
    for cls in REV:
        check(make(cls), current(3, 2, 5), torch.randn(2, 5, requires_grad=True), spikes=False)
        check(make(cls), current(3, 2, 5), membrane=False, taped=(True,))


def test_half_precision_is_stocks_unfused_code(launches):
    for dtype in (torch.float16, torch.bfloat16):
        check(make(neuron.LIFNode), current(3, 2, 5, dtype=dtype), taped=(True,))
    assert launches == {"forward": 0, "backward": 0}


def test_no_neurons_are_left_to_stock():
    node = srp.convert_to_reversible(make(neuron.IFNode))
    x = torch.empty(3, 0, requires_grad=True)
    assert isinstance(how(node, (x,), {}), ByFormula)
    assert node(x).shape == (3, 0)


class Net(nn.Module):
    def __init__(self, cls, **settings):
        super().__init__()
        layers = [(3, 4), (4, 4)]
        self.body = nn.Sequential(*(
            nn.Sequential(
                layer.Conv2d(i, o, 3, padding=1, bias=False), layer.BatchNorm2d(o),
                make(cls, mode="m", **settings),
            ) for i, o in layers
        ))  # fmt: skip
        self.head = layer.Linear(4 * 5 * 5, 3)
        functional.set_step_mode(self, "m")

    def forward(self, x_seq):
        return self.head(self.body(x_seq).flatten(2)).mean(0)


def test_networks_train_as_stock(launches):
    for cls, mode in zip(REV, ("memory", "speed", "auto"), strict=True):
        assert_trains_like_stock(
            lambda cls=cls: Net(cls), (torch.rand(3, 2, 3, 5, 5) * 2,), mode=mode, steps=2
        )
    assert launches["backward"] == 3 * (2 * 2 + 1)  # and once to see that stock computes the same


class Loop(nn.Module):
    def __init__(self, cls, **settings):
        super().__init__()
        self.first, self.lif1 = nn.Linear(5, 9), make(cls, mode="s", **settings)
        self.second, self.lif2 = nn.Linear(9, 4), make(cls, mode="s", **settings)

    def forward(self, x_seq):
        return torch.stack([self.lif2(self.second(self.lif1(self.first(x)))) for x in x_seq])


class TorchLoop(nn.Module):
    def __init__(self, kind, reset, learned):
        super().__init__()
        self.first, self.second = nn.Linear(5, 9), nn.Linear(9, 4)
        self.lif1, self.lif2 = (make_snntorch(kind, learned, reset_mechanism=reset) for _ in range(2))

    def forward(self, x_seq):
        seen, first, second = [], (), ()
        for lif in (self.lif1, self.lif2):
            lif.reset_mem()
        for x in x_seq:
            spikes, *first = self.lif1(self.first(x), *first)
            spikes, *second = self.lif2(self.second(spikes), *second)
            seen.append(spikes)
        return torch.stack(seen)


def loops():
    for cls, (reset, detach) in zip(REV, [(None, False), (0.0, True), (-0.3, False)], strict=True):
        yield (
            cls.__name__,
            lambda cls=cls, reset=reset, detach=detach: Loop(cls, reset=reset, detach=detach),
        )
    for kind, reset, learned in (
        ("Leaky", "subtract", True), ("Leaky", "zero", False), ("Synaptic", "subtract", False),
    ):  # fmt: skip
        yield f"{kind} {reset}", lambda k=kind, r=reset, n=learned: TorchLoop(k, r, n)


@pytest.mark.parametrize(("name", "make_loop"), list(loops()))
def test_loops_on_the_grid_have_the_gradients_of_their_forward(name, make_loop):
    net = assert_trains_like_autograd(make_loop, (torch.randn(3, 3, 5) * 2 + 0.5,))
    assert not any(getattr(module, "off_grid_reason", "") for module in net.modules()), name


def test_the_final_membrane_is_a_promise_and_kept():
    x = current(4, 3, 5)
    stock, ours = make(neuron.LIFNode), make(neuron.LIFNode)
    srp.convert_to_reversible(ours)
    for node in (stock, ours):
        node(x).sum().backward()
    assert same(ours.v.detach(), stock.v.detach())
    observed = [outcome(node, x)[0] for node in (stock, ours)]
    assert all(same(a, b) for a, b in zip(*observed, strict=True))


def test_fused_half_precision_is_stocks_kernel_between_two_casts(launches):
    """In float16: the interpreter cuts off what becomes bfloat16; a GPU rounds (`ahead_of_time.py`)."""
    dtype = torch.float16
    for cls in REV:
        node = srp.convert_to_reversible(make(cls, reset=-0.3), arithmetic="fused")
        x = current(3, 2, 9, dtype=dtype)
        with srp.reversible(node):
            ours = outcome(node, x, membrane=False)
        with differentiated(node):
            theirs = outcome(node, x, membrane=False)
        assert all(same(a, b) for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True))
        assert node.arithmetic == "fused" and ours[0][0].dtype is dtype
    assert launches["forward"] >= 3 and launches["backward"] >= 3
