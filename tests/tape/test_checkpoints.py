"""A network that checkpoints parts of itself trains converted as it does stock, from its first step on."""

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

import snn_reversible_plugin as srp

WIDTH, BATCH = 8, 3


class InSteps(nn.Module):
    """Some time steps at once, and the states of snnTorch's neuron from part to part."""

    def __init__(self, lif, states):
        super().__init__()
        self.lif, self.states = lif, states
        self.fc, self.out = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)

    def part(self, x_seq, *states):
        total = 0
        for x in x_seq:
            spikes, *states = self.lif(self.fc(x), *states)
            total = total + self.out(spikes)
            states = [spikes, *states] if hasattr(self.lif, "recurrent") else states
        return total, *states

    def forward(self, x_seq):
        states, total = [torch.zeros(BATCH, WIDTH) for _ in range(self.states)], 0
        for part in x_seq.split(5):
            one, *states = checkpoint(self.part, part, *states, use_reentrant=False)
            total = total + one
        return total


class Own(nn.Module):
    """A neuron of one's own that learns its leak."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.step_mode = nn.Parameter(torch.tensor(0.5)), 0.0, "s"

    def reset(self):
        self.v = 0.0

    def forward(self, x):
        self.v = self.v * torch.sigmoid(self.w) + x
        spikes = surrogate.ATan()(self.v - 1)
        self.v = self.v - spikes.detach()
        return spikes


class Fresh(nn.Module):
    """SpikingJelly's neuron, reset in each part."""

    def __init__(self, node):
        super().__init__()
        self.node, self.fc, self.out = node, nn.Linear(4, WIDTH), nn.Linear(WIDTH, 2)

    def part(self, x_seq):
        functional.reset_net(self)
        if self.node.step_mode == "m":
            return self.out(self.node(self.fc(x_seq))).sum(0)
        return sum(self.out(self.node(self.fc(x))) for x in x_seq)

    def forward(self, x_seq):
        return sum(checkpoint(self.part, part, use_reentrant=False) for part in x_seq.split(5))


class GoesOn(Fresh):
    """Nothing resets it inside: the second run starts from what the first one left, in stock as well."""

    def part(self, x_seq):
        return self.out(self.node(self.fc(x_seq))).sum(0)

    def forward(self, x_seq):
        functional.reset_net(self)
        return checkpoint(self.part, x_seq, use_reentrant=False)


MAKES = {
    "Leaky": lambda: InSteps(snntorch.Leaky(beta=0.9), 1),
    "Leaky, zero": lambda: InSteps(snntorch.Leaky(beta=0.9, reset_mechanism="zero"), 1),
    "Leaky, learned": lambda: InSteps(snntorch.Leaky(beta=0.9, learn_beta=True, learn_threshold=True), 1),
    "Leaky, inhibition": lambda: InSteps(snntorch.Leaky(beta=0.9, inhibition=True), 1),
    "Leaky, no delay": lambda: InSteps(snntorch.Leaky(beta=0.9, reset_delay=False), 1),
    "Synaptic": lambda: InSteps(snntorch.Synaptic(alpha=0.8, beta=0.9), 2),
    "RLeaky": lambda: InSteps(snntorch.RLeaky(beta=0.9, all_to_all=False, V=0.5), 2),
    "Lapicque": lambda: InSteps(snntorch.Lapicque(beta=0.9), 1),
    "Alpha": lambda: InSteps(snntorch.Alpha(alpha=0.8, beta=0.7), 3),
    "own": lambda: Fresh(Own()),
}
for kind in (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, neuron.KLIFNode):
    MAKES |= {
        f"{kind.__name__} {mode}": lambda kind=kind, mode=mode: Fresh(kind(step_mode=mode)) for mode in "sm"
    }
    MAKES[f"{kind.__name__} goes on"] = lambda kind=kind: GoesOn(kind(step_mode="m"))


def gradients(net):
    """Of two steps."""
    found = []
    for step in range(2):
        torch.manual_seed(step)
        net.zero_grad()
        net(torch.rand(10, BATCH, 4)).square().sum().backward()
        found += [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]
    return found


@pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows")
@pytest.mark.parametrize("mode", ["memory", "speed", "auto", "minimal"])
@pytest.mark.parametrize("name", MAKES)
def test_parts_that_are_checkpointed_inside_of_a_network(name, mode):
    found = []
    for arithmetic in (None, "stock", "auto"):
        torch.manual_seed(0)
        net = MAKES[name]()
        if arithmetic is not None:
            srp.convert_to_reversible(net, mode=mode, arithmetic=arithmetic)
        found.append(gradients(net))
    stock, ours, on_grid = found
    for one, other in zip(ours, stock, strict=True):
        if mode == "minimal":
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
        else:
            assert torch.equal(one, other)
    assert any(gradient.any() for gradient in on_grid)
