"""arithmetic="fused" of SpikingJelly 0.0.0.0.12 and 0.0.0.0.14: their float32 code between two casts."""

import copy
import itertools

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from between_casts import KINDS, as_specified, settings
from old_spikingjelly import HOMES, make, release
from one_neuron import at_once, outcome
from snn_reversible_plugin.convert import differentiated
from snn_reversible_plugin.reports.memory_report import _about_neuron
from written_out import same

NAMES = ["Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf"]
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=HOMES)
def old(request):
    return release(request.param)


def taped(node, x):
    with srp.reversible(node):
        return node(x)


def assert_as_specified(node, *given, run=at_once, again=2, **how):
    """A fused neuron has the outcome of a stock one between two casts."""
    node.reset()
    fused = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="fused")
    for _ in range(again):  # TorchScript adds up in another order when it runs a function first
        expected = outcome(node, *given, run=as_specified, **how)
    found = outcome(fused, *given, run=run, **how)
    assert [*map(same, expected, found)] == [True] * len(expected)
    assert fused.arithmetic == "fused"
    return fused


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_their_float32_between_two_casts(old, kind):
    names = itertools.cycle(name for name in NAMES if hasattr(old.surrogate, name))
    for number, (given, dtype) in enumerate(zip(settings(kind), itertools.cycle(HALVES), strict=False)):
        if number % 3 == 2 and old.version == "0.0.0.0.14":
            given["store_v_seq"] = True
        node = make(old, kind, surrogate_function=getattr(old.surrogate, next(names))(), **given)
        x, v = (torch.randn(4, 3, 5) * 1.5 + 0.4).to(dtype), torch.randn(3, 5) * 0.5
        for run, one in ((at_once, (x,)), (taped, (x, v)), (at_once, (x[:1], v)), (taped, (x[:, :1, :1],))):
            assert assert_as_specified(node, *one, run=run).treatment == "analytic"


@pytest.mark.parametrize("kind", KINDS)
def test_all_dtypes_of_autocast_leave_float32_alone(old, kind):
    """TorchScript casts by rules of its own there, so that unfused half precision is replayed."""
    for dtype, reset in zip(HALVES, (None, -0.2), strict=True):
        x = (torch.randn(4, 3, 5) * 1.5 + 0.4).to(dtype)
        with torch.autocast("cpu", dtype=dtype):
            node = assert_as_specified(make(old, kind, v_reset=reset), x, run=taped)
        assert node.treatment == "analytic" and node.v.dtype is torch.float32


def channels_last(x):
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)


LAYOUTS = {
    "channels-last": channels_last,
    "batch first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one step for all": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(old, layout):
    x = (torch.randn(3, 2, 4, 3, 3) * 1.5 + 0.4).bfloat16()
    for kind in KINDS:
        assert assert_as_specified(make(old, kind), LAYOUTS[layout](x)).treatment == "analytic"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_membrane_of_another_dtype_is_promoted_as_theirs_is(old, dtype):
    x, v = torch.randn(3, 2, 5).mul(2).half(), torch.randn(2, 5).to(dtype)
    for kind, decay in itertools.product(("IFNode", "LIFNode"), (True, False)):
        node = make(old, kind, **({} if kind == "IFNode" else {"decay_input": decay}))
        assert_as_specified(node, x, v, again=4)
        fused = assert_as_specified(node, x, v, calls=1)
        assert fused.treatment == "generic replay" and "torch.float32" in fused.treatment_reason


def test_a_membrane_of_another_shape_is_what_theirs_is(old):
    node = make(old, "LIFNode")
    assert_as_specified(node, torch.randn(3, 2, 5).mul(2).half(), torch.randn(5), again=4)
    fused = srp.convert_to_reversible(make(old, "LIFNode"), arithmetic="fused")
    for one, run in ((node, as_specified), (fused, at_once)):
        one.reset()
        one.v = torch.zeros(7)
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(one, torch.zeros(3, 2, 5, dtype=torch.float16, requires_grad=True))


def test_a_leak_in_half_precision_is_theirs(old):
    x = torch.randn(3, 2, 5).mul(2).half()
    fused = assert_as_specified(make(old, "ParametricLIFNode", dtype=torch.float16), x, again=4)
    assert "its w is torch.float16" in fused.treatment_reason


def test_set_to_cupy_they_compute_as_torch(old, monkeypatch):
    for module in (old.base, old.neuron):
        monkeypatch.setattr(module, "cupy", object(), raising=False)
    node = make(old, "LIFNode")
    in_cupy = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="fused")
    in_cupy.backend = "cupy"
    x = torch.randn(3, 2, 5).mul(2).half()
    for _ in range(2):
        expected = outcome(node, x, run=as_specified)
    assert all(map(same, expected, outcome(in_cupy, x, run=at_once)))
    with differentiated(in_cupy):
        for _ in range(2):
            found = outcome(in_cupy, x, run=at_once)
    assert all(map(same, expected, found)) and in_cupy.backend == "cupy"


