"""States that a user's modules leave as attributes: let go of where nobody reads them."""

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.neurons.own.left import LeftStates
from snn_reversible_plugin.reports.measure import count_step

pytestmark = pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows")
STEPS, BATCH = 3, 8


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.gt(0).float()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x.square())


class Node(nn.Module):
    """As BrainCog's: the membrane and the last spikes are attributes."""

    def __init__(self):
        super().__init__()
        self.mem = self.spike = 0.0

    def forward(self, x):
        self.mem = self.mem + (x - self.mem) / 2
        self.spike = Fire.apply(self.mem - 0.5)
        self.mem = self.mem * (1 - self.spike.detach())
        return self.spike


class Net(nn.Module):
    def __init__(self, resets=True):
        super().__init__()
        self.conv1, self.node1 = nn.Conv2d(2, 8, 3, padding=1), Node()
        self.conv2, self.node2 = nn.Conv2d(8, 8, 3, padding=1), Node()
        self.fc, self.resets = nn.Linear(8, 3), resets

    def forward(self, x):
        for node in (self.node1, self.node2) if self.resets else ():
            node.mem = node.spike = 0.0
        for _ in range(STEPS):
            out = self.node2(self.conv2(self.node1(self.conv1(x))))
        return self.fc(out.mean((-1, -2)))


def made(convert, **settings):
    torch.manual_seed(0)
    net = Net(**settings)
    return srp.convert_to_reversible(net) if convert else net


def given():
    torch.manual_seed(1)
    return 2 * torch.rand(BATCH, 2, 16, 16)


def empty(net):
    return [
        name
        for node in (net.node1, net.node2)
        if isinstance(vars(node), LeftStates)
        for name in vars(node).promised
    ]


def same(a, b):
    return torch.equal(a, b) and (a.stride(), a.requires_grad) == (b.stride(), b.requires_grad)


READS = {
    "attribute": lambda node: (node.mem, node.spike),
    "getattr": lambda node: (getattr(node, "mem", None), getattr(node, "spike", None)),
    "vars": lambda node: (vars(node)["mem"], node.__dict__.get("spike")),
    "items": lambda node: tuple(v for k, v in vars(node).items() if k in ("mem", "spike")),
    "copy": lambda node: (lambda table: (table["mem"], table["spike"]))(node.__dict__.copy()),
}


def test_unread_states_are_not_held():
    x = given()
    held = {}
    for convert in (False, True):
        net = made(convert)
        net(x).sum().backward()
        gc.collect()
        held[convert] = count_step(lambda net=net: net(x).sum())[0]
        state = net.node1.mem.nbytes
    # Four states live in stock, and beside them what autograd saves.
    assert held[False] > 4 * state
    assert held[True] < state


