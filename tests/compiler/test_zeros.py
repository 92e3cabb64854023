"""Gradients that are zeros lie in one memory, and are the zeros that autograd would have made."""

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from graph_only import WithoutInductor
from snn_reversible_plugin.compiler import membranes
from snn_reversible_plugin.compiler.zeros import share_zeros
from snn_reversible_plugin.reports.measure import count_step


class Three(torch.autograd.Function):
    """Three results, and the gradients that its backward was given."""

    @staticmethod
    def forward(ctx, x):
        return x * 1, torch.empty_strided((3, 4), (1, 3)).copy_(x * 2), x[:1].double()

    @staticmethod
    def backward(ctx, *gradients):
        Three.given = gradients
        return gradients[0] + gradients[1]


def given(read):
    """Where the backward's gradients lie if the results ``read`` are summed up, stock's and ours."""
    found = []
    for around in (lambda outputs: None, share_zeros):
        outputs = Three.apply(torch.ones(3, 4, requires_grad=True))
        around(outputs)
        sum(outputs[at].sum() for at in read).backward()
        found.append(Three.given)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.dtype is b.dtype
    if 1 not in read:  # laid out as the result is, as a compiled backward wants it
        assert found[1][1].stride() == (1, 3)
    return [[one.data_ptr() for one in gradients] for gradients in found]


def test_zeros_share_memory():
    stock, ours = given([2])
    assert stock[0] != stock[1] and ours[0] == ours[1] and ours[0] != ours[2]
    assert len(set(given([0])[1])) == 3  # a gradient that is none of them, and another dtype


def test_what_a_user_may_do_with_outputs():
    """They are the same objects, at the same version, and may be changed in place."""
    x = torch.ones(3, 4, requires_grad=True)
    outputs = Three.apply(x)
    before = [(id(one), one._version) for one in outputs]
    share_zeros(outputs)
    assert [(id(one), one._version) for one in outputs] == before
    outputs[0].mul_(3)
    outputs[0].sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 3.0))


def test_a_single_result_is_left_alone():
    x = torch.ones(3, requires_grad=True)
    share_zeros([y := x * 2])
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.neurons = nn.ModuleList(neuron.IFNode(step_mode="m") for _ in range(8))

    def forward(self, x_seq):
        functional.reset_net(self)
        return sum(one(x_seq) for one in self.neurons)


@pytest.mark.slow
def test_the_peak_of_a_backward(monkeypatch):
    """Eight membranes whose gradients are zeros: fewer of them in the backward."""
    x = torch.rand(1, 64, 1024, requires_grad=True)
    peaks = []
    for share in (lambda outputs: None, share_zeros):
        monkeypatch.setattr(membranes, "share_zeros", share)
        torch._dynamo.reset()
        run = torch.compile(Parallel(), backend=WithoutInductor())
        run(x).sum().backward()
        peaks.append(count_step(lambda run=run: run(x).sum())[1])
    assert peaks[0] - peaks[1] >= 3 * x.nbytes  # where the peak is, some are gone already
