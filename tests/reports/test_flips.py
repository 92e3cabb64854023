"""The counter of flipped spikes: nothing on the grid, something where a rebuild drifts or is wrong."""

import copy

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

from snn_reversible_plugin.blocks import RevSBlock, RevSSequence
from snn_reversible_plugin.models import RevSResNet, TRevSNN
from snn_reversible_plugin.reports.flips import counting_flips
from tests.blocks.test_chain import Loop, chain, step


def deep(bits, depth=200):
    def wide():
        fc = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            fc.weight.mul_(3)
        return nn.Sequential(neuron.IFNode(step_mode="m"), fc)

    torch.manual_seed(0)
    return RevSSequence([RevSBlock(wide(), wide(), bits=bits) for _ in range(depth)], states="reset")


@pytest.mark.slow
def test_floats_flip_spikes_at_depth_and_the_grid_none():
    found = {}
    for bits in (16, None):
        model = deep(bits)
        with counting_flips(model) as flips:
            model(torch.randn(4, 256, 64)).sum().backward()
        found[bits] = flips
        assert flips.spikes == 2 * 200 * 4 * 256 * 32
        assert not model.check
    assert found[16].flipped_spikes == 0 and "equal bit for bit" in str(found[16])
    assert found[None].flipped_spikes > 100
    rebuild = found[None].chains["model"]
    assert sum(rebuild.by_branch.values()) == rebuild.flipped_spikes
    assert f"first in {next(iter(rebuild.by_branch))}" in str(found[None])


class Flipping(nn.Module):
    """Its neuron fires as often in every run; in later runs ``flips`` of the spikes are others."""

    def __init__(self, flips):
        super().__init__()
        self.flips, self.runs = flips, [0]
        self.lif = neuron.LIFNode(step_mode="m")

    def forward(self, x):
        current = torch.full_like(x, 3.0).reshape(-1)
        if self.runs[0]:
            current[: self.flips] = 0
        self.runs[0] += 1
        return self.lif(current.view_as(x)) * x


@pytest.mark.parametrize("flips", [0, 1, 5])
def test_it_counts_each_flipped_spike(flips):
    model = RevSSequence([RevSBlock(nn.Linear(3, 3), Flipping(flips), dim=-1, bits=None)], states="reset")
    with counting_flips(model) as found:
        model(torch.randn(2, 2, 6)).sum().backward()
    assert (found.spikes, found.flipped_spikes) == (2 * 2 * 3, flips)
    assert found.chains["model"].by_branch == ({"block 0: g (Flipping)": flips} if flips else {})


def test_snntorch_neurons_are_counted_every_step_and_nothing_else_changes():
    torch.manual_seed(0)
    model = RevSSequence([RevSBlock(Loop(), Loop()) for _ in range(2)], states="reset")
    plain, x = copy.deepcopy(model), torch.randn(4, 2, 6)
    with counting_flips(model) as flips:
        ours = step(model, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, step(plain, x), strict=True) if a is not None)
    assert (flips.spikes, flips.flipped_spikes) == (4 * 4 * 2 * 3, 0)
    hooks = [m for m in model.modules() if m._forward_hooks]
    assert not hooks


def test_an_exception_leaves_no_hook_and_no_mode():
    class Failing(Loop):
        def forward(self, x):
            super().forward(x)
            raise KeyError("stop")

    model = RevSSequence([RevSBlock(Loop(), Failing())], states="reset")
    with pytest.raises(KeyError), counting_flips(model):
        model(torch.randn(4, 2, 6))
    assert not model.check and not any(m._forward_hooks for m in model.modules())


def test_several_chains_and_none():
    model = RevSResNet((1, 1), (4, 6), T=2)
    with counting_flips(model) as flips:
        out = model(torch.randn(1, 3, 8, 8))
        assert "call backward first" in str(flips)
    out.sum().backward()  # outside: what was asked for at the forward holds
    assert list(flips.chains) == ["stages.0", "stages.2"] and flips.flipped_spikes == 0 < flips.spikes
    with pytest.raises(ValueError, match="no RevSSequence or RevSColumns"), counting_flips(nn.Linear(2, 2)):
        pass


def test_columns_are_counted_too():
    torch.manual_seed(0)
    found = {}
    for bits in (16, None):
        model = TRevSNN((2, 3, 4, 4), steps=8, num_classes=3, auxiliary=False, bits=bits, alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight)  # so that neurons fire
        with counting_flips(model) as flips:
            model(torch.randn(2, 3, 32, 32)).sum().backward()
        found[bits] = flips
        assert list(flips.chains) == ["columns"] and not model.columns.check
    ours, floats = found[16], found[None]
    assert ours.flipped_spikes == ours.chains["columns"].flipped_bits == 0 < ours.spikes == floats.spikes
    assert floats.flipped_spikes > 0 and floats.chains["columns"].by_branch


def test_walking_the_graph_twice_counts_twice_the_same():
    model = chain(states="reset")
    with counting_flips(model) as flips:
        out = model(torch.randn(2, 1, 4, 3, 3)).sum()
        out.backward(retain_graph=True)
        first = flips.spikes
        out.backward()
    assert flips.spikes == first > 0