def test_a_method_of_its_own_runs_between_the_casts(old):
    node = make(old, "LIFNode")
    fired = []
    node.neuronal_fire = lambda: fired.append(node.v.dtype) or node.surrogate_function(node.v - 1.0)
    fused = srp.convert_to_reversible(node, arithmetic="fused")
    with srp.reversible(fused):
        fused(torch.randn(3, 2, 5, dtype=torch.float16, requires_grad=True)).sum().backward()
    assert set(fired) == {torch.float32} and "neuronal_fire" in fused.treatment_reason


def test_evaluation_is_theirs_between_the_casts(old):
    x = torch.randn(3, 2, 5).mul(2).bfloat16()
    for kind, grad in itertools.product(KINDS, (True, False)):
        node = make(old, kind).eval()
        fused = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="fused")
        with torch.set_grad_enabled(grad):
            found = []
            for one, run in ((node, as_specified), (node, as_specified), (fused, at_once)):
                one.reset()
                found.append((run(one, x.clone().requires_grad_()), one.v))
        assert all(map(same, found[1], found[2]))
        assert fused.v.dtype is torch.float32 and fused.arithmetic == "fused"


class Net(nn.Module):
    def __init__(self, old, dtype=torch.bfloat16):
        super().__init__()
        layers = []
        for width, kind in zip((6, 9, 9), KINDS, strict=True):
            linear = nn.Linear(width, 9)
            nn.init.uniform_(linear.weight, -0.4, 0.7)  # so that all layers fire
            linear = old.layer.SeqToANNContainer(linear) if old.version == "0.0.0.0.12" else linear
            layers += [linear, make(old, kind, v_threshold=0.2, v_reset=-0.2)]
        self.body, self.dtype, self.reset = nn.Sequential(*layers), dtype, old.functional.reset_net

    def forward(self, x_seq):
        self.reset(self.body)
        with torch.autocast(x_seq.device.type, dtype=self.dtype):
            return self.body(x_seq)


@pytest.mark.parametrize("mode", ["memory", "speed", "minimal"])
def test_networks_train_as_their_specification(old, mode):
    x, found = torch.rand(4, 6, 6) * 2, []
    net = srp.convert_to_reversible(Net(old), mode=mode, arithmetic="fused")
    for specified in (True, True, False, False):
        net.zero_grad()
        if specified:
            with differentiated(net):
                out = net(x)
                out.float().square().sum().backward()
        else:
            out = net(x)
            out.float().square().sum().backward()
        v = [one.v for one in net.body[1::2]]
        found.append([out, *v, *(one.grad.clone() for one in net.parameters())])
        assert {one.dtype for one in v} == {torch.float32}
    assert 0 < found[0][0].float().mean() < 1 and all(one.any() for one in found[0])
    exact = len(found[0]) if mode != "minimal" else 4
    for step in found[2:]:
        assert all(map(same, found[1][:exact], step[:exact]))
        for a, b in zip(found[1], step, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert {one.arithmetic for one in net.body[1::2]} == {"fused"}


def test_verify_holds_them_to_it(old):
    net = srp.convert_to_reversible(Net(old), arithmetic="fused")
    found = srp.verify(net, torch.rand(6, 20, 6) * 2, repeats=1)
    assert found.ok and found.as_autograd and not found.gradients_equal
    assert set(found.guarantees.values()) == {"fused"}


def test_what_is_not_fused_says_why(old):
    node = make(old, "LIFNode", surrogate_function=old.surrogate.S2NN())
    net = srp.convert_to_reversible(nn.Sequential(node, make(old, "IFNode")), arithmetic="fused")
    net(torch.randn(3, 2, 5, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert [one.arithmetic for one in net] == ["stock", "fused"]
    about = _about_neuron("0", node, srp.convert.settings_of(net))
    assert about.endswith("not fused: its surrogate S2NN, as it is set, has no known formula")


def test_steps_of_a_type_that_has_no_sequences_are_refused():
    old = release("0.0.0.0.12")
    net = nn.Sequential(nn.Linear(3, 3), make(old, "LIFNode", multi=False))
    with pytest.raises(ValueError, match="MultiStepIFNode"):
        srp.convert_to_reversible(net, arithmetic="fused")
    assert type(net[1]) is old.neuron.LIFNode


def test_what_is_not_in_half_precision_is_stocks(old):
    node = make(old, "LIFNode")
    fused = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="fused")
    x = torch.randn(3, 2, 5) * 2
    found = [outcome(one, x, run=at_once) for one in (node, node, fused)]
    assert all(map(same, found[1], found[2])) and fused.arithmetic == "stock"
