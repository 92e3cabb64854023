"""Tensors whose values stand in no storage of their own: sparse, nested and wrapped ones, in a network."""

import copy
import warnings

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.utils._pytree import tree_map

import snn_reversible_plugin as srp
from snn_reversible_plugin.ops.layouts import is_plain, parts_in_memory


class Wrapped(torch.Tensor):
    """A wrapper, as libraries for tensor parallelism and quantized training write them."""

    @staticmethod
    def __new__(cls, inner):
        kind = {"dtype": inner.dtype, "device": inner.device}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), **kind)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = tree_map(lambda one: one.inner if isinstance(one, cls) else one, (args, kwargs or {}))
        out = func(*bare[0], **bare[1])
        return tree_map(lambda one: cls(one) if isinstance(one, torch.Tensor) else one, out)


class Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Wrapped(x.detach())

    @staticmethod
    def backward(ctx, grad):
        return grad.inner if isinstance(grad, Wrapped) else grad


class Unwrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.detach()

    @staticmethod
    def backward(ctx, grad):
        return Wrapped(grad)


def jagged(spikes, mem):
    return torch.nested.as_nested_tensor([spikes[:1], mem[1:]], layout=torch.jagged)


def nested(spikes, mem):
    both = torch.nested.as_nested_tensor([spikes[0, :5], mem[1]])
    return torch.nested.to_padded_tensor(both * 2, 0.0).sum(0)


def nested_product(spikes, mem, w):
    """Nested tensors with strides have a storage, and neither a shape nor strides."""
    both = torch.nested.as_nested_tensor([spikes[:1], mem])
    product = torch.nn.functional.linear(both.relu() * 2, w)
    return torch.cat([(product + torch.zeros_like(product)).unbind()[0] for _ in range(2)])


def wrapped(spikes, mem):
    return Unwrap.apply((Wrap.apply(spikes) * 2).sigmoid() * Wrap.apply(mem))


BETWEEN = {
    "coo": lambda spikes, mem, w: torch.sparse.mm(spikes.to_sparse(), w),
    "coo of numbers": lambda spikes, mem, w: torch.sparse.mm((mem * spikes).to_sparse() * 2, w),
    "csr": lambda spikes, mem, w: (mem * spikes).to_sparse_csr() @ w,
    "mkldnn": lambda spikes, mem, w: (mem.to_mkldnn().relu().to_dense() + spikes) @ w,
    "jagged": lambda spikes, mem, w: torch.cat((jagged(spikes, mem) * 2).sigmoid().unbind()) @ w,
    "nested": lambda spikes, mem, w: (
        torch.nested.to_padded_tensor(torch.nested.as_nested_tensor([spikes[0, :5], mem[1]]) * 2, 0.0).sum(
            0
        )
        + mem @ w
    ),
    "nested, a product": nested_product,
    "wrapped": lambda spikes, mem, w: (
        Unwrap.apply((Wrap.apply(spikes) * 2).sigmoid() * Wrap.apply(mem)) @ w
    ),
}


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 8), snntorch.Leaky(beta=0.9)
        self.weight, self.out = nn.Parameter(torch.rand(8, 8)), snntorch.Leaky(beta=0.9)
        self.between = between

    def forward(self, x_seq):
        mem, last, total = self.lif.init_leaky(), self.out.init_leaky(), 0
        for x in x_seq:
            spikes, mem = self.lif(self.fc(x), mem)
            spikes, last = self.out(self.between(spikes, mem, self.weight), last)
            total = total + last
        return total


def gradients(net, x):
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in net.parameters())]


@pytest.fixture(autouse=True)
def no_prototype_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(prototype|beta state|invariant checks).*")
        yield


@pytest.fixture(name="x")
def x_fixture():
    torch.manual_seed(0)
    return torch.rand(5, 2, 6) * 2


