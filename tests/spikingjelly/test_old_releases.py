"""SpikingJelly 0.0.0.0.12 and 0.0.0.0.14 themselves, inside other packages: bit for bit, sign for sign."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

import fresh
import one_neuron
import snn_reversible_plugin as srp
from old_spikingjelly import HOMES, folder, make, release
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.modules.kinds import FRAMEWORKS, framework_of, is_multi_step, is_spiking
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.reports.memory_report import _about_neuron
from snn_reversible_plugin.spikingjelly.copies import InTorch

THREE = {"IFNode": {}, "LIFNode": {"tau": 1.7}, "ParametricLIFNode": {"init_tau": 1.7}}
RESETS = (0.0, None, -0.2)
outcome = functools.partial(one_neuron.outcome, calls=1, multi=True)


@pytest.fixture(params=HOMES)
def old(request):
    return release(request.param)


def same(a, b):
    if a is None or b is None:
        return a is b
    values = torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    return values and (a.dtype, a.stride()) == (b.dtype, b.stride())


def assert_same(node, *given, **how):
    """A stock neuron and its converted copy have the same outcome."""
    node.reset()
    rev = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    outcome(node, *given, **how)  # TorchScript adds up in another order when it runs a function first
    expected, found = outcome(node, *given, **how), outcome(rev, *given, **how)
    assert [*map(same, expected, found)] == [True] * len(expected)
    return rev


def channels_last(x):
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", THREE)
@pytest.mark.parametrize("multi", [True, False], ids=["sequences", "steps"])
def test_the_three_are_analytic(old, kind, multi):
    decays = [{}] if kind == "IFNode" else [{"decay_input": yes} for yes in (True, False)]
    stores = [{"store_v_seq": yes} for yes in (False, True)] if "14" in old.version and multi else [{}]
    for reset, detach, decay, store in itertools.product(RESETS, (True, False), decays, stores):
        settings = {"v_threshold": 0.7, "v_reset": reset, "detach_reset": detach}
        node = make(old, kind, multi=multi, **settings, **THREE[kind], **decay, **store)
        x, v = torch.randn(4, 3, 2, 2, 2) * 1.5 + 0.4, torch.randn(3, 2, 2, 2) * 0.5
        for given, calls in [((x,), 1), ((x, v), 2), ((x[:1],), 2), ((channels_last(x),), 1)]:
            rev = assert_same(node, *given, multi=multi, calls=calls)
            assert rev.treatment == "analytic"


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("surrogate", ["Sigmoid", "PiecewiseQuadratic", "PiecewiseLeakyReLU", "S2NN"])
def test_surrogates_and_dtypes(old, dtype, surrogate):
    for kind, reset, multi in itertools.product(THREE, RESETS, (True, False)):
        function = getattr(old.surrogate, surrogate)()
        node = make(old, kind, multi=multi, dtype=dtype, v_reset=reset, surrogate_function=function)
        x = (torch.randn(3, 40) * 1.5 + 0.4).to(dtype)
        assert assert_same(node, x, multi=multi).treatment == "analytic"


OTHERS = ["QIFNode", "EIFNode", "KLIFNode", "IzhikevichNode"]


@pytest.mark.parametrize("kind", OTHERS)
def test_others_are_replayed(old, kind):
    has_sequences = hasattr(old.neuron.BaseNode, "step_mode") or hasattr(old.neuron, f"MultiStep{kind}")
    for multi in (True, False)[not has_sequences :]:
        if not hasattr(old.neuron, kind):
            continue
        for calls in (1, 2):
            rev = assert_same(make(old, kind, multi=multi), torch.rand(4, 30), multi=multi, calls=calls)
            assert rev.treatment == "generic replay"


@pytest.mark.parametrize("kind", ["KLIFNode", "IzhikevichNode", "a subclass"])
def test_scripts_that_have_never_run(kind):
    """TorchScript's first run of a function has another graph than the later ones."""
    cold = release("0.0.0.0.14", f"cold_{kind.replace(' ', '_')}")
    if kind == "a subclass":

        class Squared(cold.neuron.BaseNode):
            def neuronal_charge(self, x):
                self.v = 0.5 * self.v + x * x

        cold.neuron.Squared, kind = Squared, "Squared"
    found = []
    for convert in (True, True, False, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), make(cold, kind, v_reset=0.0))
        if convert:
            srp.convert_to_reversible(net)
        x = torch.rand(6, 3, 5) * 2
        net(x).mul(x).sum().backward()
        found.append(net[0].weight.grad)
    assert all(torch.equal(one, found[-1]) for one in found)


