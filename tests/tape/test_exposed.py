"""Writes that move no version counter: to membranes between calls, to inputs, to parameters."""

import contextlib
import copy

import numpy as np
import pytest
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.reports.measure import count_step


def clamp(state, _t):
    state.data.clamp_(-0.5, 0.5)


def episode(state, t):
    if t == 2:
        state.data[1] = 0


def by_numpy(state, _t):
    state.detach().numpy()[:, 0] = 0.25


def in_place(state, _t):
    with torch.no_grad():
        state.mul_(0.5)


def by_set(state, _t):
    state.data = state.data * 0.5


WRITES = [clamp, episode, by_numpy, in_place, by_set]


def of_snntorch(width, **options):
    return nn.Sequential(
        nn.Linear(4, width), snntorch.Leaky(beta=0.9, init_hidden=True, **options), nn.Linear(width, 2),
        snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True, output=True),
    )  # fmt: skip


def of_spikingjelly(width):
    return nn.Sequential(nn.Linear(4, width), neuron.LIFNode(), nn.Linear(width, 2), neuron.IFNode())


def states(net):
    if isinstance(net[1], neuron.BaseNode):
        return [net[1].v]
    return [net[1].mem, net[3].syn]


def gradients(net, x_seq, write, around=contextlib.nullcontext):
    functional.reset_net(net)
    utils.reset(net)
    loss = 0
    with around():
        for t, x in enumerate(x_seq):
            out = net(x)
            loss = loss + sum((o + 1).square().sum() for o in (out if isinstance(out, tuple) else (out,)))
            for state in states(net):
                write(state, t)
    loss.backward()
    return [p.grad for p in net.parameters()]


