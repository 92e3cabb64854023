"""A layer says when it is the last to use its input, and at no other time."""

import copy
import pickle
from contextlib import nullcontext
from functools import reduce

import pytest
import torch
from torch import nn

from snn_reversible_plugin.modules.last_use import tell_last_uses, tell_no_more
from snn_reversible_plugin.tape.sliced.alone import is_alone, learn, references


class Told:
    """Notes whose last use it was, by the counts that a recording would compare."""

    def __init__(self):
        self.alone, self.ways, self.taken_, self._trying = [], [], [], None

    def is_worth(self, value):
        return True

    def take(self, value, layer, way, calls):
        if self._trying is not None:
            if way == self._trying:
                is_alone(way, references(value))
            return
        found = is_alone(way, references(value))
        if not found and way not in self.ways:
            self._trying = way
            learn(way, lambda x: calls(way, self, x))
            self._trying = None
            self.ways.append(way)
        self.alone.append((found, way.at_once))

    def taken(self, value, failed):
        if self._trying is None:
            self.taken_.append(failed)


told = Told()


def between():
    return told


@pytest.fixture(autouse=True)
def fresh():
    told.__init__()


def made(forward, layers=3):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv1d(2, 2, 1) for _ in range(layers))
            self.kept = []

    Network.forward = forward
    net = Network()
    tell_last_uses(net.modules(), between)
    return net


def told_of(forward):
    """What was told of the second layer of a network, which has seen the calls before."""
    net = made(forward)
    for _ in range(3):
        told.alone.clear()
        net.kept.clear()
        net(torch.rand(2, 4))
    return told.alone


def written_next(self, x):
    y = self.a(x)
    y = self.b(y)
    return y + 1


def returned(self, x):
    y = self.a(x)
    return self.b(y)


def in_a_loop(self, x):
    y = self.a(x)
    for layer in (self.b, self.c):
        y = layer(y)
    return y


def no_variables(self, x):
    return self.c(self.b(self.a(x) * 1))


@pytest.mark.parametrize("forward", [written_next, returned, in_a_loop, no_variables])
def test_at_once(forward):
    found = told_of(forward)
    assert (True, True) in found
    assert all(alone and at_once for alone, at_once in found if alone)


def test_a_view_and_a_functions_result():
    def forward(self, x):
        y = self.a(x).view(2, 2, 2)
        y = y.flatten(1)
        y = self.b(y)
        return y

    assert (True, True) in told_of(forward)


def test_written_later():
    def forward(self, x):
        y = self.a(x)
        y = self.b(y) * x
        return y

    assert told_of(forward) == [(True, False)]


def read_later(self, x):
    y = self.a(x)
    z = self.b(y)
    return y + z


def read_in_a_branch(self, x):
    y = self.a(x)
    z = self.b(y)
    if len(x) > 99:
        z = y + z
    return z


def read_by_the_next_turn(self, x):
    y = self.a(x)
    for _ in range(2):
        z = self.b(y)
    return z


def of_one_of_two(self, x):
    y, z = self.a(x), self.a(x)
    z = self.b(y if len(x) > 1 else z)
    return y + z


def in_a_closure(self, x):
    y = self.a(x)

    def again():
        return y

    y = self.b(y)
    return again()


def with_a_handler(self, x):
    y = self.a(x)
    with nullcontext():
        y = self.b(y)
    return y


def with_names(self, x):
    y = self.a(x)
    locals()
    y = self.b(y)
    return y


def by_two_arguments(self, x):
    y = self.a(x)
    y = self.b(*[y])
    return y


def by_name(self, x):
    y = self.a(x)
    y = self.b(input=y)
    return y


def straight_to_forward(self, x):
    y = self.a(x)
    y = self.b.forward(y)
    return y


def from_python_of_others(self, x):
    return reduce(lambda y, layer: layer(y), [self.b, self.c], self.a(x))


def an_argument(self, x):
    x = self.a(x)
    return x


@pytest.mark.parametrize(
    "forward",
    [
        read_later, read_in_a_branch, read_by_the_next_turn, of_one_of_two, in_a_closure, with_a_handler,
        with_names, by_two_arguments, by_name, straight_to_forward, from_python_of_others, an_argument,
    ],
    ids=lambda forward: forward.__name__,
)  # fmt: skip
def test_not_where_somebody_reads_it(forward):
    assert not any(alone for alone, _ in told_of(forward))


def kept_in_a_list(self, x):
    y = self.a(x)
    self.kept.append(y)
    y = self.b(y)
    return y


def kept_detached(self, x):
    y = self.a(x)
    self.kept.append(y.detach())
    y = self.b(y)
    return y


def kept_in_part(self, x):
    y = self.a(x)
    self.kept.append(y[0])
    y = self.b(y)
    return y


def kept_by_numpy(self, x):
    y = self.a(x)
    self.kept.append(y.detach().numpy())
    y = self.b(y)
    return y


def kept_by_another_name(self, x):
    y = z = self.a(x)
    y = self.b(y)
    return y + z


def kept_by_a_walrus(self, x):
    return self.b(y := self.a(x)) + y


def kept_by_a_node(self, x):
    y = self.a(x).exp()
    y = self.b(y)
    return y


@pytest.mark.parametrize(
    "forward",
    [
        kept_in_a_list, kept_detached, kept_in_part, kept_by_numpy, kept_by_another_name, kept_by_a_walrus,
        kept_by_a_node,
    ],
    ids=lambda forward: forward.__name__,
)  # fmt: skip
def test_nor_where_somebody_holds_it(forward):
    assert not any(alone for alone, _ in told_of(forward))


def test_nor_where_a_hook_sees_it():
    net = made(written_next)
    net.b.register_forward_hook(lambda _module, inputs, _out: net.kept.append(inputs))
    for _ in range(3):
        told.alone.clear()
        net(torch.rand(2, 4))
    assert not any(alone for alone, _ in told.alone)


def test_nor_where_someone_traces(monkeypatch):
    net = made(written_next)
    for _ in range(2):
        net(torch.rand(2, 4))
    told.alone.clear()
    monkeypatch.setattr("sys.gettrace", lambda: print)
    net(torch.rand(2, 4))
    assert not any(alone for alone, _ in told.alone)


def test_a_layer_that_raises_says_so():
    net = made(written_next)
    net(torch.rand(2, 4))
    told.taken_.clear()
    net.b = nn.Conv1d(3, 3, 1)
    tell_last_uses([net.b], between)
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.rand(2, 4))
    assert told.taken_ == [False, True]


def test_types_stay_and_copies_tell_as_well():
    net = made(written_next)
    assert type(net.a) is nn.Conv1d
    tell_last_uses(net.modules(), between)  # once is enough
    assert len(net.a._forward_pre_hooks) == len(net.a._forward_hooks) == 1
    for layer in (copy.deepcopy(net.b), pickle.loads(pickle.dumps(net.b))):
        net.b = layer
        for _ in range(2):
            told.alone.clear()
            net(torch.rand(2, 4))
        assert (True, True) in told.alone
    for layer in (net.a, net.b):
        tell_no_more(layer)
        assert layer.__dict__.keys() == nn.Conv1d(2, 2, 1).__dict__.keys()
        assert not (layer._forward_pre_hooks or layer._forward_hooks or layer._forward_hooks_always_called)
