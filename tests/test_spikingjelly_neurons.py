"""SpikingJelly's neurons, reversible against stock: every output, state and gradient bit for bit."""

import copy
import itertools
import math
import pickle

import pytest
import torch

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.registry import StaysStock, SwappedClass, reversible_type, swap
from snn_reversible_plugin.spikingjelly import (
    RevIFNode,
    RevLIFNode,
    RevParametricLIFNode,
    nodes,
    register,
)
from snn_reversible_plugin.spikingjelly.surrogates import proved

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
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


# -- the three with an analytic backward --------------------------------------------------------------

RESETS = [0.0, None, -0.2]
CONFIGURATIONS = [
    pytest.param(cls, settings, reset, detach, id=f"{cls.__name__}-{settings.get('decay_input')}-{reset}-{detach}")
    for cls in REV
    for settings in settings_of(cls)
    for reset, detach in itertools.product(RESETS, [True, False])
]


@pytest.mark.parametrize(("cls", "settings", "reset", "detach"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration(cls, settings, reset, detach, dtype, device):
    for mode, store, steps in itertools.product("ms", [False, True], [1, 4]):
        node = make(cls, reset=reset, detach=detach, mode=mode, store=store, dtype=dtype, **settings)
        node.to(device)
        x = current(steps, 3, 5, dtype=dtype, device=device)
        carried = (torch.randn(3, 5) * 0.5).to(device, dtype).requires_grad_()
        check(node, x, taped=(False, True))
        check(node, x, carried, calls=2)
        check(node, x, carried.detach(), spikes=False, taped=(True,))
        check(node, x, membrane=False)
        check(node, x.detach(), carried)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_surrogate(name, dtype):
    x = current(3, 2, 7, dtype=dtype)
    v = torch.randn(2, 7).to(dtype).requires_grad_()
    for cls, reset, detach, mode in itertools.product(REV, [0.0, None], [True, False], "ms"):
        node = make(cls, name, reset=reset, detach=detach, mode=mode, dtype=dtype)
        check(node, x, v, calls=2, taped=(True,))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_surrogates_that_do_not_spike(name):
    x = current(3, 2, 7)
    for cls, reset, mode in itertools.product(REV, [0.0, None, 0.1], "ms"):
        node = make(cls, name, spiking=False, reset=reset, mode=mode)
        rev = check(node, x, calls=2, taped=(True,))
        with tape.recording():
            assert not packs(rev(x))


@pytest.mark.parametrize(
    "shape",
    [(4, 0, 3), (2, 1, 1), (1, 1), (4, 3), (1, 2, 3, 4, 4), (3, 2, 3, 5, 4), (2, 2, 2, 2, 3, 2),
     (2, 3, 0, 2, 2), (3, 1, 4, 1, 1), (3, 2, 1, 4, 4)],
)  # fmt: skip
@pytest.mark.parametrize("cls", REV)
def test_shapes(cls, shape):
    for settings, detach, mode in itertools.product(settings_of(cls), [True, False], "ms"):
        node = make(cls, detach=detach, mode=mode, **settings)
        check(node, current(*shape), torch.rand(shape[1:], requires_grad=True), taped=(False, True))
        check(node, current(*shape), taped=(True,))


def channels_last(x):
    flat = x.detach().flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return flat.view(x.shape).requires_grad_()


LAYOUTS = {
    "channels_last": channels_last,
    "time_inside": lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
    "transposed": lambda x: x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_(),
    "sliced": lambda x: torch.cat([x, x], -1).detach()[..., : x.shape[-1]].requires_grad_(),
    "expanded": lambda x: x.detach()[:1].expand(x.shape).requires_grad_(),
    "one_channel": lambda x: channels_last(x[:, :, :1]),
    "one_pixel": lambda x: channels_last(x[..., :1, :1]),
    "plain": lambda x: x,
}
LOSSES = {
    "weighted": None,
    "sum": lambda seen: sum(t.sum() for t in seen),
    "mean_of_steps": lambda seen: seen[0].mean(0).square().sum() + seen[1].sum(),
    "permuted": lambda seen: (seen[0].movedim(2, -1) ** 2 * torch.linspace(0, 1, seen[0].shape[2])).sum(),
    "one_step": lambda seen: seen[0][0].mul(3).sum() + seen[1].square().sum(),
    "pooled": lambda seen: seen[0].mean((-1, -2), keepdim=True).expand_as(seen[0]).sum(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", REV)
def test_layouts(cls, layout):
    x = LAYOUTS[layout](current(3, 2, 4, 3, 5))
    others = [None, torch.rand(x.shape[1:], requires_grad=True),
              torch.rand(x.shape[1:]).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()]  # fmt: skip
    for loss, v, mode in itertools.product(LOSSES.values(), others, "ms"):
        node = make(cls, detach=False, mode=mode, **settings_of(cls)[0])
        check(node, x, v, loss=loss, taped=(True,))


@pytest.mark.parametrize("cls", REV)
def test_chunks_of_neurons_give_the_same(cls, monkeypatch):
    monkeypatch.setattr("snn_reversible_plugin.sweeps.chunk_size", lambda device: 7)
    monkeypatch.setattr("snn_reversible_plugin.spikingjelly.nodes.chunk_size", lambda device: 7)
    for settings, reset, store, name in itertools.product(
        settings_of(cls), RESETS, [False, True], ["ATan", "Rect", "Triangle"]
    ):
        node = make(cls, name, reset=reset, store=store, **settings)
        v = torch.rand(3, 11, requires_grad=True)
        for start in (None, v, v.detach()):
            check(node, current(4, 3, 11), start, taped=(False, True))
            check(node, current(4, 3, 11).detach(), v)


@pytest.mark.parametrize("cls", REV)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_numbers_that_are_not_finite(cls, value):
    for reset, detach, mode in itertools.product(RESETS, [True, False], "ms"):
        x = current(3, 2, 6).detach()
        x[1, 0, 2] = value
        node = make(cls, reset=reset, detach=detach, mode=mode)
        check(node, x.requires_grad_())
        check(node, x, loss=lambda seen: (seen[0] * math.inf).sum() + seen[1].sum())


@pytest.mark.parametrize("cls", REV)
@pytest.mark.parametrize("threshold", [0.0, -0.3, math.inf, 1e-35])
def test_thresholds(cls, threshold):
    for reset, mode in itertools.product(RESETS, "ms"):
        node = make(cls, reset=reset, mode=mode)
        node.v_threshold = threshold
        check(node, current(3, 2, 6))


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("cls", REV)
def test_a_state_used_by_the_loss_and_by_the_next_call(cls, mode):
    def loss(seen):
        return sum((t.sin() * (i + 1.7)).sum() for i, t in enumerate(seen))

    for dtype, name in itertools.product([torch.float32, torch.float64], ["ATan", "Learnable", "Rect"]):
        node = make(cls, name, mode=mode, dtype=dtype)
        v = torch.rand(3, 40, dtype=dtype, requires_grad=True)
        check(node, current(4, 3, 40, dtype=dtype), v, calls=3, loss=loss, taped=(True,))


def test_another_shape_and_dtype_of_the_carried_state():
    for cls, mode in itertools.product(REV, "ms"):
        stock = make(cls, mode=mode)
        rev = converted(stock)
        for shape, dtype in [((4, 2, 3), torch.float32), ((4, 5), torch.float32), ((4, 5), torch.float64)]:
            results = []
            for node in (stock, rev):
                torch.manual_seed(1)
                x = current(*shape, dtype=dtype)
                out = node(x) if mode == "m" else torch.stack([node(step) for step in x])
                (out.sum() + node.v.sum()).backward()
                results.append((out, node.v, x.grad))
                functional.detach_net(node)
            assert all(map(same, *results))


def test_settings_changed_at_any_time():
    stock = make(neuron.LIFNode, mode="s")
    rev = converted(stock)
    for change in [{"step_mode": "m"}, {"v_threshold": 0.4}, {"tau": 3.0}, {"v_reset": None},
                   {"detach_reset": True}, {"decay_input": False}, {"store_v_seq": True},
                   {"surrogate_function": Triangle(0.5)}, {"step_mode": "s"}]:  # fmt: skip
        for node in (stock, rev):
            for name, value in change.items():
                setattr(node, name, value)
        x = current(4, 2, 3)
        for a, b in zip(*(sum(outcome(node, x), []) for node in (stock, rev)), strict=True):
            assert same(a, b), change


def test_settings_are_those_of_the_forward():
    for cls, dtype in itertools.product(REV, [torch.float32, torch.float64]):
        results = []
        for node in (make(cls, "Rect"), converted(make(cls, "Rect"))):
            torch.manual_seed(2)
            x = current(4, 2, 3, dtype=dtype)
            out = node(x)
            node.v_threshold, node.v_reset, node.detach_reset = 0.1, None, True
            out.sum().backward()
            results.append(x.grad)
        assert same(*results)


def test_partial_gradients_and_several_backwards():
    for cls in REV:
        results = []
        for node in (make(cls), converted(make(cls))):
            torch.manual_seed(3)
            x = current(4, 2, 3)
            with tape.recording():
                out = node(x * 2)
            grads = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0]]
            grads += torch.autograd.grad((out * 3).sum() + node.v.sum(), x, retain_graph=True)
            out.sum().backward(retain_graph=True)
            out.mean().backward()
            results.append([*grads, x.grad, *(p.grad for p in node.parameters())])
        assert all(map(same, *results))


@pytest.mark.parametrize("mode", ["m", "s"])
def test_double_backward_is_refused(mode):
    x = current(4, 2, 3)
    node = converted(make(neuron.LIFNode, mode=mode))
    with pytest.raises(RuntimeError, match=r"double backward.*stock\(model\)"):
        torch.autograd.grad(node(x).sum(), x, create_graph=True)
    node = converted(neuron.QIFNode(step_mode="m"))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(node(x).sum(), x, create_graph=True)


def test_double_backward_through_a_black_box_is_stocks():
    results = []
    for node in (neuron.KLIFNode(step_mode="m"), converted(neuron.KLIFNode(step_mode="m"))):
        torch.manual_seed(1)
        x = current(4, 2, 3)
        (grad,) = torch.autograd.grad(node(x).sum(), x, create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), (x, node.k))])
    assert all(map(same, *results))


