"""In mode minimal a chain holds its two streams, and writes over them and their gradients.

Where nobody else holds those, that is.
"""

import itertools

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks import RevSBlock, RevSSequence, chain_nodes, second_run
from snn_reversible_plugin.models import RevSResNet, resnet
from snn_reversible_plugin.ops import allocations
from snn_reversible_plugin.tape.sliced import alone, cut

C = 8  # channels of a stream
X = 4, 8, 2 * C, 16, 16  # more than what is computed at once


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 12)


def fire():
    return neuron.IFNode(step_mode="m", detach_reset=True, surrogate_function=surrogate.ATan())


def branch():
    conv = layer.Conv2d(C, C, 3, padding=1, bias=False, step_mode="m")
    return nn.Sequential(fire(), conv, layer.BatchNorm2d(C, step_mode="m"))


class Placed(nn.Module):
    """Adds a parameter as large as a stream, whose gradient is the branch's."""

    def __init__(self):
        super().__init__()
        self.layers, self.place = branch(), nn.Parameter(torch.randn(X[0], X[1], C, *X[3:]) / 8)

    def forward(self, x):
        return self.layers(x) + self.place


class Twice(nn.Module):
    """Reads the membrane that its neuron is left with."""

    def __init__(self):
        super().__init__()
        self.fire, self.layers = fire(), branch()

    def forward(self, x):
        spikes = self.fire(x)
        return self.layers(spikes) + self.fire.v * 0.125


class OneNeuron(nn.Module):
    """Both of its calls go on from the same states."""

    def __init__(self, shared):
        super().__init__()
        self.fire, self.conv = shared, layer.Conv2d(C, C, 3, padding=1, bias=False, step_mode="m")

    def forward(self, x):
        return self.conv(self.fire(x))


class Net(nn.Module):
    def __init__(self, make=branch, states="reset"):
        super().__init__()
        self.stem = layer.Conv2d(2, 2 * C, 3, padding=1, step_mode="m")
        self.chain = RevSSequence([RevSBlock(make(), make()) for _ in range(2)], states=states)
        self.fire, self.pool = fire(), layer.AvgPool2d(2, step_mode="m")

    def forward(self, x):
        x = self.stem(x)
        x = self.chain(x)
        x = self.fire(x)
        return self.pool(x)


def pair(make=branch, **how):
    """The same network, stock and in mode minimal."""
    found = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = Net(make, **how)
        net.chain.reversible = convert
        found.append(srp.convert_to_reversible(net, mode="minimal") if convert else net)
    return found


def inputs():
    return torch.randn(X[0], X[1], 2, *X[3:])


