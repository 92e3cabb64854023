"""Loops over time that users write: what is held of them, and that rebuilding them takes linear time."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import snn_reversible_plugin as srp
from own_neurons import Alternating, Fire, Scale, gradients, lif, scan, spikes, times_less
from snn_reversible_plugin import tape
from snn_reversible_plugin.tape.recipes import Refused


class Operations(TorchDispatchMode):
    """Counts operations by name, and in ``all``."""

    def __init__(self):
        super().__init__()
        self.counts, self.all = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        self.counts[name] = self.counts.get(name, 0) + 1
        self.all += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("neuron", "least"), [(lif, 100), (scan, 70)])
@pytest.mark.parametrize("steps", [4, 8, 16])
def test_currents_of_one_layer_are_computed_once(neuron, least, steps):
    """However many steps a membrane is away from its start, one matrix product leads to it."""
    net = Alternating(neuron, [nn.Linear(256, 256) for _ in range(3)])
    assert times_less(net, spikes(steps))[0] > least


@pytest.mark.one_in(2)
@pytest.mark.parametrize("steps", [20, 32, 200])
def test_a_long_loop_keeps_one_step_in_many(steps):
    net = Alternating(scan, [Scale(128) for _ in range(3)])
    assert times_less(net, spikes(steps, 128))[0] > 40


@pytest.mark.parametrize("neuron", [lif, scan])
def test_each_operation_runs_once_in_each_backward(neuron):
    """Also in a second one: the number of operations is linear in the number of steps."""
    ran = {}
    for steps in (12, 24):
        net = Alternating(neuron, [nn.Linear(16, 16) for _ in range(2)])
        with tape.recording():
            loss = net(spikes(steps, 16, 4)).mean()
        found = []
        for again in (True, True, False):
            with Operations() as operations:
                torch.autograd.grad(loss, list(net.parameters()), retain_graph=again)
            found.append(operations)
        first, second, third = found
        assert first.counts == second.counts == third.counts
        assert first.counts["addmm"] == 2
        ran[steps] = first.all
    assert ran[24] < 2.2 * ran[12]


def test_several_backwards_give_stocks_gradient():
    net, x = Alternating(scan, [nn.Linear(16, 16) for _ in range(2)]), spikes(9, 16, 4)

    def twice(loss):
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        return gradients(net)

    expected = twice(net(x).square().sum())
    with tape.recording():
        loss = net(x).square().sum()
    for stock, ours in zip(expected, twice(loss), strict=True):
        assert torch.equal(stock, ours)


def test_a_backward_through_a_part_leaves_nothing_behind():
    """The other loss still needs the current, and finds it rebuilt: later, not now."""
    layer = nn.Linear(64, 64)
    with tape.recording():
        current = layer(spikes(1, 64, 32)[0])
        one, other = Fire.apply(current - 1).sum(), (current * current).sum()
        handle = tape.handle_of(current)
    one.backward(retain_graph=True)
    assert handle.cache is None
    other.backward()
    assert handle.cache is None
    assert layer.weight.grad.abs().sum() > 0


def test_looking_at_a_node_of_the_graph_is_linear():
    """Outside of a backward no walk counts, and each operation runs once all the same."""
    weight, ran = torch.rand(4, 4, requires_grad=True), []
    for steps in (20, 40):
        with tape.recording():
            v = weight * 1
            for _ in range(steps):
                v = v + (weight - v) / 2
            squared = v * v
        with torch.no_grad(), Operations() as operations:
            saved = squared.grad_fn._saved_self
        assert torch.equal(saved, v)
        assert operations.counts["div"] == steps
        ran.append(operations.all)
    assert ran[1] < 2.2 * ran[0]


def test_a_chain_of_a_thousand_operations(monkeypatch):
    from snn_reversible_plugin.tape import recipes

    monkeypatch.setattr(recipes, "MAX_DEPTH", 10**6)
    weight = torch.rand(8, requires_grad=True)

    def chain():
        v = weight * 1
        for _ in range(3000):
            v = v * 1.0001 + 0.001
        return (v * v).sum()

    (expected,) = torch.autograd.grad(chain(), weight)
    with tape.recording():
        loss = chain()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


def test_steps_that_are_convolved_one_by_one_and_stacked():
    """A stack of T steps' convolutions has run one, as far as its size goes."""

    class Steps(nn.Conv2d):
        def forward(self, x_seq):
            return torch.stack([super(Steps, self).forward(x) for x in x_seq])

    def make(*channels):
        return Steps(*channels, 3, padding=1, bias=False)

    net = nn.Sequential(Alternating(scan, [make(2, 8), make(8, 8), make(8, 8)]))
    assert times_less(net, (torch.rand(6, 4, 2, 24, 24) > 0.5).float())[0] > 40