@pytest.mark.parametrize("kind", ["LIFNode", "EIFNode"])
def test_what_is_set_to_cupy_computes_as_torch(old, kind, monkeypatch):
    """cupy itself is not there: its kernels would have to run, or fail to."""
    for module in (old.base, old.neuron):
        monkeypatch.setattr(module, "cupy", object(), raising=False)
    node = make(old, kind)
    in_cupy = copy.deepcopy(node)
    in_cupy.backend = "cupy"
    srp.convert_to_reversible(in_cupy, arithmetic="stock")
    x = torch.rand(4, 3, 5) * 2
    outcome(node, x)
    assert all(map(same, outcome(node, x, calls=2), outcome(in_cupy, x, calls=2)))
    assert in_cupy.backend == "cupy"
    assert (in_cupy.treatment == "analytic") == (kind == "LIFNode")
    assert _about_neuron("", in_cupy, settings_of(in_cupy)).endswith(
        '"cupy" is served by the equations of "torch"'
    )
    with torch.no_grad():
        node.reset(), in_cupy.reset()
        assert torch.equal(node(x), in_cupy(x))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("own", [False, True], ids=["the release's", "with a method of its own"])
def test_what_is_set_to_cupy_is_verified_against_torch(old, own, monkeypatch):
    """cupy's kernels are stood in for by something that differs, and by a count of how often they ran."""
    cls = old.neuron.MultiStepLIFNode if old.version == "0.0.0.0.12" else old.neuron.LIFNode
    name = "forward" if old.version == "0.0.0.0.12" else "multi_step_forward"
    in_torch, ran = getattr(cls, name), []

    def as_set(self, x_seq):
        if self.backend == "torch":
            return in_torch(self, x_seq)
        ran.append(self)
        with InTorch(self):
            return in_torch(self, x_seq * 1.25)

    for module in (old.base, old.neuron):
        monkeypatch.setattr(module, "cupy", object(), raising=False)
    monkeypatch.setattr(cls, name, as_set)
    node = make(old, "LIFNode")
    if own:
        node.neuronal_fire = functools.partial(cls.neuronal_fire, node)
    node.backend = "cupy"
    net = srp.convert_to_reversible(nn.Sequential(nn.Flatten(2), node))
    x = (torch.rand(4, 3, 5) * 2).requires_grad_()
    net(x).sum().backward()
    assert not ran
    found = srp.verify(net, x, repeats=1)
    assert found.ok
    assert ran  # for what stock costs
    assert found.served == {"1": 'its backend "cupy" is served by the equations of "torch"'}
    assert node.backend == "cupy"
    (reason,) = (row.neuron for row in srp.memory_report(net, x).modules if row.name == "1")
    assert '"cupy" is served by the equations of "torch"' in reason
    assert ("neuronal_fire of its own" in reason) == own


def network(old, multi=True):
    layers = []
    for width in (40, 64, 64):
        linear = nn.Linear(width, 64)
        if multi and old.version == "0.0.0.0.12":
            linear = old.layer.SeqToANNContainer(linear)
        layers += [linear, make(old, "LIFNode", multi=multi, detach_reset=True)]
    return nn.Sequential(*layers)


def test_a_network_holds_bits(old):
    net = network(old)
    x = (torch.rand(16, 8, 40) > 0.5).float()

    def loss():
        old.functional.reset_net(net)
        return net(x).mean()

    stock, _ = count_step(loss)
    srp.convert_to_reversible(net)
    ours, _ = count_step(loss)
    assert ours < stock / 40


def test_steps_run_on_the_grid(old):
    net = network(old, multi=False)
    srp.convert_to_reversible(net)
    assert [net[1].arithmetic, net[3].arithmetic] == ["grid", "grid"]
    x_seq = (torch.rand(5, 8, 40) > 0.5).float()
    sum(net(x) for x in x_seq).sum().backward()
    assert net[0].weight.grad.abs().sum() > 0
    old.functional.reset_net(net)


def test_a_copy_is_told_by_its_classes_and_not_by_its_name(old):
    node = make(old, "LIFNode")
    assert framework_of(node).name == "spikingjelly"
    assert (is_spiking(node), is_multi_step(node)) == (True, True)
    assert not is_multi_step(make(old, "LIFNode", multi=False))
    assert old.root in FRAMEWORKS[0].copies()
    assert framework_of(type("Mine", (nn.Module,), {"__module__": "mine.activation_based.net"})()) is None


