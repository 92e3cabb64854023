"""SpikingJelly neurons to compare: a zoo of surrogates, and one call that compares with stock."""

import copy

import torch
from spikingjelly.activation_based import base, functional, neuron, surrogate
from torch import nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.registry import reversible_type
from snn_reversible_plugin.modules.swap import swap
from snn_reversible_plugin.spikingjelly import RevIFNode, RevLIFNode, RevParametricLIFNode

REV = {
    neuron.IFNode: RevIFNode,
    neuron.LIFNode: RevLIFNode,
    neuron.ParametricLIFNode: RevParametricLIFNode,
}


class _Triangle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, width):
        ctx.save_for_backward(u)
        ctx.width = width
        return (u > 0).float().to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        g = grad.clone()
        g[u.abs() > ctx.width] = 0
        return g * (1 - u.abs() / ctx.width), None


class Triangle(nn.Module):
    """A surrogate as users write them: provably zeros and ones, element by element."""

    def __init__(self, width=0.9):
        super().__init__()
        self.width = width

    def forward(self, u):
        return _Triangle.apply(u, self.width)


class Learnable(nn.Module):
    """A surrogate that learns, and whose output can't be proved to be zeros and ones."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.3))

    def forward(self, u):
        soft = torch.sigmoid(self.slope * u)
        return (u >= 0).to(u) - soft.detach() + soft


class PerSample(nn.Module):
    """A surrogate that is not element by element."""

    def forward(self, u):
        return torch.sigmoid(u - u.mean())


class Stochastic(nn.Module):
    """A surrogate that draws random numbers."""

    def forward(self, u):
        soft = torch.sigmoid(4 * u)
        return torch.bernoulli(soft).detach() - soft.detach() + soft


def straight_through(u):
    soft = u.clamp(-1, 1)
    return (u >= 0).to(u) + (soft - soft.detach())


def zoo():
    """Every surrogate of the library that can be made and fires, and some of a user's."""
    found = {}
    for name, cls in vars(surrogate).items():
        if (
            isinstance(cls, type)
            and issubclass(cls, surrogate.SurrogateFunctionBase)
            and cls is not surrogate.SurrogateFunctionBase
            and name != "PoissonPass"  # wants probabilities
        ):
            found[name] = (lambda cls=cls: cls(3)) if name == "MultiLevelSpikeCount" else cls
    mine = (Triangle, Learnable, PerSample, Stochastic)
    return found | {cls.__name__: cls for cls in mine} | {"function": lambda: straight_through}


ZOO = zoo()
PRIMITIVES = [name for name in ZOO if hasattr(ZOO[name], "primitive_function") and name not in (
    "SuperSpike", "FakeNumericalGradient")]  # fmt: skip


def make(cls, surrogate_name="ATan", *, spiking=True, reset=0.0, detach=False, mode="m", store=False,
         dtype=torch.float32, **settings):  # fmt: skip
    function = ZOO[surrogate_name]() if isinstance(surrogate_name, str) else surrogate_name
    if not spiking:
        function.set_spiking_mode(False)
    node = cls(
        v_threshold=0.7, v_reset=reset, surrogate_function=function, detach_reset=detach,
        step_mode=mode, store_v_seq=store, **settings,
    )  # fmt: skip
    for module in node.modules():
        if isinstance(module, (Learnable, neuron.ParametricLIFNode)) and dtype is torch.float64:
            module.to(dtype)
    return node


def settings_of(cls):
    if cls is neuron.IFNode:
        return [{}]
    tau = {"init_tau": 1.7} if cls is neuron.ParametricLIFNode else {"tau": 1.7}
    return [{"decay_input": True, **tau}, {"decay_input": False, **tau}]


def outcome(node, x, v=None, *, seed=0, calls=1, spikes=True, membrane=True, loss=None):
    """Everything observable of a forward and backward: outputs, states, gradients, and strides."""
    functional.reset_net(node)
    torch.manual_seed(seed)
    x = x.detach().requires_grad_() if x.requires_grad else x
    if v is not None:
        v = v.detach().requires_grad_(v.requires_grad)
        node.v = v
    node.zero_grad()
    outs, states = [], []
    for _ in range(calls):
        if getattr(node, "step_mode", "m") == "s":
            stepped = [node(step) for step in x]
            out = torch.stack([s[0] if isinstance(s, list) else s for s in stepped])
        else:
            out = node(x)
        outs.append(out)
        if membrane and isinstance(node, base.MemoryModule):
            states += [m for m in node.memories() if isinstance(m, torch.Tensor)]
    v_seq = getattr(node, "v_seq", None)
    observed = [*outs, *states, *([v_seq] if isinstance(v_seq, torch.Tensor) else [])]
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in observed]
    terms = [
        (t * w).sum() for i, (t, w) in enumerate(zip(observed, weights, strict=True))
        if t.requires_grad and (spikes or i >= len(outs))
    ]  # fmt: skip
    total = sum(terms[1:], terms[0]) if loss is None else loss(observed)
    total.backward()
    grads = [x.grad, None if v is None else v.grad, *(p.grad for p in node.parameters())]
    return observed, grads


def everything(node, x):
    observed, grads = outcome(node, x)
    return [*observed, *grads]


def same(a, b):
    if a is None or b is None:
        return a is b
    return (
        a.dtype == b.dtype
        and a.stride() == b.stride()
        and (torch.equal(a, b) or torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)))
    )


def converted(node):
    functional.reset_net(node)
    node = copy.deepcopy(node)
    swap(node, reversible_type(node))
    return node


def check(node, x, v=None, *, taped=(False,), **how):
    """One stock neuron, its reversible counterpart: the same outcome."""
    rev = converted(node)
    for with_tape in taped:
        expected = outcome(node, x, v, **how)
        with tape.recording() if with_tape else torch.enable_grad():
            got = outcome(rev, x, v, **how)
        for kind, ours, theirs in zip(("value", "gradient"), got, expected, strict=True):
            for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert same(a, b), f"{type(rev).__name__}: {kind} {index} differs"
        for a, b in zip(got[0], expected[0], strict=True):
            assert a.requires_grad == b.requires_grad
    return rev


def current(*shape, dtype=torch.float32, device="cpu"):
    return (torch.randn(shape) * 1.5 + 0.4).to(device, dtype).requires_grad_()


def channels_last(x):
    flat = x.detach().flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.view(x.shape).requires_grad_()


LOSSES = {
    "weighted": None,
    "sum": lambda seen: sum(t.sum() for t in seen),
    "mean_of_steps": lambda seen: seen[0].mean(0).square().sum() + seen[1].sum(),
    "permuted": lambda seen: (seen[0].movedim(2, -1) ** 2 * torch.linspace(0, 1, seen[0].shape[2])).sum(),
    "one_step": lambda seen: seen[0][0].mul(3).sum() + seen[1].square().sum(),
    "pooled": lambda seen: seen[0].mean((-1, -2), keepdim=True).expand_as(seen[0]).sum(),
}


def packs(spikes):
    """Whether the tape stores a tensor as bits, or as a view or cast of such."""
    handle = tape.current().pack(spikes)
    while type(handle).__name__ == "Replayed" and handle.cheap:
        (handle,) = handle.operands()
    return type(handle).__name__ == "Packed"