def test_mode_speed_runs_no_product_again():
    net = Alternating(lif, [nn.Linear(32, 32) for _ in range(2)])
    with tape.recording("speed"):
        loss = net(spikes(5, 32, 4)).mean()
    with Operations() as operations:
        loss.backward()
    assert "addmm" not in operations.counts


def test_different_products_are_limited():
    """Each step adds a product of its own, so that there is an anchor now and then."""
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
    x = torch.rand(32, 64)

    def forward():
        v = x
        for layer in layers:
            v = v + layer(Fire.apply(x - 0.5))
        return (v * v).sum()

    expected = torch.autograd.grad(forward(), list(layers.parameters()))
    with tape.recording():
        loss = forward()
    with Operations() as operations:
        found = torch.autograd.grad(loss, list(layers.parameters()))
    for stock, ours in zip(expected, found, strict=True):
        assert torch.equal(stock, ours)
    assert operations.counts.get("addmm", 0) <= 5  # those between the last anchor and the end


class Recurrent(nn.Module):
    """Two products a step, and a leak that is learned."""

    def __init__(self, features):
        super().__init__()
        self.forth, self.back = nn.Linear(features, features), nn.Linear(features, features)
        self.leak = nn.Parameter(torch.zeros(features))

    def forward(self, x_seq):
        v = s = torch.zeros_like(x_seq[0])
        out = []
        for x in x_seq:
            v = v * torch.sigmoid(self.leak) * (1 - s) + self.forth(x) + self.back(s)
            s = Fire.apply(v - 0.1)
            out.append(s)
        return torch.stack(out)


@pytest.mark.parametrize(("steps", "anchors", "least"), [(25, 6, 16), (100, 15, 25)])
def test_products_of_a_recurrent_loop_are_run_once_and_its_anchors_grow_as_their_root(
    steps, anchors, least
):
    net, x = Recurrent(64), spikes(steps, 64, 32)
    held, peak = times_less(net, x)
    assert held > least and peak > 1.5
    kept = []

    class Observer:
        def computed(self, where, operator, out, refused):
            if refused == Refused.WORK:
                kept.append(operator.name)

        def packed(self, where, tensor, handle):
            pass

    with tape.recording(observer=Observer()):
        loss = net(x).mean()
    assert 2 < len(kept) <= anchors
    with Operations() as operations:
        loss.backward()
    assert operations.counts["addmm"] <= 2 * steps


def test_float_residual_sums_are_anchored_now_and_then():
    class Half(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(channels)

        def forward(self, x):
            return self.bn(self.conv(Fire.apply(x - 0.5)))

    class Block(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *[Block(Half(16), Half(16)) for _ in range(16)])
    held, peak = times_less(net, torch.rand(8, 3, 16, 16))
    assert held > 20 and peak > 5


class Online(nn.Module):
    """A step a call, as online training has it: a membrane that is detached, and a trace of spikes."""

    def __init__(self):
        super().__init__()
        self.charge, self.read = nn.Linear(32, 32), nn.Linear(64, 4)
        self.v = self.trace = torch.zeros(8, 32)

    def forward(self, x):
        self.v = self.v.detach() * 0.5 + self.charge(x)
        spike = Fire.apply(self.v - 0.5)
        self.v = self.v - spike.detach() * 0.5
        with torch.no_grad():
            self.trace = self.trace * 0.5 + spike
        both = torch.cat((spike, self.trace.clone().detach()))
        return self.read(torch.cat((both[:8], both[8:]), 1))


def test_a_detached_state_ends_its_history():
    """The backward of a step runs none of the steps before it again."""
    found, ran = [], []
    for converted in (False, True):
        torch.manual_seed(0)
        net = Online()
        if converted:
            with pytest.warns(UserWarning, match="no spiking neuron"):
                srp.convert_to_reversible(net)
        gradients = []
        for x in spikes(6, 32, 8):
            loss = net(x).square().sum()
            with Operations() as operations:
                gradients.append(torch.autograd.grad(loss, list(net.parameters())))
            ran.append(operations.counts.get("addmm", 0))
        found.append(gradients)
    for stock, ours in zip(*found, strict=True):
        assert all(map(torch.equal, stock, ours))
    assert max(ran) <= 1  # its own current, which leads to the membrane that its surrogate saw