@pytest.mark.parametrize("mode", ["memory", "speed", "minimal", "auto"])
@pytest.mark.parametrize("between", BETWEEN)
def test_gradients_are_stocks(between, mode, x):
    net = Net(BETWEEN[between])
    converted = srp.convert_to_reversible(copy.deepcopy(net), mode=mode, arithmetic="stock")
    for expected, found in zip(gradients(net, x), gradients(converted, x), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("between", BETWEEN)
def test_check_mode_and_reports(between, x):
    net = srp.convert_to_reversible(Net(BETWEEN[between]), arithmetic="stock")
    with srp.reversible(net, check=True):
        net(x).sum().backward()
    report = srp.memory_report(net, x)
    assert report.converted.held > 0 and report.stock.held > 0


class OfNested(nn.Module):
    """A neuron that is given the parts of a nested current, and nested outputs."""

    def __init__(self, layout):
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(6, 8), neuron.LIFNode(step_mode="m"), nn.Linear(8, 3)
        self.layout = layout

    def forward(self, x):
        of_parts = []
        for part in self.fc(torch.nested.as_nested_tensor([x[0], x[1, :1]], layout=self.layout)).unbind():
            functional.reset_net(self)
            of_parts.append(self.lif(part[None])[0])
        return self.out(torch.nested.as_nested_tensor(of_parts, layout=self.layout))


@pytest.mark.parametrize("mode", ["memory", "auto"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_verified_where_layers_are_given_nested_tensors(layout, mode, x):
    def loss(output):
        return sum(part.square().sum() for part in output.unbind())

    net = srp.convert_to_reversible(OfNested(layout), mode=mode)
    found = srp.verify(net, x, loss=loss, repeats=1)
    assert found.ok and not found.unseen
    assert srp.memory_report(net, x, loss=loss).converted.held > 0


class LoopOfNested(nn.Module):
    """A neuron's state is a nested tensor."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 8), snntorch.Leaky(beta=0.9)

    def forward(self, x):
        total, mem = 0, self.lif.init_leaky()
        currents = self.fc(torch.nested.as_nested_tensor([x[0], x[1, :1]], layout=torch.jagged))
        for _ in range(3):
            _, mem = self.lif(currents, mem)
            total = total + mem.values()
        return total


@pytest.mark.filterwarnings("ignore:.*goes on in stock's arithmetic")
def test_verified_where_states_are_nested_tensors(x):
    found = srp.verify(srp.convert_to_reversible(LoopOfNested()), x, repeats=1)
    assert found.ok and not found.flipped_spikes


class OfWrapped(nn.Module):
    """A neuron that is given wrapped currents."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 8), snntorch.Leaky(beta=0.9)

    def forward(self, x_seq):
        mem, total = self.lif.init_leaky(), 0
        for x in x_seq:
            spikes, mem = self.lif(Wrap.apply(self.fc(x)), mem)
            total = total + Unwrap.apply(spikes)
        return total


@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
@pytest.mark.filterwarnings("ignore:.*off the grid")
def test_wrapped_currents(arithmetic, x):
    net = OfWrapped()
    converted = srp.convert_to_reversible(copy.deepcopy(net), arithmetic=arithmetic)
    for expected, found in zip(gradients(net, x), gradients(converted, x), strict=True):
        assert torch.equal(expected, found)


def test_what_tensors_are_made_of():
    dense = torch.eye(3)
    sparse = dense.to_sparse()
    assert is_plain(dense) and parts_in_memory(dense) == (dense,)
    assert not is_plain(sparse) and sum(part.numel() for part in parts_in_memory(sparse)) == 9
    assert not is_plain(Wrapped(dense)) and parts_in_memory(Wrapped(dense)) == ()
    values = torch.nested.as_nested_tensor([dense, dense], layout=torch.jagged)
    assert any(part.numel() == 18 for part in parts_in_memory(values))
    strided = torch.nested.as_nested_tensor([dense, dense])
    assert not is_plain(strided) and parts_in_memory(strided) == (strided,)