def test_stock_runs_where_nothing_is_learned():
    node = converted(make(neuron.LIFNode, "Rect"))
    with torch.no_grad():
        assert not node(current(3, 4)).requires_grad
    functional.reset_net(node)
    assert not node(current(3, 4).detach()).requires_grad
    with tape.recording():
        assert packs(node(current(3, 4).detach()))


def test_function_transforms_run_stock():
    x = current(3, 4).detach()
    grads = []
    for node in (make(neuron.LIFNode, "Rect"), converted(make(neuron.LIFNode, "Rect"))):
        grads.append(torch.func.grad(lambda x, node=node: node(x).sum())(x))
    assert same(*grads)


@pytest.mark.parametrize("cls", REV)
def test_bad_input_fails_as_in_stock(cls):
    for x, mode in [(torch.zeros(0, 3, requires_grad=True), "m"), ("no tensor", "m"),
                    (torch.zeros((), requires_grad=True), "m"), ("no tensor", "s")]:  # fmt: skip
        with pytest.raises(Exception) as stock:  # noqa: B017
            make(cls, mode=mode)(x)
        with pytest.raises(type(stock.value)) as ours:
            converted(make(cls, mode=mode))(x)
        assert str(ours.value) == str(stock.value)


def test_scalars_and_integers():
    x = torch.tensor(0.9, requires_grad=True)
    for cls in REV:
        a, b = make(cls, mode="s"), converted(make(cls, mode="s"))
        for _ in range(3):
            assert same(a(x), b(x))


