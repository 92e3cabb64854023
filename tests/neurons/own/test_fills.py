"""Neurons that fill a tensor, or write to their membrane: proved as what they are without the writes."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import Fire, gradients
from snn_reversible_plugin.neurons.own import call
from snn_reversible_plugin.neurons.own.call import Proved
from snn_reversible_plugin.reports.measure import count_step

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows"),
    pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor"),  # a tape saw a recording
]
PROVED = "proved: its recorded operations, a few rows at a time"
STEPS, BATCH, WIDE = 4, 12, 128


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small layers are cut, too, but for the first one of a network."""
    monkeypatch.setattr(call, "AT_ONCE", 500)
    monkeypatch.setattr(call, "_shared", OrderedDict())


class Rectangle(torch.autograd.Function):
    """Filled where a mask says, forward and backward."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        spike = torch.zeros_like(v)
        spike[v >= 0.5] = 1.0
        return spike

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        mask = torch.zeros_like(v)
        mask[torch.abs(v - 0.5) < 0.5] = 1.0
        return grad * mask


class Base(nn.Module):
    """A loop around a step and a write that can be anything."""

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), torch.zeros_like(x)
        for t in range(len(x)):
            v, s = self.step(v, x[t])
            self.write(out, t, s)
        return out

    def step(self, v, x):
        v = 0.5 * v + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s

    def write(self, out, t, s):
        out[t] = s


class Ellipsis_(Base):
    def write(self, out, t, s):
        out[t, ...] = s


class Negative(Base):
    def write(self, out, t, s):
        out[t - STEPS] = s


class BackToFront(Base):
    def write(self, out, t, s):
        out[-1 - t] = s


class Twice(Base):
    """The second write is what counts."""

    def write(self, out, t, s):
        out[t] = 1 - s
        out[t] = s


class OverTheNext(Base):
    """Some steps are overwritten, and get no gradient there."""

    def write(self, out, t, s):
        out[t] = s
        out[t - 1] = s


class Unfinished(Base):
    """Zeros are left where nothing is written."""

    def write(self, out, t, s):
        if t < 2:
            out[t] = s


class ByCopy(Base):
    def write(self, out, t, s):
        out.select(0, t).copy_(s)


class Masked(Base):
    def step(self, v, x):
        v = 0.25 * v + x
        s = Rectangle.apply(v)
        return v - 0.5 * s, s


class InPlace(Base):
    """The membrane is written to, and its next reader sees it."""

    def step(self, v, x):
        v = v * 0.5
        v += x
        s = Fire.apply(v - 1.0)
        v = v - s.detach()
        v.mul_(0.9).clamp_(min=-1.0)
        return v, s


class BatchFirst(nn.Module):
    def forward(self, x):
        v, out = 0.0, torch.empty_like(x)
        for t in range(x.shape[1]):
            v = v * 0.5 + x[:, t]
            out[:, t] = Fire.apply(v - 1.0)
            v = v * (1 - out[:, t])
        return out


class ReadsTheLast(nn.Module):
    """As gated neurons do; at first it reads zeros."""

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), torch.zeros(x.shape, device=x.device)
        for t in range(len(x)):
            last = out[max(t - 1, 0)]
            v = v * 0.5 * (1 - last.clone()) + x[t]
            out[t] = Fire.apply(v - 1.0)
        return out


class HeldViews(nn.Module):
    """Views from before a write show it; what was computed of them does not."""

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), torch.zeros_like(x)
        for t in range(len(x)):
            view = out[t]
            before = view + 1
            v = 0.5 * v + x[t]
            out[t] = Fire.apply(v - 1.0)
            v = v * (before - view)
        return out


class OtherDtype(nn.Module):
    def forward(self, x):
        v, out = torch.zeros_like(x[0]), torch.empty(x.shape, dtype=torch.float64)
        for t in range(len(x)):
            v = 0.5 * v + x[t]
            out[t] = Fire.apply(v - 1.0)
            v = v * (1 - out[t].float())
        return out.float()


class OverACopy(nn.Module):
    """Of its input, all of it."""

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), x.clone()
        for t in range(len(x)):
            v = 0.5 * v + out[t]
            out[t] = Fire.apply(v - 1.0)
            v = v * (1 - out[t])
        return out


FILLING = [
    Base(), Ellipsis_(), Negative(), BackToFront(), Twice(), OverTheNext(), Unfinished(), ByCopy(),
    Masked(), InPlace(), BatchFirst(), ReadsTheLast(), HeldViews(), OtherDtype(), OverACopy(),
]  # fmt: skip


def network(neuron, wide=WIDE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), neuron, nn.Linear(24, wide), copy.deepcopy(neuron))


def inputs(neuron, steps=STEPS):
    shape = (BATCH, steps, 16) if isinstance(neuron, BatchFirst) else (steps, BATCH, 16)
    return 12 * torch.rand(shape)


def step(net, x):
    out = net(x)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out.detach(), *gradients(net)]


def assert_like_stock(neuron, x=None, autocast=False):
    stock = network(neuron)
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(neuron) if x is None else x
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, found = step(stock, x), step(converted, x)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.signbit(), b.signbit())
            assert a.stride() == b.stride()
        assert expected[0].any()
        assert all(grad.any() for grad in expected[1:])
    return converted


@pytest.mark.one_in(3)
@pytest.mark.parametrize("neuron", FILLING, ids=lambda one: type(one).__name__)
def test_it_is_proved_and_trains_as_stock(neuron):
    converted = assert_like_stock(neuron)
    assert converted[1].treatment == converted[3].treatment == PROVED
    assert next(len(list(proof.parts())) for proof in call._known[converted[3]].of.values()) >= 3


@pytest.mark.one_in(2)
@pytest.mark.parametrize("neuron", [Base(), Masked(), InPlace()], ids=lambda one: type(one).__name__)
def test_under_autocast(neuron):
    assert assert_like_stock(neuron, autocast=True)[3].treatment == PROVED


def test_it_fills_as_its_input_lies():
    """A dense input in another order than its dimensions': what is filled is laid out as that is."""
    found = []
    for net in (stock := Base(), srp.convert_to_reversible(copy.deepcopy(stock))):
        x = (3 * torch.rand(STEPS, WIDE, BATCH, generator=torch.Generator().manual_seed(0))).transpose(1, 2)
        out = net(x.requires_grad_())
        (g,) = torch.autograd.grad(out, x, torch.ones(STEPS, BATCH, WIDE))
        found.append((out, g))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("mode", ["memory", "minimal"])