def assert_close(ours, stock):
    for one, other in zip(ours, stock, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def gradients_of(net):
    return [parameter.grad.clone() for parameter in net.parameters()]


def peak_of(run):
    """The most that is alive while it runs, beyond what was before."""
    recorded = allocations.start()
    found = run()
    return max(itertools.accumulate(event.size for event in allocations.stop(recorded))), found


def plain(net, x, *, loss=lambda net, x: net(x).square().sum(), backwards=1):
    net.zero_grad()
    functional.reset_net(net)
    out = loss(net, x)
    for left in reversed(range(backwards)):
        out.backward(retain_graph=left > 0)
    return gradients_of(net)


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("states", ["reset", "carry"])
@pytest.mark.parametrize("make", [branch, Placed, Twice, None])
def test_gradients_are_stocks(make, states, backwards):
    shared = fire()
    stock, ours = pair(make or (lambda: OneNeuron(shared)), states=states)
    for _ in range(3):
        x = inputs()
        assert_close(plain(ours, x, backwards=backwards), plain(stock, x, backwards=backwards))


def test_streams_that_somebody_reads_later_are_not_written_over():
    """What is computed from the detached output has its turn in the backward when the chain's is over."""

    def loss(net, x):
        weight = next(net.parameters())
        out = net.chain(net.stem(x))
        late = (out.detach() * weight.sum()).square().mean()
        return net.pool(net.fire(out)).square().sum() + late

    stock, ours = pair()
    for _ in range(3):
        x = inputs()
        assert_close(plain(ours, x, loss=loss), plain(stock, x, loss=loss))


@pytest.mark.parametrize("how", ["retain_grad", "hook", "twice"])
def test_a_gradient_that_somebody_holds_is_not_written_over(how):
    stock, ours = pair()
    found = []
    for net in (stock, ours):
        seen = []

        def loss(net, x, seen=seen):
            out = net.chain(net.stem(x))
            if how == "hook":
                out.register_hook(seen.append)
            elif how == "retain_grad":
                out.retain_grad()
                seen[:] = [out]
            else:
                seen[:] = [out * 2]
                seen[0].retain_grad()
                return net.pool(net.fire(seen[0])).square().sum() + out.sum()
            return net.pool(net.fire(out)).square().sum()

        torch.manual_seed(1)
        for _ in range(3):
            found.append(plain(net, inputs(), loss=loss))
        found.append([one if how == "hook" else one.grad for one in seen[-1:]])
    for one, other in zip(found[4:], found[:4], strict=True):
        assert_close(one, other)


def peaks_of(net, x, steps=3):
    """Of a forward and of its backward, in the last of some steps."""
    for _ in range(steps):
        functional.reset_net(net)
        net.zero_grad()
        forward, loss = peak_of(lambda: net(x).square().sum())
        backward, _ = peak_of(loss.backward)
        del loss
    return forward, backward


def test_streams_and_their_gradients_are_written_over(monkeypatch):
    peaks = {}
    for what in ("neither", "streams", "both"):
        with monkeypatch.context() as patched:
            patched.setattr(alone, "_alone", {})
            if what == "neither":
                patched.setattr(chain_nodes, "_is_sole", lambda *_: False)
            if what != "both":
                patched.setattr(RevSSequence, "try_out", lambda *_: None)
            _, peaks[what] = peaks_of(pair()[1], inputs())
    stream = torch.empty(*X).nbytes / 2
    assert peaks["both"] < peaks["streams"] - 0.9 * stream < peaks["neither"] - 1.8 * stream


def test_a_chains_output_makes_room_for_the_spikes_of_what_follows(monkeypatch):
    peaks = {}
    for over in (True, False):
        if not over:
            monkeypatch.setattr(tape, "mark_put_together", lambda *_: None)
        peaks[over], _ = peaks_of(pair()[1], inputs())
    assert peaks[True] < peaks[False] - 0.9 * torch.empty(*X).nbytes


def test_the_published_network_hands_its_stages_on(monkeypatch):
    """No stage holds its input until the last has run."""

    def each_called(stages, inputs):
        x = inputs.pop()
        for stage in stages:
            x = stage(x)
        return x

    x, peaks = torch.randn(4, 3, 32, 32), {}
    for handed in (True, False):
        if not handed:
            monkeypatch.setattr(resnet, "run_flat", each_called)
        model = RevSResNet((1, 1), (C, C), T=4, num_classes=3)
        peaks[handed], _ = peaks_of(srp.convert_to_reversible(model, mode="minimal"), x)
    assert peaks[True] < peaks[False] - 4 * 4 * 2 * C * 32 * 32 * 3


def test_a_branch_that_is_rebuilt_leaves_no_membrane(monkeypatch):
    """With one time step a membrane is as large as a stream."""
    x, peaks = torch.randn(1, 8, 2 * C, 16, 16, requires_grad=True), {}
    for forgets in (True, False):
        if not forgets:
            monkeypatch.setattr(
                second_run.BranchRun, "_recording", lambda run, _: tape.recording("minimal")
            )
        first = nn.Sequential(branch(), *(fire() for _ in range(3)), branch())
        model = RevSSequence([RevSBlock(first, nn.Identity())], states="reset", mode="minimal")
        _, peaks[forgets] = peaks_of(model, x)
    assert peaks[True] <= peaks[False] - 3 * x.nbytes / 2


def test_where_nothing_is_replayed_the_output_is_held(monkeypatch):
    said = []
    monkeypatch.setattr(tape, "mark_put_together", lambda *how: said.append(how))
    stock, ours = pair()
    x, found = inputs(), []
    for net, mode in ((stock, "memory"), (ours, "minimal")):
        out = net.stem(x)
        with tape.recording(mode), tape.suspended():
            loss = net.pool(net.fire(net.chain(out))).square().sum()
        loss.backward()
        found.append(gradients_of(net))
    assert_close(*found)
    assert not said