def packs(spikes):
    """Whether the tape stores a tensor as bits."""
    handle = tape.current().pack(spikes)
    return type(handle).__name__ == "Packed"


@pytest.mark.parametrize(
    ("name", "proof", "bits"),
    [("ATan", True, True), ("Rect", True, True), ("Triangle", True, True), ("Learnable", False, False),
     ("PerSample", False, False), ("Stochastic", False, False), ("function", True, False),
     ("MultiLevelSpikeCount", True, False), ("PoissonPass", False, False)],
)  # fmt: skip
def test_what_is_proved_of_a_surrogate(name, proof, bits):
    function = surrogate.PoissonPass() if name == "PoissonPass" else ZOO[name]()
    known = proved(function, torch.Size((2, 3)), torch.float32, torch.device("cpu"), 6)
    assert (known is not None) == proof
    if known is not None:
        assert (known.fire is None) == bits
    if name == "PoissonPass":
        return
    for mode in "ms":
        node = converted(make(neuron.LIFNode, function, mode=mode))
        with tape.recording():
            assert packs(node(current(4, 2, 3))) == bits


def test_an_arithmetic_that_differs_from_the_installed_one_is_not_used(monkeypatch):
    nodes._agrees.cache_clear()
    monkeypatch.setattr(
        functional, "lif_multi_step", lambda x, *args: (x.relu(), x[-1].relu(), None)
    )
    assert not nodes._agrees(neuron.LIFNode, True, True, True, "ATan")
    nodes._agrees.cache_clear()


