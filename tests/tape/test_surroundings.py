"""What traces, counts or transforms a converted network sees stock's operations, and stock's values."""

import copy
import warnings

import pytest
import snntorch
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron, op_counter
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import snn_reversible_plugin as srp

SETTINGS = [{"arithmetic": "stock"}, {"arithmetic": "auto"}]


def multi_step():
    return nn.Sequential(
        layer.Conv2d(1, 3, 3, step_mode="m"), layer.BatchNorm2d(3, step_mode="m"),
        neuron.LIFNode(step_mode="m", detach_reset=True), nn.Flatten(2), nn.Linear(12, 4),
        neuron.ParametricLIFNode(step_mode="m", v_reset=None),
        neuron.GatedLIFNode(T=3, step_mode="m"),
    )  # fmt: skip


class Loop(nn.Module):
    """Single-step neurons of both frameworks in one loop over time."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(8, 4)
        self.lif, self.node = snntorch.Leaky(beta=0.9, learn_beta=True), neuron.LIFNode()
        self.syn = snntorch.Synaptic(alpha=0.9, beta=0.8)

    def forward(self, x_seq):
        functional.reset_net(self)
        mem, (syn, out), total = self.lif.init_leaky(), self.syn.init_synaptic(), 0
        for x in x_seq:
            spikes, mem = self.lif(self.conv(x), mem)
            spikes = self.node(self.fc(spikes.flatten(1)))
            spikes, syn, out = self.syn(spikes, syn, out)
            total = total + out
        return total


MAKERS = [multi_step, Loop]


def pair(make, settings):
    """Stock and converted, equal."""
    torch.manual_seed(0)
    net = make()
    return net, srp.convert_to_reversible(copy.deepcopy(net), **settings)


class Operations(TorchDispatchMode):
    """Writes down which operations run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def spikingjellys(kind):
    def count(run):
        counter = getattr(op_counter, kind)()
        with op_counter.DispatchCounterMode([counter], strict=False):
            run()
        return counter.get_total()

    return count


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def operations(run):
    with Operations() as seen:
        run()
    return seen.names


COUNTERS = {
    "flops of torch": flops,
    **{kind: spikingjellys(kind) for kind in ("FlopCounter", "ACCounter", "MemoryAccessCounter")},
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("counter", [*COUNTERS, "any"])
def test_counters_without_a_gradient(make, settings, counter):
    count, x_seq, found = COUNTERS.get(counter, operations), torch.rand(3, 2, 1, 4, 4), []
    for net in pair(make, settings):
        with torch.no_grad():
            found.append(count(lambda net=net: net(x_seq)))
    assert found[0] == found[1] and found[0]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("counter", COUNTERS)
def test_counters_in_training(make, settings, counter):
    x_seq, found, gradients = torch.rand(3, 2, 1, 4, 4), [], []
    for net in pair(make, settings):
        found.append(COUNTERS[counter](lambda net=net: net(x_seq).square().sum().backward()))
        gradients.append([p.grad for p in net.parameters()])
    assert found[0] == found[1] and found[0]
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_mode_of_any_other_kind_sees_the_tape_in_training():
    """A tool that measures memory by a mode measures what is there."""
    _, net = pair(multi_step, {})
    x_seq = torch.rand(3, 2, 1, 4, 4)
    seen = operations(lambda: net(x_seq).square().sum().backward())
    assert seen.count("aten.convolution.default") == 2


def test_a_chain_under_a_mode_rebuilds_what_ran():
    """Its first run has no graph, and is part of training all the same."""

    def branch():
        return nn.Sequential(neuron.LIFNode(step_mode="m"), nn.Linear(4, 4))

    chain = srp.RevSSequence([srp.RevSBlock(branch(), branch(), dim=2) for _ in range(3)], states="reset")
    x, gradients = torch.rand(3, 2, 8), []
    for mode in (Operations(), None):
        chain.zero_grad()
        chain.check = True
        if mode is not None:
            with mode:
                chain(x).square().sum().backward()
        else:
            chain(x).square().sum().backward()
        assert chain.last_rebuild.flipped_spikes == 0
        gradients.append([p.grad for p in chain.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def hidden():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 8), snntorch.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 3),
        snntorch.Leaky(beta=0.8, init_hidden=True, output=True),
    )  # fmt: skip


def fresh(net):
    functional.reset_net(net)
    utils.reset(net)


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [multi_step, Loop, hidden])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_is_stocks(make, settings, grad):
    shape = (2, 1, 4, 4) if make is hidden else (3, 2, 1, 4, 4)
    a, b = torch.rand(shape) * 3, torch.rand(shape) * 3
    outputs = []
    for net in pair(make, settings):
        with torch.set_grad_enabled(grad):
            fresh(net)
            traced = torch.jit.trace(net, a, check_trace=False)
            fresh(net)
            output = traced(b)
        outputs.append(output if isinstance(output, tuple) else (output,))
    for stock, ours in zip(*outputs, strict=True):
        assert torch.equal(stock, ours)


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("how", ["export", "make_fx"])
def test_an_exported_graph_is_stocks(settings, how):
    a, b = torch.rand(3, 2, 1, 4, 4) * 3, torch.rand(3, 2, 1, 4, 4) * 3
    graphs = []
    for net in pair(Loop, settings):
        if how == "make_fx":
            graph = make_fx(net)(a)
        else:
            graph = torch.export.export(net, (a,), strict=False).module()
        graphs.append(graph(b))
    assert torch.equal(*graphs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_fake_tensors(settings):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for net in pair(Loop, settings):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            output = net(mode.from_tensor(torch.rand(3, 2, 1, 4, 4)))
        assert output.shape == (2, 4)


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return super().is_leaf_module(module, name) or isinstance(module, neuron.BaseNode)


@pytest.mark.parametrize("settings", SETTINGS)
def test_symbolic_traces(settings):
    x_seq, outputs = torch.rand(3, 2, 4), []

    def make():
        return nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(step_mode="m"), nn.Linear(4, 2))

    for net in pair(make, settings):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.fx.GraphModule(net, Leaves().trace(net))
        outputs.append(graph(x_seq))
    assert torch.equal(*outputs)


class Straight(nn.Module):
    """A surrogate of torch's operations, which have formulas in forward mode too."""

    def forward(self, x):
        soft = torch.sigmoid(4 * x)
        return (x > 0).float() + soft - soft.detach()


class Readout(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 8), snntorch.Leaky(beta=0.9, spike_grad=Straight())

    def forward(self, x_seq):
        mem, total = self.lif.init_leaky(), 0
        for x in x_seq:
            spikes, mem = self.lif(self.fc(x), mem)
            total = total + spikes
        return total


@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_in_forward_mode(settings):
    net, converted = pair(Readout, settings)
    x, direction = torch.rand(3, 2, 6), torch.rand(3, 2, 6)
    found = []
    for model in (net, converted):
        with forward_ad.dual_level():
            found.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))))
    (primal, tangent), (ours, ours_along) = found
    assert torch.equal(primal, ours) and torch.equal(tangent, ours_along) and tangent.any()
