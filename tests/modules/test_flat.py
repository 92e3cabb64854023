"""Nested Sequentials run as one: what a layer was given goes as soon as the next one has it."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.modules.flat import make_flat
from snn_reversible_plugin.modules.tracking import tracked

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")


class Watching(nn.Module):
    """Adds one, and notes how many of the tensors that came by are alive."""

    def __init__(self, came_by):
        super().__init__()
        self.came_by, self.alive = [came_by], None

    def forward(self, x):
        (came_by,) = self.came_by
        came_by.append(weakref.ref(x))
        y = x + 1
        self.alive = sum(ref() is not None for ref in came_by)
        return y


def nested(came_by=None):
    came_by = [] if came_by is None else came_by
    inner = nn.Sequential(Watching(came_by), nn.Sequential(Watching(came_by), Watching(came_by)))
    return nn.Sequential(Watching(came_by), inner, Watching(came_by))


def alive_in(net):
    with torch.no_grad():
        net(torch.zeros(3) + 0)
    return [module.alive for module in net.modules() if isinstance(module, Watching)]


def test_a_layer_holds_its_input_and_the_callers():
    net = nested()
    # The first input is the caller's; the inner ones are what the Sequentials inside were called with.
    assert alive_in(net) == [1, 2, 3, 4, 2]
    net = nested()
    make_flat([*net.modules()])
    assert alive_in(net) == [1, 2, 2, 2, 2]
    with tracked(net, type("Tracker", (), {"where": None})()):  # a report sees the peak that there is
        net[2].came_by[0].clear()
        assert alive_in(net) == [1, 2, 2, 2, 2]


def test_whoever_hooks_into_a_sequential_sees_its_call():
    net, seen = nested(), []
    make_flat([*net.modules()])
    net[1].register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    net[1][1].register_forward_hook(lambda _m, args, out: seen.append((float(args[0]), float(out))))
    assert float(net(torch.zeros(()))) == 6
    assert seen == [(3, 5)]


class Odd(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed([*super().__iter__()])


@pytest.mark.parametrize("kind", [Odd, Backwards])
def test_one_that_runs_otherwise_is_called(kind):
    net = nn.Sequential(nn.Linear(2, 2), kind(nn.Linear(2, 2), nn.ReLU()))
    x = torch.randn(5, 2)
    expected = net(x)
    make_flat([*net.modules()])
    assert type(net[1]) is kind
    assert torch.equal(expected, net(x))


def test_names_are_right_behind_an_exception():
    class Fails(nn.Module):
        def forward(self, x):
            raise OverflowError

    net = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Sequential(Fails())))
    make_flat([*net.modules()])
    tracker = type("Tracker", (), {"where": "outside"})()
    with tracked(net, tracker):
        with pytest.raises(OverflowError):
            net(torch.ones(2))
        assert tracker.where == "outside"


def test_a_network_is_flat_in_mode_minimal_and_copies_and_pickles_are():
    def build():
        return nn.Sequential(nn.Sequential(nn.Linear(3, 4), neuron.IFNode(step_mode="m")), nn.Linear(4, 2))

    net, x = build(), torch.rand(5, 6, 3)
    expected = net(x)
    net[0][1].reset()
    srp.convert_to_reversible(net, mode="minimal")
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(one) is type(net) is not nn.Sequential
        assert type(one[0]) is type(net[0]) is not nn.Sequential
        assert torch.equal(expected, one(x))
        assert type(srp.restore(one)) is type(one[0]) is nn.Sequential
