"""IFNode, LIFNode and ParametricLIFNode against stock: every output, state and gradient bit for bit."""

import itertools
import math

import pytest
import torch

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, neuron, surrogate

from snn_reversible_plugin import tape
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.spikingjelly import agreement
from snn_reversible_plugin.spikingjelly.copies import installed
from snn_reversible_plugin.spikingjelly.surrogates import proved
from spikingjelly_against_stock import (
    LOSSES,
    PRIMITIVES,
    REV,
    ZOO,
    Triangle,
    channels_last,
    check,
    converted,
    current,
    everything,
    make,
    packs,
    same,
    settings_of,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

RESETS = [0.0, None, -0.2]
CONFIGURATIONS = [
    pytest.param(
        cls, settings, reset, detach, id=f"{cls.__name__}-{settings.get('decay_input')}-{reset}-{detach}"
    )
    for cls in REV
    for settings in settings_of(cls)
    for reset, detach in itertools.product(RESETS, [True, False])
]


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("cls", "settings", "reset", "detach"), CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration(cls, settings, reset, detach, dtype, device):
    for mode, store in itertools.product("ms", [False, True]):
        node = make(cls, reset=reset, detach=detach, mode=mode, store=store, dtype=dtype, **settings)
        node.to(device)
        x = current(4, 3, 5, dtype=dtype, device=device)
        carried = (torch.randn(3, 5) * 0.5).to(device, dtype).requires_grad_()
        check(node, x[:1].detach().requires_grad_())
        check(node, x, taped=(True,))
        check(node, x, carried, calls=2)
        check(node, x, carried.detach(), spikes=False, taped=(True,))
        check(node, x, membrane=False)
        check(node, x.detach(), carried)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("cls", REV)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_surrogate(name, cls, dtype):
    x = current(3, 2, 7, dtype=dtype)
    v = torch.randn(2, 7).to(dtype).requires_grad_()
    for reset, detach, mode in itertools.product([0.0, None], [True, False], "ms"):
        node = make(cls, name, reset=reset, detach=detach, mode=mode, dtype=dtype)
        check(node, x, v, calls=2, taped=(True,))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", PRIMITIVES)
def test_surrogates_that_do_not_spike(name):
    x = current(3, 2, 7)
    for cls, reset, mode in itertools.product(REV, [0.0, None, 0.1], "ms"):
        node = make(cls, name, spiking=False, reset=reset, mode=mode)
        rev = check(node, x, calls=2, taped=(True,))
        with tape.recording():
            assert not packs(rev(x))


@pytest.mark.one_in(3)
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


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", REV)
def test_layouts(cls, layout):
    x = LAYOUTS[layout](current(3, 2, 4, 3, 5))
    others = [None, torch.rand(x.shape[1:], requires_grad=True)]
    others.append(torch.rand(x.shape[1:]).movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_())
    for loss, v, mode in itertools.product(LOSSES.values(), others, "ms"):
        node = make(cls, detach=False, mode=mode, **settings_of(cls)[0])
        check(node, x, v, loss=loss, taped=(True,))


@pytest.mark.parametrize("cls", REV)
@pytest.mark.one_in(3)
def test_chunks_of_neurons_give_the_same(cls, monkeypatch):
    monkeypatch.setattr("snn_reversible_plugin.ops.chunks.chunk_size", lambda device: 7)
    monkeypatch.setattr("snn_reversible_plugin.spikingjelly.analytic.chunk_size", lambda device: 7)
    for settings, reset, store, name in itertools.product(
        settings_of(cls), RESETS, [False, True], ["ATan", "Rect", "Triangle"]
    ):
        node = make(cls, name, reset=reset, store=store, **settings)
        v = torch.rand(3, 6, requires_grad=True)
        check(node, current(3, 3, 6), taped=(True,))
        check(node, current(3, 3, 6), v)
        check(node, current(3, 3, 6), v.detach(), taped=(True,))
        check(node, current(3, 3, 6).detach(), v)


@pytest.mark.one_in(3)
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


@pytest.mark.one_in(2)
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
        for a, b in zip(*(everything(node, x) for node in (stock, rev)), strict=True):
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
        with pytest.raises(Exception) as stock:
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
        assert known.spikes == bits
    if name == "PoissonPass":
        return
    for mode in "ms":
        node = converted(make(neuron.LIFNode, function, mode=mode))
        with tape.recording():
            assert packs(node(current(4, 2, 3))) == bits


def test_cut_sequences_of_functions_that_know_vector_registers():
    for neurons, name in [(100_003, "Sigmoid"), (300_032, "Sigmoid"), (300_032, "QPseudoSpike")]:
        check(make(neuron.LIFNode, name, tau=1.7), current(2, neurons))
    check(neuron.EIFNode(step_mode="m"), current(2, 300_032))


def held(node, x, steps=False):
    """Bytes that a forward leaves allocated beside its outputs and states."""
    functional.reset_net(node)
    with AllocationCounter() as counter:
        out = [node(step) for step in x] if steps else [node(x)]
    states = [m for m in node.memories() if isinstance(m, torch.Tensor)]
    return counter.live - sum(t.numel() * t.element_size() for t in (*out, *states))


def test_what_is_held():
    for cls, settings in [(c, s) for c in REV for s in settings_of(c)]:
        x = current(6, 32, 64)
        assert held(converted(make(cls, **settings)), x) <= 64
        node = converted(make(cls, mode="s", **settings))
        a_step = 4 * x[0].numel()
        # A parametric leak's gradient needs one more tensor; the last membrane is counted as a state.
        assert held(node, x, steps=True) <= (1 + (cls is neuron.ParametricLIFNode)) * 6 * a_step + 64 * 6
    for cls in (neuron.QIFNode, neuron.KLIFNode):
        assert held(converted(cls(step_mode="m")), current(6, 32, 64)) <= 128


def test_an_arithmetic_that_differs_from_the_installed_one_is_not_used(monkeypatch):
    agreement.agrees.cache_clear()
    monkeypatch.setattr(functional, "lif_multi_step", lambda x, *args: (x.relu(), x[-1].relu(), None))
    case = agreement.Case("LIF", True, True, True, "ATan")
    assert not agreement.agrees(installed(), case)
    agreement.agrees.cache_clear()