# -- names, classes, pickles ---------------------------------------------------------------------------


def test_names():
    register()
    for stock, rev in REV.items():
        assert getattr(neuron, f"Rev{stock.__name__}") is rev
        node = rev()
        assert isinstance(node, stock)
        assert reversible_type(node) is rev
        assert (node.treatment, node.arithmetic) == ("analytic", "stock")


class Plain(neuron.LIFNode):
    """The dynamics of LIF, with something of its own beside."""

    def __init__(self, note, **settings):
        super().__init__(**settings)
        self.note = note


class Doubled(neuron.LIFNode):
    """Its own dynamics, learnable, stepwise."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.gain = nn.Parameter(torch.tensor(1.7))

    def single_step_functional_forward(self, inputs, states, **kwargs):
        v = states[0] * 0.5 + inputs[0] * self.gain * self.gain
        s = self.surrogate_function(v - self.v_threshold)
        return (s,), (v - s * self.v_threshold * self.gain,)

    def multi_step_functional_forward(self, inputs, states, **kwargs):
        return base.MemoryModule.multi_step_functional_forward(self, inputs, states, **kwargs)


class Counting(neuron.LIFNode):
    """Changes what it returns, counts its calls, and writes to a buffer of its own in place."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls, self.log = 0, []
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.seen += 1
        return super().forward(x * self.seen.item()) * 2