def test_copies_side_by_side():
    from spikingjelly.activation_based import neuron

    net = nn.Sequential(
        *(make(release(version), "LIFNode", multi=False) for version in HOMES), neuron.LIFNode()
    )
    srp.convert_to_reversible(net, arithmetic="stock")
    assert [type(one).__name__ for one in net] == ["ReversibleLIFNode", "ReversibleLIFNode", "RevLIFNode"]
    net(torch.rand(3, requires_grad=True)).sum().backward()
    assert {type(one).__module__.partition(".")[0] for one in srp.restore(net)} == {
        "bundled_0_0_0_0_12", "bundled_0_0_0_0_14", "spikingjelly",
    }  # fmt: skip


def test_evaluation_with_a_gradient_is_stocks(old):
    node = make(old, "LIFNode").eval()
    rev = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    found = []
    for one in (node, rev, node, rev):
        one.reset()
        x = torch.linspace(0, 2, 40).view(4, 10).requires_grad_()
        out = one(x * 1.0)
        (out.sum() + one.v.square().sum()).backward()
        found.append((out, one.v, x.grad))
    assert all(map(same, found[2], found[3]))


AS_INSTALLED = """
import sys; sys.path.insert(0, {folder!r})
import torch, snn_reversible_plugin as srp
from spikingjelly.{home} import neuron, functional
from snn_reversible_plugin.spikingjelly import RevLIFNode
srp.register()
node = srp.convert_to_reversible(torch.nn.Sequential(torch.nn.Linear(3, 3), neuron.LIFNode()))
assert isinstance(node[1], RevLIFNode) and node[1].arithmetic == "grid"
node(torch.rand(2, 3)).sum().backward()
functional.reset_net(node)
assert neuron.RevLIFNode is RevLIFNode and isinstance(RevLIFNode(tau=3.0), neuron.LIFNode)
assert type(srp.restore(node)[1]) is neuron.LIFNode
"""


@pytest.mark.parametrize("version", HOMES)
@pytest.mark.one_in(2)
def test_as_the_installed_one(version, tmp_path):
    code = AS_INSTALLED.format(folder=str(folder(version)), home=HOMES[version])
    done = fresh.python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_older_is_named_in_one_sentence(monkeypatch):
    old = release("0.0.0.0.12")
    from snn_reversible_plugin.modules import kinds
    from snn_reversible_plugin.spikingjelly import adapter, copies

    monkeypatch.delattr(old.neuron, "check_backend")
    monkeypatch.setattr(copies, "copy_at", copies.Copy)
    monkeypatch.setattr(adapter, "copy_at", copies.Copy)
    monkeypatch.setattr(kinds, "_unusable", set())
    adapter.load.cache_clear()
    with pytest.warns(UserWarning, match=r"below 0\.0\.0\.0\.12; .* become reversible"):
        net = srp.convert_to_reversible(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    adapter.load.cache_clear()
    assert net(torch.rand(2, 3)).shape == (2, 3)


def test_settings_are_changed_by_the_releases_own_functions():
    old = release("0.0.0.0.14")
    net = nn.Sequential(
        nn.Linear(3, 3), make(old, "LIFNode", multi=False), make(old, "KLIFNode", multi=False)
    )
    twin = srp.convert_to_reversible(copy.deepcopy(net), arithmetic="stock")
    x = torch.rand(4, 2, 3)
    for one in (net, twin):
        old.functional.set_step_mode(one, "m")
        old.functional.set_backend(one, "torch")
    for _ in range(2):
        found = []
        for one in (net, twin):
            old.functional.reset_net(one)
            one.zero_grad()
            out = one(x)
            out.sum().backward()
            found.append([out, one[1].v, one[2].v, one[0].weight.grad])
    assert all(map(same, *found))
    assert [one.step_mode for one in twin[1:]] == ["m", "m"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", THREE)
def test_half_precision_currents_under_autocast(old, kind):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for reset, detach, multi in itertools.product(RESETS, (True, False), (True, False)):
            node = make(old, kind, multi=multi, v_reset=reset, detach_reset=detach)
            assert_same(node, (torch.randn(4, 40) * 1.5 + 0.4).bfloat16(), multi=multi, calls=2)
