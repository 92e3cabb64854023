"""What happens beside the operations that a tape sees: kernels that torch doesn't know, hidden writes."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp


def allocated(x, how):
    """Room for a kernel's result, as code for cupy, Triton or a C extension makes it."""
    if how == "split":
        return torch.split(torch.zeros(2 * len(x), *x.shape[1:]), len(x))[1]
    if how == "clone":
        return x.clone()
    if how == "slice":
        return torch.zeros(len(x) + 1, *x.shape[1:])[1:]
    if how == "cat":
        return torch.cat([torch.zeros(1, *x.shape[1:]), torch.ones(len(x) - 1, *x.shape[1:])])
    if how == "arange":
        return torch.arange(x.numel(), dtype=x.dtype).view(x.shape)
    if how == "of numbers":
        return torch.tensor(np.zeros(x.shape, np.float32))
    if how == "cast":
        return torch.zeros(x.shape, dtype=torch.float64).float()
    if how.startswith("new"):
        return getattr(x, how)(x.shape)
    return getattr(torch, how)(x)


class Foreign(torch.autograd.Function):
    """Filled by numpy, which no dispatch mode sees."""

    @staticmethod
    def forward(ctx, x, how):
        out = allocated(x, how)
        np.greater(x.detach().numpy(), 0.1, out=out.numpy(), casting="unsafe")
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, spikes = ctx.saved_tensors
        return grad * (1 + spikes) * (1 - x.abs().clamp(max=1)), None


class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.a, self.b = how, nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(Foreign.apply(self.a(x), self.how))


@pytest.mark.parametrize(
    "how",
    [
        "empty_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "split", "slice", "clone", "cat",
        "arange", "of numbers", "cast",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_what_no_operation_wrote_is_kept(how, mode):
    x, gradients = torch.randn(4, 3, 8), []
    for taped in (False, True):
        net = Net(how)
        with srp.reversible(net, mode=mode) if taped else contextlib.nullcontext():
            loss = net(x).square().sum()
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    for stock, ours in zip(*gradients, strict=True):
        assert torch.equal(stock, ours)


@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize("inplace", [True, False])
def test_noise_that_an_operation_fills_beside_its_result(mode, inplace):
    """RReLU: autograd saves the noise before the operation draws it."""
    gradients = []
    for taped in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.RReLU(inplace=inplace), nn.Linear(16, 4))
        x = torch.randn(5, 8)
        with srp.reversible(net, mode=mode) if taped else contextlib.nullcontext():
            loss = net(x).square().sum()
        loss.backward()
        gradients.append([p.grad for p in net.parameters()])
    for stock, ours in zip(*gradients, strict=True):
        assert torch.equal(stock, ours)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_of_torch(kind):
    gradients = []
    for taped in (False, True):
        torch.manual_seed(0)
        first, layer = nn.Linear(4, 8), getattr(nn, kind)(8, 8, num_layers=2, batch_first=True)
        x = torch.rand(3, 6, 4)
        with srp.reversible(layer) if taped else contextlib.nullcontext():
            loss = layer((first(x) > 0).float() + first(x))[0].square().sum()
        loss.backward()
        gradients.append([p.grad for p in (*first.parameters(), *layer.parameters())])
    for stock, ours in zip(*gradients, strict=True):
        assert torch.equal(stock, ours)