@pytest.mark.parametrize("moment", ["before", "after", "stepped"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_who_reads_finds_what_stock_has(read, moment):
    found = []
    for convert in (False, True):
        net, x = made(convert), given()
        loss = net(x).square().sum()
        if convert:
            assert sorted(empty(net)) == ["mem", "mem", "spike", "spike"]
        if moment != "before":
            loss.backward()
            x.zero_()  # the batch's memory is filled anew, and weights change
        if moment == "stepped":
            torch.optim.SGD(net.parameters(), lr=0.5).step()
            for parameter in net.parameters():
                parameter.data.mul_(3)
        found.append([one for node in (net.node2, net.node1) for one in read(node)])
        assert not empty(net)
    assert len(found[0]) == 4
    assert all(map(same, *found))


def test_a_state_goes_into_the_next_call_with_its_gradient():
    found = []
    for convert in (False, True):
        net, x = made(convert, resets=False), given()
        first = net(x)
        (first.square().sum() + net(x).square().sum() + net.node1.mem.sum()).backward()
        found.append([first, *(parameter.grad for parameter in net.parameters())])
        if convert:
            net.node1.mem = net.node2.mem = net.node1.spike = net.node2.spike = 0.0
            net(x)
            assert empty(net) == ["spike", "spike"], "what a step reads is let go of again"
    assert all(map(torch.equal, *found))


def test_the_tensor_is_the_same_object_with_its_version():
    net, x = made(True), given()
    seen = {}
    net.conv2.register_forward_hook(lambda *_: seen.update(mem=id(net.node1.mem)))
    net(x)
    assert "mem" in empty(net)
    mem = net.node1.mem
    assert (id(mem), mem._version) == (seen["mem"], 0)
    assert mem.untyped_storage().nbytes() == mem.nbytes


@pytest.mark.parametrize(
    "hold", [lambda t: t, lambda t: t.view(-1), lambda t: t.detach(), lambda t: t.detach().numpy()]
)
def test_what_somebody_else_has_stays(hold):
    net, x = made(True), given()
    held = []
    net.node1.register_forward_hook(lambda node, *_: held.append(hold(node.mem)))
    net(x)
    assert "mem" not in vars(vars(net.node1)).get("promised", {})
    assert vars(net.node1)["mem"].untyped_storage().nbytes()
    assert "mem" in vars(net.node2).promised


def test_what_the_tape_keeps_stays():
    net, x = made(True), given()
    with srp.reversible(net, mode="speed"):
        out = net(x)
    expected = made(False)
    expected(x)
    out.sum().backward()
    assert same(net.node1.mem, expected.node1.mem)


def test_attributes_are_an_ordinary_dict_again():
    net, x = made(True), given()
    net(x)
    assert empty(net)
    srp.restore(net)
    for node in (net.node1, net.node2):
        assert type(node) is Node
        assert {"mem", "spike"} <= {*vars(node)}
        assert node.mem.untyped_storage().nbytes()
    srp.convert_to_reversible(net)
    net(x)
    with srp.stock(net):
        assert net.node1.mem.numel() == net.node1.mem.untyped_storage().nbytes() // 4


def test_a_name_may_be_deleted_or_set():
    net, x = made(True), given()
    net(x)
    del net.node1.mem
    assert not hasattr(net.node1, "mem")
    net.node1.spike = 7.0
    assert (net.node1.spike, vars(net.node1)["spike"]) == (7.0, 7.0)
    net(x)
    expected = made(False)
    expected(x)
    assert same(net.node1.mem, expected.node1.mem)


def test_copies_and_pickles():
    net, x = made(True), given()
    expected = made(False)
    expected(x)
    net(x).sum().backward()
    for node in (net.node1, net.node2):
        node.spike = 0.0
    with torch.no_grad():
        mems = net.node1.mem.clone(), net.node2.mem.clone()
    for node in (net.node1, net.node2):
        node.mem = node.mem.detach()
    other = pickle.loads(pickle.dumps(net.node1))
    assert torch.equal(other.mem, mems[0])
    assert torch.equal(copy.deepcopy(net).node2.mem, mems[1])
    assert torch.equal(mems[0], expected.node1.mem)


def test_states_in_a_frameworks_table():
    base = pytest.importorskip("spikingjelly.activation_based.base")
    functional = pytest.importorskip("spikingjelly.activation_based.functional")

    class Complementary(base.MemoryModule):
        def __init__(self):
            super().__init__()
            self.register_memory("v", 0.0)

        def forward(self, x):
            self.v = self.v / 2 + x
            spike = Fire.apply(self.v - 0.5)
            self.v = self.v - spike
            return spike

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 8, 3), Complementary(), nn.Conv2d(8, 8, 3), Complementary())

    def step(model, x):
        functional.reset_net(model)
        return sum(model(x).square().mean() for _ in range(STEPS))

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return step(self.net, x)

    found = SimpleNamespace(held=[], states=[])
    for convert in (False, True):
        model, x = Loop(), given()
        if convert:
            srp.convert_to_reversible(model)
        model(x).backward()
        gc.collect()
        found.held.append(count_step(lambda model=model, x=x: model(x))[0])
        found.states.append([model.net[1].v, model.net[3].v])
    state = found.states[0][0].nbytes
    assert all(map(same, *found.states))
    assert found.held[1] < state < found.held[0]
