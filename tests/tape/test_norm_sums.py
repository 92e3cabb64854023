"""Mode "minimal": a batch norm's sums are taken while the neuron behind it makes their gradient."""

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.tape.sliced import cut, gradients

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer  # noqa: E402

T, N, C, SIDE = 3, 8, 6, 12
X = torch.rand(T, N, 2, SIDE, SIDE)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Whether each norm of a backward found its sums."""
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 11)
    found, left_for = [], gradients.left_for

    def asked(*args):
        found.append(left_for(*args))
        return found[-1]

    monkeypatch.setattr(gradients, "left_for", asked)
    return found


class Network(nn.Module):
    """Its forward is its own, and has the norms' results in hand."""

    def __init__(self, norm=layer.BatchNorm2d, seen=lambda out: out):
        super().__init__()
        torch.manual_seed(0)
        self.convolutions = nn.ModuleList(
            layer.Conv2d(C if at else 2, C, 3, padding=1, bias=False) for at in range(3)
        )
        self.norms = nn.ModuleList(norm(C) for _ in range(3))
        self.neurons = nn.ModuleList(neuron.LIFNode(detach_reset=True) for _ in range(3))
        self.seen = seen
        functional.set_step_mode(self, "m")

    def forward(self, x):
        for convolution, norm, node in zip(self.convolutions, self.norms, self.neurons, strict=True):
            x = node(self.seen(norm(convolution(x))))
        return x


def gradients_of(net, x=X, backward=None):
    functional.reset_net(net)
    net.zero_grad()
    out = net(x)
    loss = (out * torch.linspace(-1, 1, out.numel()).cos().view_as(out)).sum()
    return [p.grad for p in net.parameters()] if (backward or torch.Tensor.backward)(loss) is None else None


def assert_as_stock(make, x=X, backward=None):
    stock, net = make(), srp.convert_to_reversible(make(), mode="minimal")
    for _ in range(2):
        for one, other in zip(
            gradients_of(stock, x, backward), gradients_of(net, x, backward), strict=True
        ):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_norms_find_their_sums(taken):
    assert_as_stock(Network)
    assert len(taken) == 6 and all(taken)


def test_of_what_is_reshaped_on_the_way(taken):
    assert_as_stock(lambda: Network(seen=lambda out: out.flatten(2).unflatten(2, out.shape[2:])))
    assert len(taken) == 6 and all(taken)


@pytest.mark.parametrize(
    "seen",
    [lambda out: out * 2, lambda out: out.roll(1, 1), lambda out: out.sigmoid() * out],
    ids=["scaled", "rolled", "used twice"],
)
def test_not_where_the_gradient_is_another(taken, seen):
    assert_as_stock(lambda: Network(seen=seen))
    assert len(taken) == 6 and not any(taken)


def in_place(grad):
    grad.mul_(2)


def twice(grad):
    return grad * 2


def in_part(grad):
    grad[0].add_(1.0)


@pytest.mark.parametrize("hook", [in_place, twice, in_part])
@pytest.mark.parametrize("hooks", [1, 2, 3])
def test_nor_where_a_hook_changes_it(taken, hook, hooks):
    def seen(out):
        for _ in range(hooks):
            out.register_hook(hook)
        return out

    assert_as_stock(lambda: Network(seen=seen))
    assert len(taken) == 6 and not any(taken)


def test_norms_in_evaluation_have_none(taken):
    def make():
        net = Network()
        for norm in net.norms:
            norm.eval()
        return net

    assert_as_stock(make)
    assert not any(taken)


def test_backwards_of_one_graph_have_each_their_own(taken):
    def backward(loss):
        loss.backward(retain_graph=True)
        (3 * loss).backward()

    assert_as_stock(Network, backward=backward)
    assert len(taken) == 12 and all(taken)


def test_what_was_left_for_a_norm_that_nobody_asked_is_not_taken_later(taken):
    """The first backward ends at the result of a norm, whose sums it leaves."""
    found = []
    for mode in (None, "minimal"):
        results = []
        net = Network(seen=lambda out, results=results: results.append(out) or out)
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        functional.reset_net(net)
        loss = net(X).square().sum()
        ended = torch.autograd.grad(loss, results[1], retain_graph=True)[0]
        weight = torch.autograd.grad(results[1], net.convolutions[1].weight, ended * 0.5)[0]
        found.append((ended, weight))
        results.clear()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert [bool(sums) for sums in taken] == [True, False]


@pytest.mark.parametrize("how", ["affine", "momentum", "statistics", "frozen"])
def test_kinds_of_norms(taken, how):
    options = {"affine": {"affine": False}, "momentum": {"momentum": None}}
    options["statistics"] = {"track_running_stats": False}

    def norm(channels):
        made = layer.BatchNorm2d(channels, **options.get(how, {}))
        return made.requires_grad_(how != "frozen")

    stock, net = Network(norm), srp.convert_to_reversible(Network(norm), mode="minimal")
    for _ in range(2):
        for one, other in zip(gradients_of(stock), gradients_of(net), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert len(taken) == 6 and all(taken)


@pytest.mark.parametrize("shape", [(1, 8), (3, 2), (5, 3)])
def test_in_float64_too(taken, shape):
    assert_as_stock(lambda: Network().double(), torch.rand(*shape, 2, SIDE, SIDE, dtype=torch.float64))
    assert all(taken)
