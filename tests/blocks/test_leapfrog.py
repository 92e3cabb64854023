"""Leapfrog coupling: the recurrence that it says, undone bit for bit, with the stock network's weights."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks.wrapped import wrapped_chains
from snn_reversible_plugin.grid import snap
from snn_reversible_plugin.reports.measure import count_step
from tests.blocks.test_surgery import against_plain, sew, train


class Residual(nn.Module):
    """x + branch(x), with a branch of small values."""

    def __init__(self, channels=4):
        super().__init__()
        conv = layer.Conv2d(channels, channels, 3, padding=1, step_mode="m")
        nn.init.normal_(conv.weight, std=0.05)
        self.branch = nn.Sequential(neuron.LIFNode(step_mode="m"), conv)

    def residual_branches(self):
        return self.branch

    def forward(self, x):
        return x + self.branch(x)


def network(depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*(Residual() for _ in range(depth)))


def batch(seed=1):
    torch.manual_seed(seed)
    return torch.randn(3, 2, 4, 5, 5)


@pytest.mark.parametrize("depth", [2, 6])
def test_it_is_the_recurrence(depth):
    model, x = network(depth), batch()
    plain = copy.deepcopy(model)
    report = srp.wrap_residual_blocks(model, coupling="leapfrog")
    assert len(report.chains) == 1 and "x[n+1] = x[n-1] + 2 f[n](x[n])" in report.to_dict()["meaning"]
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = model(leaf)
    before, now = snap(other), snap(other)
    for number, block in enumerate(plain):
        before, now = now, before + snap((2 if number else 1) * block.branch(now))
    assert torch.equal(out, now)
    for result in (out, now):
        result.square().sum().backward()
    assert torch.equal(leaf.grad, other.grad)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_sew_resnet_trains_as_the_plain_run_of_the_chain():
    for convert in (lambda model: model, srp.convert_to_reversible):
        torch.manual_seed(0)
        model = sew()
        srp.wrap_residual_blocks(model, coupling="leapfrog")
        against_plain(convert(model), torch.randn(2, 1, 3, 32, 32))


def test_state_dict_unwrapping_and_copies():
    model = network()
    expected = train(copy.deepcopy(model), batch())
    keys = list(model.state_dict())
    srp.wrap_residual_blocks(model, coupling="leapfrog")
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(train(model, batch()), train(twin, batch()), strict=True))
    model.load_state_dict(network().state_dict())
    found = train(srp.unwrap_residual_blocks(model), batch())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_deep_chains_are_rebuilt_exactly_and_held_memory_is_flat():
    held = {}
    for depth in (8, 100):
        model, x = network(depth), batch()
        srp.wrap_residual_blocks(model, coupling="leapfrog")
        (wrapped,) = wrapped_chains(model)
        wrapped.chain.check = True
        model(x).sum().backward()
        assert wrapped.chain.last_rebuild.flipped_bits == wrapped.chain.last_rebuild.flipped_spikes == 0
        wrapped.chain.check = False
        functional.reset_net(model)
        held[depth] = count_step(lambda model=model, x=x: model(x).sum())[0]
        functional.reset_net(model)
    assert held[100] <= 1.02 * held[8]


def test_right_after_wrapping_it_is_nearer_to_stock_than_two_streams():
    """With branches that resemble their neighbours, as a trained residual network's do."""
    stock, x = network(8), batch()
    for block in stock[1:]:
        block.load_state_dict(stock[0].state_dict())
    with torch.no_grad():
        expected = stock(x)
        functional.reset_net(stock)
        off = {}
        for coupling in ("additive", "leapfrog"):
            model = copy.deepcopy(stock)
            srp.wrap_residual_blocks(model, coupling=coupling)
            off[coupling] = float((model(x) - expected).norm())
    assert off["leapfrog"] < off["additive"] / 2


def test_other_couplings_are_refused():
    with pytest.raises(ValueError, match=r"coupling must be one of .*not 'midpoint'"):
        srp.wrap_residual_blocks(network(), coupling="midpoint")
