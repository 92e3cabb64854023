"""States that a chain's branches reset themselves, and chains in somebody's checkpoint."""

import copy

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks import RevSBlock, RevSSequence


class FreshEachTime(nn.Module):
    """Starts from no membrane: the usual way to write a loop for snnTorch."""

    def __init__(self, learned):
        super().__init__()
        self.lif, self.fc = snntorch.Leaky(beta=0.9, learn_beta=learned), nn.Linear(4, 4)

    def forward(self, x):
        mem, spikes = self.lif.reset_mem(), []
        for current in x:
            spike, mem = self.lif(current, mem)
            spikes.append(spike)
        return self.fc(torch.stack(spikes))


class GoesOn(nn.Module):
    """Starts from the membrane that the last call left."""

    def __init__(self):
        super().__init__()
        self.lif, self.fc = snntorch.Leaky(beta=0.9, init_hidden=True), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(torch.stack([self.lif(current) for current in x]))


def network(make, **how):
    torch.manual_seed(0)
    chain = RevSSequence([RevSBlock(make(), make()) for _ in range(2)], **how)
    return nn.Sequential(nn.Linear(8, 8), chain, nn.Linear(8, 3))


def train(net, steps, between=lambda net: None, retain_graph=False, learning=True):
    torch.manual_seed(1)
    optimizer, found = torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(3, 2, 8)).square().mean().backward(retain_graph=retain_graph)
        found += [parameter.grad.clone() for parameter in net.parameters()]
        if learning:
            optimizer.step()
        between(net)
    return found


def neurons(net):
    return [module for module in net.modules() if isinstance(module, snntorch.SpikingNeuron)]


def reset(net):
    for lif in neurons(net):
        lif.reset_mem()


def detach(net):
    for lif in neurons(net):
        lif.mem.detach_()


def plainly(net):
    net = copy.deepcopy(net)
    net[1].reversible = False
    return net


@pytest.mark.parametrize("mode", [None, "memory", "minimal"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("states", ["carry", "reset"])
def test_what_a_branch_resets_itself_joins_no_steps(states, learned, mode):
    net = network(lambda: FreshEachTime(learned), states=states)
    stock = train(plainly(net), 3)
    if mode is not None:
        srp.convert_to_reversible(net, mode=mode, arithmetic="stock")
    for ours, expected in zip(train(net, 3), stock, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_state_that_is_read_joins_steps_where_its_graph_is_kept():
    net = network(GoesOn)
    reset(net)
    stock, ours = (train(one, 3, retain_graph=True, learning=False) for one in (plainly(net), net))
    assert any(not torch.equal(first, last) for first, last in zip(stock[:4], stock[-4:], strict=True))
    for one, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_a_state_that_is_read_after_its_backward_is_refused_as_stock_refuses_it():
    net = network(GoesOn)
    for one in (plainly(net), net):
        reset(one)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            train(one, 2, learning=False)
    reset(net)
    with pytest.raises(RuntimeError, match=r"state 'mem' .* utils\.reset"):
        train(net, 2)

    reset(net)
    assert len(train(net, 2, between=detach)) == 2 * len([*net.parameters()])


class Checkpointed(nn.Module):
    """A chain in a checkpoint: there is nothing to gain, and it trains."""

    def __init__(self):
        super().__init__()
        self.stem = layer.Conv2d(2, 8, 3, padding=1)
        self.chain = RevSSequence(
            [RevSBlock(self.branch(), self.branch()) for _ in range(2)], states="reset"
        )
        functional.set_step_mode(self, "m")

    @staticmethod
    def branch():
        return nn.Sequential(
            neuron.LIFNode(), layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4)
        )

    def forward(self, x):
        return checkpoint(self.chain, self.stem(x), use_reentrant=False)


@pytest.mark.parametrize("mode", [None, "memory", "auto", "speed", "minimal"])
def test_a_checkpoint_around_a_chain(mode):
    torch.manual_seed(0)
    net = Checkpointed()
    other = copy.deepcopy(net)
    other.chain.reversible = False
    if mode is not None:
        srp.convert_to_reversible(net, mode=mode, arithmetic="stock")
    for _ in range(3):
        x = torch.randn(3, 2, 2, 6, 6)
        for one in (net, other):
            one.zero_grad()
            functional.reset_net(one)
            one(x).square().mean().backward()
        for ours, stock in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, stock.grad, rtol=1e-4, atol=1e-6)
