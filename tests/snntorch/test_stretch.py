"""snnTorch's neurons in a user's loop and stock arithmetic: stock's gradients, from few membranes."""

import copy

import pytest
import snntorch
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step

NEURONS = {
    "leaky": lambda: snntorch.Leaky(beta=0.9),
    "leaky, to zero": lambda: snntorch.Leaky(beta=0.8, reset_mechanism="zero"),
    "leaky, no reset": lambda: snntorch.Leaky(beta=0.8, reset_mechanism="none"),
    "leaky, learned": lambda: snntorch.Leaky(beta=0.9, learn_beta=True, learn_threshold=True),
    "leaky, at once": lambda: snntorch.Leaky(beta=0.9, reset_delay=False),
    "lapicque": lambda: snntorch.Lapicque(beta=0.9),
    "synaptic": lambda: snntorch.Synaptic(alpha=0.8, beta=0.9),
    "synaptic, learned": lambda: snntorch.Synaptic(
        alpha=0.8, beta=0.9, learn_alpha=True, reset_mechanism="zero"
    ),
    "alpha": lambda: snntorch.Alpha(alpha=0.9, beta=0.8, reset_mechanism="zero"),
    "rleaky": lambda: snntorch.RLeaky(beta=0.9, linear_features=WIDE),
    "inhibition": lambda: snntorch.Leaky(beta=0.9, inhibition=True),
}
WIDE = 32


class Net(nn.Module):
    """A loop over time inside; ``between`` may do something to the states of the first neuron."""

    def __init__(self, make, wide=WIDE):
        super().__init__()
        self.first, self.last = nn.Linear(12, wide), nn.Linear(wide, 5)
        self.middle, self.neurons = nn.Linear(wide, wide), nn.ModuleList([make(), make()])

    def states(self):
        found = [neuron.reset_mem() for neuron in self.neurons]
        return [list(one) if isinstance(one, tuple) else [one] for one in found]

    def step(self, x, states):
        for at, layer in enumerate((self.first, self.middle)):
            x, *states[at] = self.neurons[at](layer(x), *states[at])
        return self.last(x)

    def forward(self, x_seq, between=lambda t, states: None):
        states, found = self.states(), []
        for t, x in enumerate(x_seq):
            found.append(self.step(x, states))
            between(t, states)
        return torch.stack([*found, *(found[-1] * state.mean() for one in states for state in one)])


def pair(make, **settings):
    torch.manual_seed(0)
    stock = Net(make, **settings)
    return stock, srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")


def gradients(net, out):
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return torch.autograd.grad((out * weights).sum(), list(net.parameters()), allow_unused=True)


def assert_alike(ones, others):
    for a, b in zip(ones, others, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and torch.equal(a.signbit(), b.signbit()))


def spikes(steps, batch=6):
    return (torch.rand(steps, batch, 12) > 0.4).float()


@pytest.mark.parametrize("make", NEURONS.values(), ids=NEURONS)
def test_a_loop_trains_as_in_stock(make):
    stock, ours = pair(make)
    for x in (spikes(9), spikes(1), spikes(3, 2)):
        expected, found = stock(x), ours(x)
        assert torch.equal(expected, found)
        assert_alike(gradients(stock, expected), gradients(ours, found))
        for a, b in zip(stock.neurons, ours.neurons, strict=True):
            assert torch.equal(a.reset, b.reset)
            assert torch.equal(a.mem, b.mem)


def detach(t, states):
    if t == 3:
        states[0][:] = [one.detach() for one in states[0]]


def halve(t, states):
    if t == 4:
        states[0][-1] = states[0][-1] * 0.5


def in_place(t, states):
    if t == 4:
        with torch.no_grad():
            states[0][-1].mul_(1.0).add_(0.25)


def as_data(t, states):
    if t == 4:
        states[0][-1].data.add_(0.25)


@pytest.mark.parametrize("between", [detach, halve])
@pytest.mark.parametrize("kind", ["leaky", "leaky, learned", "synaptic"])
def test_what_a_user_does_to_states(kind, between):
    stock, ours = pair(NEURONS[kind])
    x = spikes(9)
    expected, found = stock(x, between), ours(x, between)
    assert torch.equal(expected, found)
    assert_alike(gradients(stock, expected), gradients(ours, found))


@pytest.mark.parametrize("between", [in_place, as_data])
def test_a_state_that_is_written_to_is_another_start(between):
    """Stock refuses the first, and takes the second for what it has become. Here each step has its own."""
    _, ours = pair(NEURONS["leaky"])
    stock = copy.deepcopy(srp.restore(copy.deepcopy(ours)))
    x = spikes(9)

    def as_clone(t, states):
        if t == 4:  # the same values, and the graph of a write that nobody sees
            state = states[0][-1]
            states[0][-1] = state + (state.detach() * 0 + 0.25)

    expected, found = stock(x, as_clone), ours(x, between)
    assert torch.equal(expected, found)
    assert_alike(gradients(stock, expected), gradients(ours, found))


def test_one_recording_a_step():
    stock, ours = pair(NEURONS["leaky"])
    x, outs = spikes(9), []
    for net in (stock, ours):
        forward, net.forward = net.forward, net.step
        states = net.states()
        outs.append(torch.stack([net(one, states) for one in x]))
        net.forward = forward
    assert torch.equal(*outs)
    assert_alike(*(gradients(net, out) for net, out in zip((stock, ours), outs, strict=True)))


def test_two_backwards():
    stock, ours = pair(NEURONS["leaky, learned"])
    x, found = spikes(9), []
    for net in (stock, ours):
        loss = net(x).square().mean()
        parameters = list(net.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        found.append([*first, *torch.autograd.grad(loss, parameters)])
    assert_alike(*found)


@pytest.mark.parametrize(("steps", "least"), [(8, 6), (64, 10)])
def test_few_membranes_are_held(steps, least):
    x = spikes(steps, 16)
    stock, ours = pair(NEURONS["leaky"], wide=512)
    (held, peak), (our_held, our_peak) = (
        count_step(lambda net=net: net(x).mean()) for net in (stock, ours)
    )
    assert our_held * least < held
    assert our_peak < peak


def test_states_of_other_neurons_and_in_another_order():
    """What one neuron has left is another's: two of three, swapped, and a membrane that was reset."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, WIDE)
            self.alpha = snntorch.Alpha(alpha=0.9, beta=0.8, reset_mechanism="zero")
            self.synaptic = snntorch.Synaptic(alpha=0.8, beta=0.7)
            self.leaky = snntorch.Leaky(beta=0.9, learn_beta=True, reset_mechanism="zero")
            self.node = spikingjelly_lif()

        def forward(self, x_seq):
            one, found = list(self.alpha.reset_mem()), []
            for x in x_seq:
                current = self.layer(x)
                _, *one = self.alpha(current, *one)
                spk, syn, mem = self.synaptic(current, *one[:2])
                again, syn, mem = self.synaptic(current, mem, syn)
                self.node(current)
                last, _ = self.leaky(current, self.node.v)
                found.append(spk + 2 * again + 3 * last + mem + syn)
            return torch.stack(found)

    torch.manual_seed(0)
    stock = Mixed()
    ours = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")
    x = 2 * spikes(6)
    expected, found = stock(x), ours(x)
    assert torch.equal(expected, found)
    assert_alike(gradients(stock, expected), gradients(ours, found))


def spikingjelly_lif():
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
    return neuron.LIFNode(detach_reset=True)
