"""The membrane that a converted network leaves behind: stock's, whenever and however it is read."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron, surrogate

import snn_reversible_plugin as srp
from reading_states import SCRIPTS as READING
from reading_states import (
    membranes,
    reads_before_backward,
)
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.tape.final_membrane import FinalMembrane, Memories, _promises

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.parametrize("device", DEVICES)

NEURONS = {
    "if": lambda: neuron.IFNode(),
    "lif": lambda: neuron.LIFNode(tau=1.7, detach_reset=True, surrogate_function=surrogate.ATan()),
    "soft": lambda: neuron.LIFNode(v_reset=None, decay_input=False),
    "plif": lambda: neuron.ParametricLIFNode(v_reset=-0.1),
}


def network(make, device):
    torch.manual_seed(0)
    parts = [layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), make()]
    parts += [layer.Conv2d(4, 3, 3), layer.BatchNorm2d(3), make()]
    model = nn.Sequential(*parts).to(device)
    functional.set_step_mode(model, "m")
    return model


def batch(device, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return torch.randn(4, 2, 2, 6, 5, dtype=dtype).mul_(2).to(device)


def outcome(script, make, device, convert):
    model = network(make, device)
    if convert:
        srp.convert_to_reversible(model)
    found = script(model, batch(device))
    return found + [p.grad for p in model.parameters()]


def same(script, make, device):
    stock, ours = (outcome(script, make, device, convert) for convert in (False, True))
    assert len(stock) == len(ours) > 8
    for a, b in zip(stock, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
            assert a.requires_grad == b.requires_grad


def asks_for_a_part(model, x):
    hidden = model[:3](x)
    out = model[3:](hidden)
    (part,) = torch.autograd.grad(out.sum(), hidden, retain_graph=True)
    out.square().sum().backward()
    return [part, *membranes(model)]


def resets_between(model, x):
    first = model(x)
    functional.reset_net(model)
    second = model(x.flip(0))
    (first * second).sum().backward()
    functional.reset_net(model)
    assert membranes(model) == [model[2].v_reset or 0.0, model[5].v_reset or 0.0]
    return [first, second]


def sets_it(model, x):
    out = model(x)
    model[2].v = torch.full((2, 4, 6, 5), 0.5, device=x.device)
    (out + model(x)).sum().backward()
    return membranes(model)


def another_shape(model, x):
    out = model(x).sum() + model(x[:, :1]).sum() + model(x[:2, :, :, :5]).sum()
    out.backward()
    return membranes(model)


def channels_last(model, x):
    x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    return reads_before_backward(model, x)


SCRIPTS = [
    *READING,
    asks_for_a_part,
    resets_between,
    sets_it,
    another_shape,
    channels_last,
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_it_is_stocks(script, name, device):
    same(script, NEURONS[name], device)


def promised(model):
    return [
        value for m in model if "_memories" in m.__dict__ for value in dict.values(m._memories)
        if isinstance(value, FinalMembrane)
    ]  # fmt: skip


def test_nothing_is_held_for_it_until_the_backward(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    x = torch.randn(4, 16, 2, 12, 12, device=device)
    model(x).sum().backward()  # what the first step makes stays
    functional.reset_net(model)
    with AllocationCounter() as counter:
        loss = model(x).sum()
        held = counter.live
        assert len(promised(model)) == 2
        size = sum(v.numel() * 4 for v in membranes(model))
        assert counter.live - held > 0.99 * size
        assert not promised(model)
    del loss
    assert held < size


def test_a_backward_fulfils_every_promise_and_lets_go(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    loss = model(batch(device)).sum()
    mine = promised(model)
    assert all(one in _promises() for one in mine)
    loss.backward()
    for one in mine:
        assert one not in _promises()
        assert one._held == ()
        assert one.empty() is None


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


def test_a_reset_before_the_backward_computes_nothing(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    loss = model(batch(device)).sum()
    with Counting() as counting:
        functional.reset_net(model)
    assert counting.convolutions == 0
    assert all(v == 0.0 for v in membranes(model))
    loss.backward()
    assert all(v == 0.0 for v in membranes(model))


def test_a_carried_state_is_computed_once(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    model(batch(device))
    with Counting() as counting:
        model(batch(device))
        assert not promised(model)
        model(batch(device))
    assert counting.convolutions == 2 * 2 + 2  # two sequences, and the first one's currents again


def test_weights_changed_behind_its_back_are_found(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    model(batch(device))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _ = model[2].v


def test_no_promise_without_a_tape_or_where_the_states_are_asked_for(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    with torch.no_grad():
        model(batch(device))
    assert not promised(model)
    functional.reset_net(model)
    with srp.stock(model):
        model(batch(device))
    assert not promised(model)
    functional.reset_net(model)
    model[2].store_v_seq = True
    model(batch(device))
    assert len(promised(model)) == 2


def test_every_way_to_look_into_the_states(device):
    expected = outcome(reads_before_backward, NEURONS["lif"], device, convert=False)[0]
    ways = [
        lambda m: m.v,
        lambda m: m._memories["v"],
        lambda m: m._memories.get("v"),
        lambda m: next(iter(m._memories.values())),
        lambda m: next(iter(m.memories())),
        lambda m: dict(m.named_memories())["v"],
        lambda m: dict(m._memories)["v"],
        lambda m: {**m._memories}["v"],
        lambda m: m._memories.copy()["v"],
        lambda m: copy.copy(m._memories)["v"],
        lambda m: m._memories.pop("v"),
        lambda m: m._memories.setdefault("v", None),
    ]
    for way in ways:
        model = srp.convert_to_reversible(network(NEURONS["lif"], device))
        model(batch(device))
        assert isinstance(dict.__getitem__(model[2]._memories, "v"), FinalMembrane)
        assert torch.equal(way(model[2]), expected)
    assert model[2]._memories.get("w", 7) == 7
    with pytest.raises(KeyError):
        model[2]._memories["w"]


def test_copies_and_pickles_are_plain(device):
    model = srp.convert_to_reversible(network(NEURONS["lif"], device))
    model(batch(device)).sum().backward()
    assert type(model[2]._memories) is Memories
    model[2].detach()
    model[5].detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[2]._memories) is dict
        for ours, theirs in zip(membranes(model), membranes(twin), strict=True):
            assert torch.equal(ours, theirs)
