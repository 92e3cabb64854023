"""Spikes that are whole numbers from 0 to D: a few bits each, by construction."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import snn_reversible_plugin as srp
from against_stock import assert_trains_like_stock
from own_neurons import times_less
from snn_reversible_plugin import tape
from snn_reversible_plugin.tape.origins import look_up
from snn_reversible_plugin.tape.packed import PackedLevels
from snn_reversible_plugin.tape.spans import ANY, Span, span_after


class Quantized(torch.autograd.Function):
    """The surrogate of I-LIF."""

    @staticmethod
    def forward(ctx, x, top):
        ctx.save_for_backward(x)
        ctx.top = top
        return torch.round(torch.clamp(x, 0, top))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * ((x >= 0) & (x <= ctx.top)), None


WAYS = {
    "clamp": lambda x, top: Quantized.apply(x, top),
    "clamp, over its top": lambda x, top: Quantized.apply(x, top) / top,
    "clamp of round": lambda x, top: torch.clamp(torch.round(x), 0, top),
    "in place": lambda x, top: (x + 0.0).clamp_(0, top).round_(),
    "hardtanh and floor": lambda x, top: torch.floor(nn.functional.hardtanh(x, 0, top) + 0.5),
    "clip of a scaled current": lambda x, top: torch.floor(torch.clamp(x / 2, 0, 1) * top + 0.5) / top,
    "relu and a bound": lambda x, top: torch.round(torch.clamp(torch.relu(x), max=top)),
    "sigmoid": lambda x, top: torch.round(torch.sigmoid(x) * top),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top", [1, 4, 8])
def test_counts_are_a_few_bits(way, top):
    x = torch.randn(64, 8, requires_grad=True) * 3
    with tape.recording():
        counts = WAYS[way](x, top)
        handle = look_up(counts)
        if not isinstance(handle, PackedLevels):  # divided afterwards
            (handle, *_) = [one for one in handle.operands() if one.treatment == "packed"]
    assert isinstance(handle, PackedLevels)
    assert (handle.low, handle.high) == (0, top)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_gradients_are_stocks(way, dtype, mode):
    """Also where the values are NaN, infinite, -0.0 or on a bound."""
    odd = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, -0.3, 0.5, 3.5, 4.0, 4.5, 1e30, -1e30]
    x = torch.cat([torch.tensor(odd), torch.randn(51) * 3]).to(dtype).requires_grad_()
    weight = torch.randn(64, dtype=dtype, requires_grad=True)

    def grads(recorded):
        with tape.recording(mode, check=True) if recorded else torch.enable_grad():
            counts = WAYS[way](x, 4)
            value = counts * weight * counts.clone()
        return torch.autograd.grad(value.sum(), (x, weight))

    for stock, ours in zip(grads(False), grads(True), strict=True):
        # Of a NaN's bits, torch promises none.
        assert torch.equal(stock.nan_to_num(12345.0), ours.nan_to_num(12345.0))
        assert torch.equal(stock.signbit() & ~stock.isnan(), ours.signbit() & ~ours.isnan())


@pytest.mark.parametrize(("residual", "least"), [(False, 55), (True, 33)])
def test_a_network_of_counts_is_held_in_less_than_two_bits(residual, least):
    """The spikes alone are 31 and 24 times less with three bits each."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(
                Fire(), nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64),
                Fire(), nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16),
            )  # fmt: skip

        def forward(self, x):
            return x + self.branch(x) if residual else self.branch(x)

    class Fire(nn.Module):
        def forward(self, x):
            return Quantized.apply(x, 4) / 4

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *[Block() for _ in range(6)])
    assert times_less(net, torch.rand(4, 3, 16, 16))[0] > least


def test_sums_of_counts_are_computed_again_from_their_bits():
    weights = [torch.randn(32, 32, requires_grad=True) for _ in range(4)]
    x = torch.randn(16, 32)
    with tape.recording():
        stream = Quantized.apply(x @ weights[0], 4)
        for weight in weights[1:]:
            stream = stream + Quantized.apply(stream @ weight, 4)
        handle = tape.handle_of(stream)
    assert handle.treatment == "replayed" and handle.work == 0


def test_what_is_not_bounded_is_no_few_bits():
    x = torch.randn(64, 8, requires_grad=True) * 3
    ways = [
        torch.round, lambda x: torch.round(torch.clamp(x, 0, 13)), lambda x: torch.clamp(x, 0, 4),
        lambda x: torch.round(torch.clamp(x, 0, 4), decimals=1),
        lambda x: torch.round(torch.clamp(x, min=0)), lambda x: torch.clamp(torch.round(x), 0, 3.5),
        lambda x: torch.round(torch.clamp(x, x * 0, x + 4)),
        lambda x: torch.round(torch.clamp(x, 0, 4) * x), lambda x: torch.round(x.clamp(0, 4).mul_(7)),
    ]  # fmt: skip
    with tape.recording():
        for way in ways:
            assert not isinstance(look_up(way(x)), PackedLevels)
        bounded = torch.clamp(x, 0, 4)
        bounded.data.mul_(100)
        assert not isinstance(look_up(torch.round(bounded)), PackedLevels)
        bounded = torch.clamp(x, 0, 4)
        bounded[0] = 77.0
        assert not isinstance(look_up(torch.round(bounded)), PackedLevels)


@pytest.mark.parametrize("store_v_seq", [False, True])
def test_spikingjellys_neuron_of_counts(store_v_seq):
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    if not hasattr(neuron, "ILIFNode"):
        pytest.skip("this SpikingJelly has no I-LIF")

    def make():
        i_lif = [neuron.ILIFNode(step_mode="m", store_v_seq=store_v_seq) for _ in range(2)]
        return nn.Sequential(nn.Linear(64, 64), i_lif[0], nn.Linear(64, 64), i_lif[1], nn.Linear(64, 4))

    x = torch.rand(4, 64, 64) * 8
    assert_trains_like_stock(make, (x,))
    saved = []

    class Observer:
        def computed(self, *_):
            pass

        def packed(self, where, tensor, handle):
            saved.append(handle)

    net = srp.convert_to_reversible(make())
    with tape.recording(observer=Observer()):
        net(x).sum()
    below = {id(one): one for handle in saved for one in handle.relies_on()}
    assert sum(isinstance(one, PackedLevels) for one in below.values()) == 2


NUMBERS = st.sampled_from([0.25, 0.5, 1, 2, 3, 4, 8, -1, 1.5, 0.1, 1 / 3, 1e-3, 100])
STEPS = st.one_of(
    st.tuples(st.sampled_from(["add", "sub", "mul", "div", "clamp_min", "clamp_max"]), NUMBERS),
    st.tuples(st.sampled_from(["round", "floor", "ceil", "trunc", "relu", "sigmoid"]), st.none()),
)


@given(
    steps=st.lists(STEPS, min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_a_span_holds_whatever_the_values(steps, dtype):
    values = torch.cat([torch.randn(400) * 4, torch.linspace(-9, 9, 400)]).to(dtype)
    span: Span | None = ANY
    for name, number in steps:
        arguments = () if number is None else (number,)
        span = span_after(name, (values, *arguments), {}, span or ANY)
        values = getattr(torch, name)(values, *arguments)
        if span is not None:
            finite = values[values.isfinite()].double()
            assert ((finite >= span.low) & (finite <= span.high)).all()
            assert not span.whole or (finite == finite.round()).all()