class Traced(neuron.SimpleBaseNode):
    """A user's SimpleBaseNode, with a second state."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_memory("trace", 0.0)

    def neuronal_charge(self, x):
        self.trace = self.trace * 0.8 + x
        self.v = self.v * 0.5 + self.trace * x


class InPlace(neuron.SimpleIFNode):
    """Writes to its state in place, which autograd allows here."""

    def neuronal_charge(self, x):
        if isinstance(self.v, float):
            self.v = torch.zeros_like(x)
        self.v += x


@pytest.mark.parametrize("mode", ["m", "s"])
def test_subclasses_of_a_user(mode):
    rev = check(make(lambda **s: Plain("n", **s), mode=mode), current(4, 2, 3), taped=(True,))
    assert rev.treatment == "analytic"
    assert rev.note == "n"
    with tape.recording():
        assert packs(rev(current(4, 2, 3)) if mode == "m" else rev(current(2, 3)))
    v = torch.rand(2, 3, requires_grad=True)
    rev = check(make(Doubled, mode=mode), current(4, 2, 3), v, calls=2, taped=(False, True))
    assert rev.treatment == "generic replay"
    with tape.recording():
        assert packs(rev(current(4, 2, 3)) if mode == "m" else rev(current(2, 3)))
    rev = check(make(Counting, mode=mode), current(4, 2, 3), taped=(False, True))
    assert rev.log == list(range(1, rev.calls + 1))
    for cls in (Traced, InPlace):
        node = cls(v_threshold=0.7, v_reset=0.0, step_mode=mode)
        check(node, current(4, 2, 3), calls=2, taped=(False, True))


def test_copies_and_pickles(tmp_path):
    x = current(4, 2, 3)
    for node in (make(neuron.LIFNode), neuron.QIFNode(step_mode="m"), make(lambda **s: Plain(1, **s))):
        rev = converted(node)
        for twin in (copy.deepcopy(rev), pickle.loads(pickle.dumps(rev))):
            assert type(twin) is type(rev)
            assert all(map(same, *(sum(outcome(n, x), []) for n in (node, twin))))
        torch.save(rev, tmp_path / "node.pt")
        twin = torch.load(tmp_path / "node.pt", weights_only=False)
        assert type(twin) is type(rev)


def test_through_the_converter():
    def network():
        torch.manual_seed(5)
        return nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1, step_mode="m"), layer.BatchNorm2d(4, step_mode="m"),
            neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m"),
            layer.Conv2d(4, 4, 3, padding=1, step_mode="m"), layer.BatchNorm2d(4, step_mode="m"),
            neuron.ParametricLIFNode(surrogate_function=Triangle(), step_mode="m"),
            layer.Conv2d(4, 4, 3, padding=1, step_mode="m"),
            neuron.QIFNode(step_mode="m"),
            layer.Conv2d(4, 4, 3, padding=1, step_mode="m"),
            neuron.KLIFNode(scale_reset=True, step_mode="m"),
        )  # fmt: skip

    results = []
    for model in (network(), srp.convert_to_reversible(network())):
        torch.manual_seed(6)
        x = torch.rand(4, 3, 2, 6, 6).requires_grad_()
        out = model(x)
        (out * torch.randn_like(out)).sum().backward()
        results.append([out, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert all(map(same, *results))


# -- all the others ------------------------------------------------------------------------------------

TABLE = neuron.FewSpikeTable([0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125])


def flex_core(x, v):
    v = v * 0.5 + x
    s = surrogate.Sigmoid()(v - 0.5)
    return s, v * (1 - s)


MADE = {
    "GatedLIFNode": lambda: neuron.GatedLIFNode(T=4, inplane=3),
    "LIAFNode": lambda: neuron.LIAFNode(torch.tanh, True, step_mode="m"),
    "SimpleLIFNode": lambda: neuron.SimpleLIFNode(tau=2.0, decay_input=True, step_mode="m"),
    "ActivationAwareIFNode": lambda: neuron.ActivationAwareIFNode(torch.tensor([0.5, 1.0, 0.7]),
                                                                  channel_dim=1, step_mode="m"),
    "CUBALIFNode": lambda: functional.set_step_mode(node := neuron.CUBALIFNode(), "m") or node,
    "PSN": lambda: neuron.PSN(T=4),
    "MaskedPSN": lambda: neuron.MaskedPSN(k=2, T=4, lambda_init=1.0, step_mode="m"),
    "SlidingPSN": lambda: neuron.SlidingPSN(k=2, step_mode="m"),
    "DSRIFNode": lambda: neuron.DSRIFNode(T=4),
    "DSRLIFNode": lambda: neuron.DSRLIFNode(T=4),
    "FewSpikeNode": lambda: neuron.FewSpikeNode(TABLE, step_mode="s"),
    "OutlierAwareThresholdNode": lambda: neuron.OutlierAwareThresholdNode(TABLE, TABLE, 1.0),
    "HGNode": lambda: neuron.HGNode([TABLE, TABLE], [0.3]),
    "STBIFNode": lambda: neuron.STBIFNode(0.5, 4),
    "FlexSN": lambda: neuron.FlexSN(flex_core, num_states=1),
    "MPBNBaseNode": lambda: neuron.MPBNBaseNode(out_channels=3),
    "MPBNLIFNode": lambda: neuron.MPBNLIFNode(out_channels=3, step_mode="m"),
    "ILCBaseNode": lambda: neuron.ILCBaseNode(2, 3),
    "ILCIFNode": lambda: neuron.ILCIFNode(2, 3),
    "ILCLIFNode": lambda: neuron.ILCLIFNode(2, 3),
    "ILCCUBALIFNode": lambda: neuron.ILCCUBALIFNode(2, 3),
    "NoisyBaseNode": lambda: neuron.NoisyBaseNode(6),
    "NoisyCUBALIFNode": lambda: neuron.NoisyCUBALIFNode(6),
    "NoisyILCBaseNode": lambda: neuron.NoisyILCBaseNode(2, 3),
    "NoisyILCCUBALIFNode": lambda: neuron.NoisyILCCUBALIFNode(2, 3),
    "NoisyNonSpikingBaseNode": lambda: neuron.NoisyNonSpikingBaseNode(6),
    "NoisyNonSpikingIFNode": lambda: neuron.NoisyNonSpikingIFNode(6),
    "NonSpikingBaseNode": neuron.NonSpikingBaseNode,
    "NonSpikingIFNode": neuron.NonSpikingIFNode,
    "NonSpikingLIFNode": neuron.NonSpikingLIFNode,
    "OTTTLIFNode": neuron.OTTTLIFNode,
    "SLTTLIFNode": neuron.SLTTLIFNode,
}  # fmt: skip
ALL = sorted(
    {
        name
        for name in dir(neuron)
        if isinstance(getattr(neuron, name), type)
        and issubclass(getattr(neuron, name), nn.Module)
        and not name.startswith("Rev")
    }
)
STAYS_STOCK = {
    "DSRIFNode": "its own backward needs its input only",
    "DSRLIFNode": "its own backward needs its input only",
    "ILCBaseNode": "writes into its input",
    "ILCCUBALIFNode": "writes into its input",
    "ILCIFNode": "writes into its input",
    "ILCLIFNode": "writes into its input",
    "MPBNBaseNode": "batch-norm statistics",
    "MPBNLIFNode": "batch-norm statistics",
    "NoisyBaseNode": "sequence of noise",
    "NoisyCUBALIFNode": "sequence of noise",
    "NoisyILCBaseNode": "sequence of noise",
    "NoisyILCCUBALIFNode": "sequence of noise",
    "NoisyNonSpikingBaseNode": "sequence of noise",
    "NoisyNonSpikingIFNode": "sequence of noise",
    "NonSpikingBaseNode": "linear",
    "NonSpikingIFNode": "linear",
    "NonSpikingLIFNode": "linear",
    "STBIFNode": "inference",
}
ABSTRACT = {"BaseNode", "SimpleBaseNode", "AdaptBaseNode"}
ONE_MODE = {"GatedLIFNode": "m", "PSN": "m", "OTTTLIFNode": "s", "SLTTLIFNode": "s", "FewSpikeNode": None,
            "OutlierAwareThresholdNode": None, "HGNode": None}  # fmt: skip
# LIAF runs stock's plain LIF over sequences; the core of FlexSN here gives zeros and ones.
PACKED = {"ActivationAwareIFNode", "CUBALIFNode", "FlexSN", "LIAFNode", "OTTTLIFNode", "ComplementaryLIFNode", "EIFNode", "GatedLIFNode",
          "HalfThresholdIFNode", "IFNode", "IzhikevichNode", "KLIFNode", "LIFNode", "MaskedPSN", "PSN",
          "ParametricLIFNode", "QIFNode", "RAFNode", "SLTTLIFNode", "SimpleIFNode", "SimpleLIFNode",
          "SlidingPSN"}  # fmt: skip


def example(name):
    if name in MADE:
        return MADE[name]()
    return getattr(neuron, name)(step_mode="m")


def test_what_stays_stock():
    stays = {}
    for name in ALL:
        if name in ABSTRACT or not issubclass(getattr(neuron, name), nn.Module):
            continue
        node = example(name)
        try:
            assert reversible_type(node) is not None, name
        except StaysStock as reason:
            stays[name] = str(reason)
    assert stays.keys() == STAYS_STOCK.keys()
    for name, reason in stays.items():
        assert STAYS_STOCK[name] in reason


@pytest.mark.parametrize("name", [n for n in ALL if n not in STAYS_STOCK and n not in ABSTRACT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_other_neuron(name, dtype):
    torch.manual_seed(4)
    node = example(name).to(dtype)
    modes = "ms" if name not in ONE_MODE else ONE_MODE[name] or [getattr(node, "step_mode", None)]
    for mode, store in itertools.product(modes, [False, True]):
        if hasattr(node, "store_v_seq"):
            node.store_v_seq = store
        elif hasattr(node, "store_state_seqs"):
            node.store_state_seqs = store
        if mode is not None and name != "PSN":
            node.step_mode = mode
        x = current(4, 2, 3, 4, 4, dtype=dtype)
        psn = "PSN" in name
        rev = check(node, x, calls=1 if psn else 2, taped=(False, True))
        if isinstance(node, neuron.BaseNode):
            check(node, x, torch.rand(2, 3, 4, 4, dtype=dtype), taped=(False, True))
            v = torch.rand(2, 3, 4, 4, dtype=dtype, requires_grad=True)
            check(node, x, v, calls=2, taped=(False, True))
        check(node, channels_last(x), taped=(True,), loss=LOSSES["permuted"])
        if not psn:
            check(node.eval(), x)
            node.train()
        functional.reset_net(rev)
        with tape.recording():
            out = rev(x if mode == "m" else x[0])
            assert packs(out[0] if isinstance(out, list) else out) == (
                name in PACKED and (name, mode) != ("LIAFNode", "s")
            )
        functional.reset_net(rev)


def test_a_parameter_changed_in_between_is_refused():
    node = converted(neuron.KLIFNode(step_mode="m"))
    out = node(current(4, 2, 3))
    with torch.no_grad():
        node.k.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_a_forward_that_is_not_the_same_twice_is_found():
    class Growing(neuron.LIFNode):
        runs = itertools.count()

        def forward(self, x):
            out = super().forward(x)
            for _ in range(next(Growing.runs)):
                out = out.sin()
            return out

    node = converted(make(Growing))
    out = node(current(4, 2, 3))
    with pytest.raises(RuntimeError, match="not deterministic"):
        out.sum().backward()


def test_autocast_is_as_in_the_forward():
    class Mixed(neuron.LIFNode):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.mix = nn.Linear(3, 3)

        def forward(self, x):
            return super().forward(self.mix(x).sigmoid())

    torch.manual_seed(0)
    stock = make(Mixed)
    rev = converted(stock)
    results = []
    for node in (stock, rev):
        torch.manual_seed(1)
        x = current(4, 2, 3)
        with torch.autocast("cpu", torch.bfloat16):
            out = node(x)
        out.float().sum().backward()
        results.append([out, x.grad, node.mix.weight.grad])
    assert all(map(same, *results))


def test_swapped_classes_are_made_once():
    a, b = (converted(neuron.QIFNode()) for _ in range(2))
    assert type(a) is type(b)
    assert isinstance(a, SwappedClass)