@pytest.mark.one_in(2)
def test_it_peaks_as_a_list_of_steps_does(mode):
    class Lists(nn.Module):
        def forward(self, x):
            v, found = torch.zeros_like(x[0]), []
            for t in range(len(x)):
                v = 0.5 * v + x[t]
                s = Fire.apply(v - 1.0)
                v = v * (1 - s)
                found.append(s)
            return torch.stack(found)

    peaks = []
    for neuron in (Base(), Lists()):
        net = network(neuron, wide=2048)
        net.append(nn.Linear(2048, 4))
        srp.convert_to_reversible(net, mode=mode)
        x = inputs(neuron, steps=8)
        net(x).mean().backward()
        net.zero_grad()
        peaks.append(count_step(lambda net=net, x=x: net(x).mean())[1])
    assert peaks[0] <= 1.1 * peaks[1]  # the gradient of a step is copied out, as in stock


# -- what must not be proved ---------------------------------------------------------------------------


class IntoItsInput(nn.Module):
    def forward(self, x):
        v = torch.zeros_like(x[0])
        for t in range(len(x)):
            v = 0.5 * v + x[t]
            s = Fire.apply(v - 1.0)
            v = v * (1 - s)
            x[t] = s
        return x


class IntoAView(nn.Module):
    """Of its input, too, by another name."""

    def forward(self, x):
        v, out, found = torch.zeros_like(x[0]), x.detach().view(x.shape), []
        for t in range(len(x)):
            v = 0.5 * v + x[t]
            found.append(Fire.apply(v - 1.0))
            out[t] = found[-1]
        return torch.stack(found)


OUTSIDE = torch.zeros(STEPS, BATCH, WIDE)


class FromOutside(Base):
    def forward(self, x):
        v, out = torch.zeros_like(x[0]), OUTSIDE.detach()
        for t in range(len(x)):
            v, s = self.step(v, x[t])
            out[t] = s.detach()
        return out + 0 * x


class Overlapping(Base):
    """Two steps at a time, of which the next write covers one."""

    def write(self, out, t, s):
        out[t : t + 2] = s


class ByATensor(Base):
    def write(self, out, t, s):
        out[torch.tensor([t])] = s


class SomeNeurons(Base):
    def write(self, out, t, s):
        out[t, :, 3:] = s[:, 3:]


class OnOther(nn.Module):
    """Not zeros and ones, where nothing is written."""

    def forward(self, x):
        v, out = torch.zeros_like(x[0]), torch.full_like(x, 0.5)
        for t in range(len(x) - 1):
            v = 0.5 * v + x[t]
            out[t] = Fire.apply(v - 1.0)
        return out


class Membranes(Base):
    def write(self, out, t, s):
        out[t] = s * 0.5


class LaidOutOtherwise(nn.Module):
    """An exponential of what was read from a view: its last bits hang on where an element lies."""

    def forward(self, x):
        x = x.transpose(0, 1).contiguous()
        v, out = 0.0, torch.zeros_like(x)
        for t in range(x.shape[1]):
            v = v * 0.5 + x[:, t]
            out[:, t] = Fire.apply(v - 1.0)
            v = v * out[:, t].sigmoid()
        return out.transpose(0, 1)


REFUSED = [Overlapping(), ByATensor(), SomeNeurons(), OnOther(), Membranes(), LaidOutOtherwise()]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("neuron", REFUSED, ids=lambda one: type(one).__name__)
def test_it_is_not_proved_and_trains_as_stock(neuron):
    assert assert_like_stock(neuron)[3].treatment != PROVED


@pytest.mark.parametrize("neuron", [IntoItsInput(), IntoAView()], ids=lambda one: type(one).__name__)
def test_who_writes_to_what_is_given_still_does(neuron):
    stock = nn.Sequential(nn.Linear(16, WIDE), neuron)
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(neuron)
    for a, b in zip(step(stock, x), step(converted, x), strict=True):
        assert torch.equal(a, b)
    assert converted[1].treatment.startswith("the tape, for it")
    if isinstance(neuron, IntoAView):
        assert "writes to a tensor that is not its own" in converted[1].treatment


def test_what_is_from_outside_is_no_own_tensor():
    converted = srp.convert_to_reversible(copy.deepcopy(FromOutside()))
    x = torch.rand(STEPS, BATCH, WIDE, requires_grad=True)
    assert torch.equal(FromOutside()(x), converted(x))
    assert not isinstance(converted, Proved)


def test_what_nobody_has_written_is_no_value():
    class Unwritten(Base):
        def forward(self, x):
            v, out = torch.zeros_like(x[0]), torch.empty_like(x)
            for t in range(len(x) - 1):
                v, s = self.step(v, x[t])
                out[t] = s
            return out

    net = srp.convert_to_reversible(Unwritten())
    net(inputs(net).requires_grad_())
    assert isinstance(net, Proved)
    assert "leaves a part unwritten" in net.treatment
