"""SpikingJelly's neurons in a user's loop and stock arithmetic: stock's gradients, from few membranes."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step

NEURONS = {
    "if": lambda: neuron.IFNode(),
    "if, soft reset": lambda: neuron.IFNode(v_reset=None, detach_reset=True),
    "lif": lambda: neuron.LIFNode(tau=1.7, v_reset=-0.2),
    "lif, undecayed input": lambda: neuron.LIFNode(tau=1.7, decay_input=False, v_reset=None),
    "plif": lambda: neuron.ParametricLIFNode(init_tau=2.0, decay_input=False),
    "plif, decayed input": lambda: neuron.ParametricLIFNode(init_tau=2.0, detach_reset=True),
}


def network(make, width=8, norm=True):
    layers = []
    for inp, out in ((2, width), (width, width), (width, width)):
        layers.append(nn.Conv2d(inp, out, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(out), make()] if norm else [make()]
    net = nn.Sequential(*layers, nn.Conv2d(width, 4, 1))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 2.0)
    return net


def pair(make, **settings):
    torch.manual_seed(0)
    stock = network(make, **settings)
    return stock, srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")


def outputs(net, x_seq, between=lambda net, t: None):
    functional.reset_net(net)
    found = []
    for t, x in enumerate(x_seq):
        found.append(net(x))
        between(net, t)
    return torch.stack(found)


def gradients(net, loss, **kwargs):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, **kwargs)


def assert_alike(ones, others):
    for a, b in zip(ones, others, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()))


def frames(steps, size=8):
    torch.manual_seed(3)
    return torch.rand(steps, 2, 2, size, size) * 3


@pytest.mark.one_in(5)
@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
@pytest.mark.parametrize("steps", [2, 3, 4, 9, 17])
def test_gradients_are_stocks(make, steps):
    x = frames(steps)
    found = []
    for net in pair(make):
        for _ in range(2):  # only the second knows from its start that steps follow
            total = outputs(net, x).square().mean()
            found.append([total.detach(), *gradients(net, total)])
    stock, stock_again, ours, ours_again = found
    assert_alike(stock, ours)
    assert_alike(stock_again, ours_again)
    assert sum(g.abs().sum() > 0 for g in stock[1:] if g is not None) > 6


def zero_an_episode(net, t):
    for module in net.modules():
        if isinstance(module, neuron.BaseNode) and t == 4:
            with torch.no_grad():
                module.v[0] = 0.0


def write_unseen(net, t):
    for module in net.modules():
        if isinstance(module, neuron.BaseNode) and t in (2, 3):
            module.v.data[1] *= 0.5


def cut(net, t):
    if t == 5:
        functional.detach_net(net)


def replace(net, t):
    for module in net.modules():
        if isinstance(module, neuron.BaseNode) and t == 2:
            module.v = module.v * 0.5 + 0.1


@pytest.mark.one_in(2)
@pytest.mark.parametrize("between", [zero_an_episode, write_unseen, cut, replace])
@pytest.mark.parametrize("make", [NEURONS["lif"], NEURONS["plif"]])
def test_what_a_script_does_to_membranes_between_two_steps(make, between):
    found = []
    for net in pair(make):
        outputs(net, frames(2)).sum().backward()
        found.append(gradients(net, outputs(net, frames(9), between).square().mean()))
    assert_alike(*found)


def test_losses_on_membranes_of_every_step():
    found = []
    for net in pair(NEURONS["lif"]):
        seen = []
        total = outputs(net, frames(6), lambda net, t: seen.append(net[5].v.square().mean()))  # noqa: B023
        found.append(gradients(net, total.sum() + sum(seen)))
    assert_alike(*found)


def test_several_backwards_and_parts_of_one():
    stock, ours = pair(NEURONS["lif"])
    found = []
    for net in (stock, ours):
        out = outputs(net, frames(8))
        early = gradients(net, out[4].sum(), retain_graph=True)
        first_layer = torch.autograd.grad(out[6].sum(), net[6].weight, retain_graph=True)
        whole = gradients(net, out.square().sum(), retain_graph=True)
        found.append([*early, *first_layer, *whole, *gradients(net, out.square().sum())])
    assert_alike(*found)


def test_a_membrane_that_two_steps_start_from():
    found = []
    for net in pair(NEURONS["lif"]):
        outputs(net, frames(3)).sum().backward()
        out = outputs(net, frames(4))
        states = [m.v for m in net.modules() if isinstance(m, neuron.BaseNode)]
        more = [net(frames(1)[0])]
        for module, v in zip(
            [m for m in net.modules() if isinstance(m, neuron.BaseNode)], states, strict=True
        ):
            module.v = v
        more.append(net(frames(2)[1]))
        found.append(gradients(net, out.sum() + sum(one.square().sum() for one in more)))
    assert_alike(*found)


def test_a_buffer_of_the_users_that_each_step_fills_again():
    """The first neuron's current is that very buffer."""

    def run(net):
        functional.reset_net(net)
        buffer, found = torch.empty(2, 8), []
        for t in range(6):
            with torch.no_grad():
                buffer.copy_(torch.linspace(-1, 2, 16).view(2, 8).roll(t, 1))
            found.append(net(buffer))
        return torch.stack(found)

    torch.manual_seed(0)
    stock = nn.Sequential(neuron.ParametricLIFNode(), nn.Linear(8, 8), neuron.IFNode())
    found = []
    for net in (stock, srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")):
        run(net).sum().backward()
        found.append(gradients(net, run(net).square().sum()))
    assert_alike(*found)


class Convolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", [False, True])
def test_a_convolution_runs_at_most_twice_a_step(norm):
    steps, layers = 12, 4
    _, net = pair(NEURONS["lif"], norm=norm)
    outputs(net, frames(2)).sum().backward()
    total = outputs(net, frames(steps)).square().mean()
    with Convolutions() as ran:
        total.backward()
    assert ran.count <= (2 if norm else 1) * steps * layers


@pytest.mark.parametrize(("steps", "least"), [(1, 20), (2, 7), (4, 7), (8, 10), (32, 15)])
@pytest.mark.one_in(3)
def test_few_membranes_are_held(steps, least):
    found = []
    for net in pair(NEURONS["if"], width=16, norm=False):
        x = frames(steps, 32)
        outputs(net, x).square().mean().backward()
        found.append(count_step(lambda net=net, x=x: outputs(net, x).square().mean()))
    (stock, stock_peak), (held, peak) = found
    assert stock > least * held
    assert peak < stock_peak
