"""Blocks that run at once: the sum of their branches, undone bit for bit, batched where they are alike."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks.parallel import Group
from snn_reversible_plugin.grid import snap
from snn_reversible_plugin.models.parts import conv_norm
from snn_reversible_plugin.reports.measure import count_step
from tests.blocks.test_chain import against_plain, assert_same, chain


def parts_chain(depth=4, channels=4, node=lambda: neuron.LIFNode(step_mode="m"), **kwargs):
    def branch():
        both = [conv_norm(channels, channels, 3), conv_norm(channels, channels, 1)]
        return nn.Sequential(node(), *both[0], node(), *both[1])

    torch.manual_seed(0)
    return srp.RevSSequence([srp.RevSBlock(branch(), branch()) for _ in range(depth)], **kwargs)


def batch(channels=4, seed=1):
    torch.manual_seed(seed)
    return torch.randn(3, 2, 2 * channels, 5, 4).mul_(2)


def one_by_one(model):
    """A hook on a module inside keeps branches apart."""
    for block in model.blocks:
        for name in ("f", "g"):
            getattr(block, name)[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", [chain, parts_chain])
@pytest.mark.parametrize("parallel", [2, 3, 8])
@pytest.mark.parametrize("states", ["carry", "reset"])
def test_it_trains_as_the_plain_run(kind, parallel, states):
    model = kind(depth=4, states=states)
    model.parallel, model.check = parallel, True
    x = batch(2 if kind is chain else 4)
    against_plain(model, x, calls=2 if states == "carry" else 1)
    assert model.last_rebuild.flipped_bits == model.last_rebuild.flipped_spikes == 0
    against_plain(model.eval(), x)


@pytest.mark.parametrize("node", ["if", "plif"])
def test_unlike_branches_dropout_and_learned_neurons_run_one_by_one(node):
    model = chain(depth=3, node=node, p=0.3)
    model.parallel = 3
    against_plain(model, batch(2))
    model.blocks[1].f = nn.Sequential(neuron.QIFNode(step_mode="m"), layer.Conv2d(2, 2, 1, step_mode="m"))
    against_plain(model, batch(2))


def is_one_call(model):
    group = Group(model.blocks)
    return group.f.is_one_call(batch()), group.g.is_one_call(batch())


def test_which_branches_are_one_call():
    assert is_one_call(parts_chain()) == (True, True)
    assert is_one_call(one_by_one(parts_chain())) == (False, False)
    changes = [
        lambda f: setattr(f[0], "v_threshold", 0.5),
        lambda f: setattr(f[0], "store_v_seq", True),
        lambda f: setattr(f[0], "v", torch.zeros(2, 4, 5, 4)),
        lambda f: f.__setitem__(1, nn.Identity()),
        lambda f: f[2].eval(),
        lambda f: f.append(nn.Identity()),
        lambda f: setattr(f[1], "padding_mode", "circular"),
        lambda f: setattr(f[2], "eps", 1e-3),
    ]
    for change in changes:
        model = parts_chain()
        change(model.blocks[1].f)
        assert is_one_call(model) == (False, True), change
    shared = parts_chain()
    shared.blocks[1].f[1] = shared.blocks[0].f[1]
    assert is_one_call(shared) == (False, True)


def test_one_call_is_the_sum_of_the_branches():
    model = parts_chain(depth=3, channels=6, states="carry").double()
    model.parallel = 3
    other = one_by_one(copy.deepcopy(model))
    found = []
    for m in (model, other):
        x = batch(6).double().requires_grad_()
        out = m(x)
        out.square().sum().backward()
        statistics = [value.double() for value in m.buffers()]
        membranes = [module.v for module in m.modules() if isinstance(module, neuron.BaseNode)]
        found.append([out, x.grad, *(p.grad for p in m.parameters()), *statistics, *membranes])
    assert len(found[0]) == len(found[1]) == 2 + 3 * 2 * (2 + 4 + 6 + 2)
    for a, b in zip(*found, strict=True):
        # On a grid of 2^-16 the last bits of a sum decide between two neighbours, seldom.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_it_is_the_equations():
    model = parts_chain(depth=2, states="reset")
    plain = one_by_one(copy.deepcopy(model))
    model = one_by_one(model)
    model.parallel = 2
    x1, x2 = (snap(x) for x in batch().chunk(2, 2))
    y1 = x1 + snap(plain.blocks[0].f(x2) + plain.blocks[1].f(x2))
    y2 = x2 + snap(plain.blocks[0].g(y1) + plain.blocks[1].g(y1))
    assert torch.equal(model(batch()), torch.cat((y1, y2), 2))


@pytest.mark.slow
def test_held_memory_is_flat_and_reset_and_copies_work():
    held = {}
    for depth in (8, 32):
        model, x = parts_chain(depth), batch()
        model.parallel = 4
        held[depth] = count_step(lambda model=model, x=x: model(x).sum())[0]
        functional.reset_net(model)
        assert all(module.v == 0.0 for module in model.modules() if isinstance(module, neuron.BaseNode))
    assert held[32] <= 1.02 * held[8]
    model = parts_chain(4, parallel=2, states="reset")
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert "parallel=2" in repr(twin)
    assert_same([model(batch())], [twin(batch())])


@pytest.mark.parametrize("parallel", [0, 1.5, "all"])
def test_numbers_that_are_none_are_refused(parallel):
    with pytest.raises(ValueError, match="parallel must be a number of blocks"):
        parts_chain(parallel=parallel)
