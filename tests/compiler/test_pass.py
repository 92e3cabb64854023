"""Networks partitioned with the pass and without: equal bit for bit, and a small part is stored."""

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from for_compilers import Broken, Loop, Rounded
from graph_only import GraphOnly
from snn_reversible_plugin.compiler.passes import InputsAsTheyAre
from snn_reversible_plugin.compiler.progress import compiling


class Block(nn.Module):
    """A residual block; the branch ends in spikes, as SEW-ResNet's, or begins with them, as MS-ResNet's."""

    def __init__(self, spikes_last):
        super().__init__()
        parts = [layer.Conv2d(8, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8)]
        lif = neuron.LIFNode(detach_reset=True)
        self.branch = nn.Sequential(*parts, lif) if spikes_last else nn.Sequential(lif, *parts)

    def forward(self, x_seq):
        return x_seq + self.branch(x_seq)


def multi_step(*layers):
    net = nn.Sequential(*layers)
    functional.set_step_mode(net, "m")
    return net


def conv(before=2, after=8):
    return layer.Conv2d(before, after, 3, padding=1, bias=False), layer.BatchNorm2d(after)


def layers():
    return multi_step(
        *conv(),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2),
        *conv(8, 8),
        neuron.IFNode(),
    )


def sums():
    return multi_step(*conv(), neuron.IFNode(), *(Block(True) for _ in range(2)), *conv(8, 8))


def streams():
    return multi_step(*conv(), *(Block(False) for _ in range(5)), neuron.IFNode(), *conv(8, 4))


def dropouts():
    return multi_step(
        *conv(), neuron.IFNode(), layer.Dropout(0.4), *conv(8, 8), nn.Dropout(0.3), *conv(8, 8)
    )


class SnnTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(12, 32), snntorch.Leaky(beta=0.9, learn_beta=True)
        self.fc2, self.lif2 = nn.Linear(32, 24), snntorch.Leaky(beta=0.8, reset_mechanism="zero")

    def forward(self, x_seq):
        mem1, mem2, out = self.lif1.init_leaky(), self.lif2.init_leaky(), []
        for x in x_seq:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            out.append(mem2)
        return torch.stack(out)


def train(make, x, backend, steps=1):
    torch._dynamo.reset()
    torch.manual_seed(1)
    net = make()
    compiled = torch.compile(net, backend=backend)
    found = []
    for _ in range(steps):
        functional.reset_net(net)
        net.zero_grad()
        torch.manual_seed(2)
        out = compiled(x)
        (out * torch.arange(out.numel()).view_as(out).remainder(5)).sum().backward()
        found += [out.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]
    return found


IMAGES, ROWS = (2, 4, 2, 8, 8), (5, 16, 12)
NETWORKS = {
    "layers": (layers, IMAGES, 0.04),
    "sums of spikes": (sums, IMAGES, 0.05),
    "float streams": (streams, IMAGES, 0.2),
    "dropout": (dropouts, IMAGES, 0.25),
    "own loop": (Loop, ROWS, 0.5),
    "recurrent, integer spikes": (lambda: Loop(Rounded, recurrent=True), ROWS, 0.7),
    "snnTorch": (SnnTorch, ROWS, 0.7),
}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_bit_for_bit_and_small(name):
    """Both modes where layers are many time steps wide, and where a loop steps them."""
    make, shape, part = NETWORKS[name]
    x = (torch.rand(shape) > 0.5).float() + torch.rand(shape)
    stock = GraphOnly(None)
    expected = train(make, x, stock)
    stored = {}
    for mode in ("memory", "speed") if name in ("layers", "snnTorch") else ("memory",):
        ours = GraphOnly(mode)
        actual = train(make, x, ours)
        for a, b in zip(expected, actual, strict=True):
            assert torch.equal(a, b)
        stored[mode] = ours.saved_bytes
    assert stored["memory"] <= part * stock.saved_bytes
    assert stored["memory"] <= min(stored.values())


class Pooled(nn.Module):
    """A pool over floats; and a neuron that is found by one path in the first step, then by another."""

    def __init__(self):
        super().__init__()
        lif = snntorch.Leaky(beta=0.5, init_hidden=True)
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), lif, nn.Conv2d(4, 4, 3))

    def forward(self, x_seq):
        return torch.stack([self.net(x) for x in x_seq])