def compare(make, arithmetic, write, x_seq):
    torch.manual_seed(0)
    stock = make()
    torch.manual_seed(0)
    net = srp.convert_to_reversible(make(), arithmetic=arithmetic)
    found = gradients(net, x_seq, write)
    if arithmetic == "stock":
        expected = gradients(stock, x_seq, write)
    else:
        net.zero_grad()
        expected = gradients(net, x_seq, write, lambda: differentiated(net))
    assert any(gradient.abs().sum() > 0 for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("make", [of_snntorch, of_spikingjelly])
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_membranes_between_calls(write, make, arithmetic):
    compare(lambda: make(8), arithmetic, write, torch.rand(5, 3, 4) * 2)


@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_large_membranes(arithmetic):
    compare(lambda: of_snntorch(1 << 14), arithmetic, clamp, torch.rand(3, 3, 4))


def test_a_write_after_the_last_call():
    torch.manual_seed(0)
    x_seq, found = torch.rand(4, 3, 4) * 2, []
    for converted in (False, True):
        torch.manual_seed(1)
        net = of_snntorch(8)
        if converted:
            srp.convert_to_reversible(net, arithmetic="stock")
        loss = sum(net(x)[0].square().sum() for x in x_seq)
        net[1].mem.data.zero_()
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    for stock, ours in zip(*found, strict=True):
        assert torch.equal(stock, ours)


def hidden(kind, **options):
    return lambda: kind(beta=0.9, init_hidden=True, **options)


HIDDEN = {
    "v": neuron.LIFNode,
    "Leaky": hidden(snntorch.Leaky),
    "Leaky reset at once": hidden(snntorch.Leaky, reset_delay=False, learn_beta=True),
    "Leaky set to zero at once": hidden(snntorch.Leaky, reset_delay=False, reset_mechanism="zero"),
    "Synaptic reset at once": hidden(snntorch.Synaptic, alpha=0.8, reset_delay=False),
    "Alpha": hidden(snntorch.Alpha, alpha=0.95, reset_mechanism="zero"),
}


class WithAHead(nn.Module):
    """Its head saves the membrane by reference: what is written to it later, stock's backward reads."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.lif = kind()

    def state(self):
        return self.lif.v if hasattr(self.lif, "v") else self.lif.mem

    def forward(self, x):
        spikes = self.lif(self.fc(x))
        return self.head(self.state()) + spikes.sum()


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("write", "around"), [(clamp, False), (clamp, True), (by_numpy, False)])
@pytest.mark.parametrize("kind", HIDDEN.values(), ids=HIDDEN)
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_what_stock_saved_by_reference_is_read_as_it_was_written(write, around, kind, arithmetic):
    torch.manual_seed(0)
    made, x_seq, found = WithAHead(kind), torch.rand(5, 3, 4) * 2, []
    net = srp.convert_to_reversible(copy.deepcopy(made), arithmetic=arithmetic)
    expected = made if arithmetic == "stock" else copy.deepcopy(net)
    for model in (expected, net):
        exact = differentiated(model) if model is not net and arithmetic != "stock" else None
        recorded = srp.reversible(model) if model is net and around else None
        loss = 0
        with exact or contextlib.nullcontext(), recorded or contextlib.nullcontext():
            for t, x in enumerate(x_seq):
                loss = loss + model(x).square().sum() + model.state().square().sum()
                write(model.state(), t)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


class Frames(nn.Module):
    """Its input is cast first, so stock holds nothing of the buffer."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 8), snntorch.Leaky(beta=0.9, init_hidden=True, output=True)

    def forward(self, frame):
        return self.lif(self.fc(frame.float() / 4))


@pytest.mark.parametrize("fill", ["numpy", "data", "source"])
def test_a_buffer_that_is_filled_again_is_found_in_the_backward(fill):
    frames = torch.randint(0, 255, (4, 3, 4), dtype=torch.uint8)
    net = srp.convert_to_reversible(Frames(), arithmetic="stock")
    source = np.zeros((3, 4), dtype=np.uint8)
    buffer = torch.from_numpy(source) if fill == "source" else torch.zeros(3, 4, dtype=torch.uint8)
    loss = 0
    for frame in frames:
        if fill == "numpy":
            buffer.numpy()[:] = frame.numpy()
        elif fill == "source":
            source[:] = frame.numpy()
        else:
            buffer.data.copy_(frame)
        loss = loss + net(buffer)[1].square().sum()
    with pytest.raises(RuntimeError, match=r"past its version counter.*Hand over a clone"):
        loss.backward()


def test_there_is_one_copy_a_neuron():
    """Whatever the number of steps: a copy goes when the next step has found nothing."""
    width = 512
    net = srp.convert_to_reversible(
        nn.Sequential(nn.Linear(4, width), snntorch.Leaky(beta=0.9, init_hidden=True, output=True))
    )

    def held(steps):
        x_seq = torch.rand(steps, 8, 4)

        def loss():
            utils.reset(net)
            return sum(net(x)[0].sum() for x in x_seq)

        loss().backward()
        return count_step(loss)[0]

    assert (held(40) - held(20)) / (20 * 8 * width) < 0.6  # bytes a neuron and step


class WithMembranes(nn.Module):
    """A loop that leaves the membrane of each time step."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(4, 8), snntorch.Leaky(beta=0.9), nn.Linear(8, 2)

    def forward(self, x_seq):
        mem, self.mems = self.lif.init_leaky(), []
        total = 0
        for x in x_seq:
            spikes, mem = self.lif(self.fc(x), mem)
            self.mems.append(mem)
            total = total + self.out(spikes)
        return total


@pytest.mark.parametrize("what", ["parameter", "input"])
def test_check_mode_names_what_was_written(what):
    net = srp.convert_to_reversible(WithMembranes(), arithmetic="stock")
    x_seq = torch.rand(5, 3000, 4)
    with srp.reversible(net, check=True):
        loss = net(x_seq).square().sum()
    (net.out.weight if what == "parameter" else x_seq).data.add_(1)
    with pytest.raises(RuntimeError, match=r"^(fc|lif|out)") as error:
        loss.backward()
    assert "version counter" in str(error.value) or "has changed" in str(error.value)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("step", range(5))
def test_a_membrane_that_was_written_is_rebuilt_as_it_was(step, check):
    """None of the script's is held: an anchor is one of before the reset."""
    net, x_seq = WithMembranes(), torch.rand(5, 3000, 4)
    net(x_seq).square().sum().backward()
    expected = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    srp.convert_to_reversible(net, arithmetic="stock")
    with srp.reversible(net, check=check):
        loss = net(x_seq).square().sum()
    net.mems[step].data.add_(1)
    loss.backward()
    for a, b in zip(expected, net.parameters(), strict=True):
        assert torch.equal(a, b.grad)


@pytest.mark.parametrize("calls", [1, 3])
def test_running_statistics_are_counted_in_by_rights(calls):
    def outcome(model, check=False):
        model.zero_grad()
        around = srp.reversible(model, check=True) if check else contextlib.nullcontext()
        torch.manual_seed(0)
        x = torch.rand(calls, 2, 2, 6, 6)
        with around:
            sum(model(step).square().sum() for step in x).backward()
        return [*(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]

    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    stock = nn.Sequential(*layers)
    model = srp.convert_to_reversible(copy.deepcopy(stock))
    checked = copy.deepcopy(model)
    expected = outcome(stock)
    assert all(map(torch.equal, expected, outcome(model)))
    assert all(map(torch.equal, expected, outcome(checked, check=True)))
