"""Tensors of two values that no operation vouches for: bits, whoever wrote them and however."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import Alternating, times_less
from snn_reversible_plugin import tape
from snn_reversible_plugin.tape.by_values import LEAST, packed_by_values
from snn_reversible_plugin.tape.packed import Packed


class ByMask(torch.autograd.Function):
    """Spikes that are written into zeros, as NDA's scripts do."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        spike = torch.zeros_like(v)
        spike[v >= 0.5] = 1.0
        return spike

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * (torch.abs(v - 0.5) < 0.5)


class BySlices(torch.autograd.Function):
    """All steps in one function, spikes of the threshold's height, as DSR's."""

    @staticmethod
    def forward(ctx, x_seq):
        v, out = 0.35, torch.zeros_like(x_seq)
        for t in range(len(x_seq)):
            v = v + x_seq[t]
            spike = (v >= 0.7).float() * 0.7
            v = v - spike
            out[t] = spike
        ctx.save_for_backward(x_seq.mean(0))
        return out

    @staticmethod
    def backward(ctx, grad):
        (rate,) = ctx.saved_tensors
        inside = (rate > 0) & (rate < 0.7)
        return (grad.mean(0) * inside).expand_as(grad).clone()


class ByNumpy(torch.autograd.Function):
    """Filled by what no dispatch mode sees; what it saves itself is kept."""

    @staticmethod
    def forward(ctx, x):
        out = torch.zeros_like(x)
        np.greater(x.detach().numpy(), 0.1, out=out.numpy(), casting="unsafe")
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, spikes = ctx.saved_tensors
        return grad * (1 + spikes) * (1 - x.abs().clamp(max=1))


def lif(x_seq):
    u, out = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        u = 0.25 * u + x
        out += [ByMask.apply(u)]
        u = u - 0.5 * out[-1]
    return torch.stack(out)


@pytest.mark.parametrize(("neuron", "least"), [(lif, 50), (BySlices.apply, 30), (ByNumpy.apply, 1)])
@pytest.mark.one_in(3)
def test_they_are_bits(neuron, least):
    torch.manual_seed(0)
    net = Alternating(neuron, [nn.Linear(128, 128) for _ in range(3)])
    held, _ = times_less(net, torch.randn(8, 64, 128))
    assert held > least


def test_a_write_between_two_uses():
    """Past the version counter, as stock's autograd allows it: the second use sees other spikes."""
    gradients = []
    for taped in (False, True):
        torch.manual_seed(0)
        a, b, c = nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(64, 8)
        with srp.reversible(a) if taped else contextlib.nullcontext():
            out = ByMask.apply(a(torch.randn(32, 64)))
            first = (out.sum(1) * 2).square()
            out.data.mul_(0.5)
            second = c(out) + b(out * 1.0)
        loss = first.sum() + second.square().sum()
        gradients.append(torch.autograd.grad(loss, [a.weight, a.bias, b.weight, c.weight]))
    for stock, ours in zip(*gradients, strict=True):
        assert torch.equal(stock, ours)


def filled(values, dtype=torch.float32, number=LEAST):
    return torch.tensor(values, dtype=dtype).repeat(number // len(values) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 2.5, 0.0], [-0.5, 0.0], [0.0], [3.0]])
def test_two_values_come_back(values, dtype):
    tensor = filled(values, dtype)
    with tape.recording():
        handle = packed_by_values(tensor)
        handle.materialize(tensor)
    assert isinstance(handle, Packed) and handle.bits.numel() == (len(tensor) + 7) // 8
    found = handle.get(True)[0]
    assert torch.equal(found, tensor) and torch.equal(found.signbit(), tensor.signbit())


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, 2.0], [0.0, -0.0], [0.0, float("nan")], [0.0, float("inf")], [1.0, 2.0], [0.0, 1.0, -1.0]],
)
def test_other_values_stay_as_they_are(values):
    assert packed_by_values(filled(values)) is None


def test_one_element_among_many_is_seen():
    tensor = filled([0.0, 1.0], number=100_000)
    tensor[12_345] = 0.5
    assert packed_by_values(tensor) is None
