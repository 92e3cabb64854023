"""What modules hold: found, copied, put back and cut, wherever it is."""

import pytest
import torch
from torch import nn

snntorch = pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")
from spikingjelly.activation_based import layer, neuron  # noqa: E402

from snn_reversible_plugin.modules.as_it_ran import RandomNumbers, unchanged  # noqa: E402
from snn_reversible_plugin.modules.states import (  # noqa: E402
    Contents,
    Snapshot,
    holds_states,
    reset_states,
    states_of,
)
from snn_reversible_plugin.ops.autocast import Autocast, without_autocast  # noqa: E402


class Holder(nn.Module):
    """States of every kind: neurons of both frameworks, attributes, buffers, and nested ones."""

    def __init__(self):
        super().__init__()
        self.lif, self.leaky = neuron.LIFNode(), snntorch.Leaky(0.9, init_hidden=True)
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("replaced", torch.zeros(3))
        self.trace, self.calls, self.log = torch.zeros(3), 0, [{"v": torch.zeros(3)}]

    def forward(self, x):
        x = self.leaky(self.lif(x * self.weight) + self.trace)
        self.trace = self.trace + x
        self.mean += x.detach()
        self.replaced = self.replaced + 1
        self.calls += 1
        self.log[0]["v"] = self.log[0]["v"] + x
        self.log.append(torch.rand(3))
        self.late = x
        return x


def held(model):
    tensors = [*model.buffers(), model.trace, model.log[0]["v"], model.lif.v, model.leaky.mem]
    values = [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in tensors]
    return [*values, model.calls, len(model.log), hasattr(model, "late"), model.training]


def equal(a, b):
    def same(x, y):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.equal(x, y)
        return type(x) is type(y) and x == y

    return all(map(same, a, b))


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_unchanged_puts_everything_back(started, fails):
    torch.manual_seed(0)
    model, x = Holder(), torch.full((3,), 0.7)
    if started:
        model(x).sum().backward()
    gradient = model.weight.grad
    before, random = held(model), torch.get_rng_state()
    graphs = model.trace.grad_fn, model.log[0]["v"].grad_fn
    try:
        with unchanged(model):
            assert model.trace.grad_fn is None
            assert model.log[0]["v"].grad_fn is None
            model.eval()
            for _ in range(2):
                model(x).sum().backward(retain_graph=True)
            assert not equal(held(model), before)
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert equal(held(model), before)
    assert (model.trace.grad_fn, model.log[0]["v"].grad_fn) == graphs
    assert torch.equal(torch.get_rng_state(), random)
    assert model.weight.grad is gradient


def test_a_snapshot_gives_back_the_objects_and_contents_what_is_inside():
    model = Holder()
    modules = list(model.modules())
    before, contents = Snapshot(modules, buffers=True), Contents(modules)
    objects, inside = (model.trace, model.replaced), model.log[0]["v"]
    model(torch.rand(3))
    before.put_back()
    assert model.trace is objects[0]
    assert model.replaced is objects[1]
    assert not hasattr(model, "late")
    assert len(model.log) == 2
    contents.put_back()
    assert len(model.log) == 1
    assert model.log[0]["v"] is inside


def test_what_holds_states():
    assert holds_states(neuron.PSN(2))  # a neuron without any, and without a base class of neurons
    assert states_of(neuron.PSN(2)) is None
    assert states_of(layer.Dropout()) == {"mask": None}
    assert not holds_states(layer.Linear(2, 2))
    assert not holds_states(nn.Linear(2, 2))
    leaky = snntorch.Leaky(0.9)
    assert states_of(leaky) is leaky._buffers


def test_reset_makes_both_frameworks_fresh():
    model = Holder()
    model(torch.full((3,), 3.0))
    reset_states(model)
    assert model.lif.v == 0.0
    assert model.leaky.mem.shape == ()
    assert model.leaky.beta == torch.tensor(0.9)  # a buffer, and no state


def test_random_numbers_go_on_after_they_were_drawn_again():
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    first = RandomNumbers([torch.device("cpu"), torch.device("meta")])
    assert first.unused()
    drawn = torch.rand(2)
    with first.again():
        assert torch.equal(torch.rand(2), drawn)
    assert torch.equal(torch.rand(2), expected[2:])
    assert not first.unused()


@pytest.mark.parametrize("cache", [False, True])
def test_autocast_is_had_again_and_left(cache):
    with torch.autocast("cpu", torch.float16, cache_enabled=cache):
        forward = Autocast()
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu")
            plain = Autocast()
        assert torch.is_autocast_enabled("cpu")
        with plain.again():
            assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    for keeps in (False, True):
        with forward.again(cache=keeps):
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") is torch.float16
            assert torch.is_autocast_cache_enabled() == (cache and keeps)
    with without_autocast():
        assert not torch.is_autocast_enabled("cpu")