def written(backend):
    """Values of a backward that are to be in memory once they are computed."""
    return [
        node
        for _, backward in backend.halves
        for node in backward.nodes
        if node.meta.get("inductor_realize_to_strides")
    ]


def test_all_steps_share_bytes_and_pools_of_floats_write_their_choices():
    x = torch.rand(3, 4, 2, 10, 10) * 3
    stock, ours, of_spikes = GraphOnly(None), GraphOnly(), GraphOnly()
    assert all(map(torch.equal, train(Pooled, x, stock), train(Pooled, x, ours)))
    assert [one.shape for one in ours.saved if one.dtype is torch.uint8] == [(4, 4, 4, 4)]
    assert [node.args[1] for node in written(ours)] == [1, 1, 1]
    train(layers, torch.rand(IMAGES) * 3, of_spikes)
    assert written(of_spikes) == []


def test_each_region_is_served():
    x = torch.rand(ROWS) * 3
    stock, ours = GraphOnly(None), GraphOnly()
    for a, b in zip(train(Broken, x, stock), train(Broken, x, ours), strict=True):
        assert torch.equal(a, b)
    # What crosses the break is an input of the second region, and held as it is.
    assert [region.packed for region in ours.packing.regions] == [0, 1]
    assert 0 < ours.saved_bytes < 0.3 * stock.saved_bytes


class PassedOn(nn.Module):
    """Its backward has nothing to compute."""

    def forward(self, x):
        return x + x.detach().sign()


def test_a_gradient_that_only_passes_through():
    x = torch.rand(3, 4, requires_grad=True)
    backend = GraphOnly()
    torch.compile(PassedOn(), backend=backend)(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 4)) and backend.packing.regions == []


class Budgeted(nn.Module):
    """A dropout whose mask is the gradient's, in a region with a budget that stores nothing."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64, 64))

    def forward(self, x):
        with torch.autograd.graph.region_activation_memory_budget(0.0):
            return nn.functional.dropout(x * self.scale, 0.5).sin()


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="came with torch 2.14"
)
def test_a_budget_on_a_region_is_set_aside():
    torch._dynamo.reset()
    net, x = Budgeted(), torch.ones(64, 64)
    out = torch.compile(net, backend=GraphOnly())(x)
    out.sum().backward()
    assert torch.equal(net.scale.grad != 0, out != 0) and 0 < (out != 0).float().mean() < 1


def test_a_converted_model():
    x = torch.rand(ROWS) * 3
    ours, converted = GraphOnly(), GraphOnly()
    expected = train(Broken, x, ours)
    actual = train(lambda: srp.convert_to_reversible(Broken()), x, converted)
    assert all(map(torch.equal, expected, actual))
    assert converted.saved_bytes == ours.saved_bytes


@pytest.mark.slow
def test_sizes_that_change():
    """The second size makes the compiler use symbols; codes are packed along what stays."""
    net = Broken()
    backend = GraphOnly()
    compiled = torch.compile(net, backend=backend)
    for batch in (16, 24, 9):
        x = torch.rand(4, batch, 12) * 3
        gradients = []
        for run in (compiled, net):
            functional.reset_net(net)
            net.zero_grad()
            run(x).square().sum().backward()
            gradients.append([parameter.grad for parameter in net.parameters()])
        assert all(map(torch.equal, *gradients))
    assert len(backend.packing.regions) == 4


def test_an_input_that_is_saved_keeps_its_layout():
    """Inductor is told that it is visible; a backward, which returns gradients, says nothing of that."""
    graph = torch.fx.Graph()
    weight = graph.placeholder("weight")
    result = graph.call_function(torch.ops.aten.relu.default, (weight,))
    output = graph.output((result, weight, result))
    InputsAsTheyAre()(graph)
    assert "user_visible_output_idxs" not in output.meta
    output.meta["user_visible_output_idxs"] = [0]
    InputsAsTheyAre()(graph)
    assert output.meta["user_visible_output_idxs"] == [0, 1]


def test_a_compilation_says_what_it_is_at(caplog):
    with caplog.at_level("INFO", "snn_reversible_plugin.compiler"), compiling(1200):
        torch.compile(nn.Linear(2, 2), backend=GraphOnly())(torch.rand(1, 2)).sum().backward()
    first, *_, stored, last = (record.message for record in caplog.records)
    assert first.endswith("1,200 operations") and "B stored" in stored and last.startswith("compiled in")
