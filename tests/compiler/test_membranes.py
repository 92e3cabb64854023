"""Membranes that compiled networks leave in their neurons: held once somebody reads them, and stock's."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from graph_only import GraphOnly, WithoutInductor
from snn_reversible_plugin.compiler import entry
from snn_reversible_plugin.compiler.membranes import OfRegion


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    monkeypatch.setattr(entry, "Backend", WithoutInductor)
    torch._dynamo.reset()


class Net(nn.Module):
    """Running statistics, dropout, two neurons; ``also`` says what it returns beside the spikes."""

    def __init__(self, also=False, split=False):
        super().__init__()
        self.first = nn.Sequential(layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), nn.Dropout(0.2))
        self.lif, self.pool = neuron.LIFNode(), layer.AvgPool2d(4)
        self.second, self.out = layer.Conv2d(4, 2, 1), neuron.IFNode(v_threshold=float("inf"))
        functional.set_step_mode(self, "m")
        self.also, self.split, self.last = also, split, None

    def forward(self, x_seq):
        x_seq = self.lif(self.first(x_seq))
        if self.also:
            self.last = self.lif.v
        if self.split:
            torch._dynamo.graph_break()
        return self.out(self.second(self.pool(x_seq)))


X = torch.rand(3, 8, 2, 8, 8) * 2


def promised(net):
    """The names of the neurons whose membrane is not held."""
    return [
        name
        for name, module in net.named_children()
        if isinstance(module, neuron.BaseNode)
        and isinstance(dict.__getitem__(module._memories, "v"), OfRegion)
        and dict.__getitem__(module._memories, "v").membrane is None
    ]


def step(run, net, use):
    """A training step; ``use`` is told of the net and its output, and returns the loss."""
    functional.reset_net(net)
    net.zero_grad()
    torch.manual_seed(3)
    use(net, run(X)).backward()
    return [parameter.grad for parameter in net.parameters()]


def of_spikes(_net, out):
    return out.sum() + 1


def of_membrane(net, out):
    return net.out.v.square().sum() + out.sum()


class Both:
    """One network compiled, and its twin partitioned by the same compiler without the pass."""

    def __init__(self, *options):
        torch.manual_seed(0)
        self.net = Net(*options)
        self.twin = copy.deepcopy(self.net)
        self.run, self.run_twin = srp.compile(self.net), torch.compile(self.twin, backend=GraphOnly(None))
        for _ in range(2):
            self.step(of_spikes)

    def step(self, use, around=None):
        """A training step of each; whether gradients are equal."""
        gradients = []
        for run, net in ((self.run, self.net), (self.run_twin, self.twin)):
            gradients.append(step(run, net, use))
            if around is not None:
                around(net)
        return all(map(torch.equal, *gradients))

    def equal(self, name="lif"):
        """Whether both have the same membrane in a neuron."""
        v, expected = (getattr(net, name).v for net in (self.net, self.twin))
        return torch.equal(v, expected) and v.requires_grad is expected.requires_grad


@pytest.mark.slow
def test_nobody_reads_them():
    """Nothing of them is held, and running statistics are updated once."""
    both = Both()
    assert promised(both.net) == ["lif", "out"] and both.step(of_spikes)
    assert torch.equal(both.net.first[1].running_mean, both.twin.first[1].running_mean)
    table = both.net.lif._memories
    functional.reset_net(both.net)
    assert both.net.lif.v == 0.0 and both.net.lif._memories is table
    both.run(X)
    place = dict.__getitem__(both.net.lif._memories, "v")._place
    assert place.untyped_storage().nbytes() == 4 and both.net.lif.v is place
    assert place.untyped_storage().nbytes() == place.nbytes
    assert both.net.first[1].num_batches_tracked == 4
    both.run(X)
    assert type(both.net.lif._memories) is dict  # they were read, and nothing is promised any more


def test_a_membrane_is_read_and_has_its_gradient():
    """Also the first time that it is read, when the region is called again for it."""
    both = Both()
    for _ in range(2):
        assert both.step(of_membrane) and both.equal("out") and both.equal("lif")
    functional.reset_net(both.net)
    both.run(X)
    assert promised(both.net) == []  # both were read, and are held from then on


@pytest.mark.slow
def test_states_that_nobody_resets_go_on():
    both = Both()
    for run in (both.run, both.run_twin):
        torch.manual_seed(5)
        run(X)
    torch.manual_seed(6)
    out = both.run(X)
    torch.manual_seed(6)
    assert torch.equal(out, both.run_twin(X)) and both.equal()


def train(net):
    torch.optim.SGD(net.parameters(), 0.1).step()


def load(net):
    net.load_state_dict({key: value + 1 for key, value in net.state_dict().items()})


@pytest.mark.parametrize("change", [train, load])
@pytest.mark.one_in(2)
def test_parameters_change_before_it_is_read(change):
    both = Both()
    both.step(of_spikes, around=change)
    assert both.equal() and both.equal("out")


def test_changed_behind_its_back():
    net = Net()
    run = srp.compile(net)
    for _ in range(2):
        step(run, net, of_spikes)
    with torch.no_grad():
        net.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"a membrane that a compiled network left.*Read the membrane"):
        net.lif.v  # noqa: B018


@pytest.mark.slow
def test_what_others_have_is_held():
    both = Both(True)
    assert promised(both.net) == ["out"]
    assert torch.equal(both.net.last, both.twin.last)


def test_regions():
    """Spikes that cross a break would be held for the second region: more than its membrane takes."""
    both = Both(False, True)
    assert promised(both.net) == ["lif"] and both.step(of_spikes) and both.equal()
    functional.reset_net(both.net)
    with torch.no_grad():
        both.run(X)
    assert promised(both.net) == []


def test_other_code_sees_membranes():
    both = Both()
    functional.detach_net(both.net), functional.detach_net(both.twin)
    assert both.equal()
    both.net.eval(), both.twin.eval()
    assert torch.equal(both.net(X), both.twin(X)) and both.equal()
