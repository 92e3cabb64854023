"""Neurons whose step looks like a known one's and is another: each trains as stock does."""

import copy

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from one_neuron import outcome
from snn_reversible_plugin.spikingjelly import written_out as written_out_there
from written_out import V, X, assert_like_stock, made, modules, same


@pytest.fixture(autouse=True)
def _no_sample(monkeypatch):
    """The recordings alone have to tell: a run on a sample is a second check."""
    monkeypatch.setattr(written_out_there, "_agrees", lambda *_: True)


def simple(sj):
    """What an IF neuron with a charge of its own derives from."""
    return sj.neuron.SimpleIFNode if sj.version == "2.0" else sj.neuron.IFNode


def sequences(sj):
    """The same for sequences, where they are a type of their own."""
    return sj.neuron.MultiStepIFNode if sj.version == "0.0.0.0.12" else simple(sj)


def assert_both_like_stock(node, x, multi=False):
    """Before and after what is done between the two calls of this, to both."""
    rev = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    yield rev
    for one in (node, rev):
        outcome(one, x, multi=multi)  # TorchScript runs a function as it is written once
    expected, found = outcome(node, x, multi=multi), outcome(rev, x, multi=multi)
    assert [*map(same, expected, found)] == [True] * len(expected)


class Part(nn.Module):
    """A part of a neuron with names that a neuron has."""

    def __init__(self):
        super().__init__()
        self.v = 1.0
        self.surrogate_function = nn.Identity()

    def forward(self, x):
        return self.surrogate_function(x) * self.v


class Keeps(Part):
    def forward(self, x):
        self.v = x
        return x


def with_part(sj, part):
    class Mine(simple(sj)):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.part = part()

        def neuronal_charge(self, x):
            self.v = self.v + self.part(x)

    return made(Mine, sj)


@pytest.mark.one_in(2)
def test_a_part_is_looked_at_too(sj):
    node = with_part(sj, Part)
    assert assert_like_stock(node, X).treatment == "analytic"

    def change(one):
        one.part.v = 2.0

    assert assert_like_stock(node, X, change=change).treatment == "generic replay"


def test_a_part_that_has_another_function(sj):
    node = with_part(sj, Part)

    def change(one):
        one.part.surrogate_function = nn.Tanh()

    assert assert_like_stock(node, X, change=change).treatment == "generic replay"


def test_what_a_part_keeps_is_kept(sj):
    node = with_part(sj, Keeps)
    rev = assert_like_stock(node, X)
    assert rev.treatment == "generic replay"
    assert "sets an attribute, v" in rev.treatment_reason


def twice_the_membrane(sj):
    """``v`` is a property: what is stored is half of what is read."""

    class Mine(simple(sj)):
        @property
        def v(self):
            if "v" not in self._memories:
                raise AttributeError("v")
            return self._memories["v"] * 2

        def neuronal_charge(self, x):
            self.v = self.v + x

    return Mine


def another_surrogate(sj):
    """The class has a method where the instance has a surrogate."""

    class Mine(simple(sj)):
        def surrogate_function(self, u):
            return (u >= 0).to(u) + 0.3 * u - 0.3 * u.detach()

        def neuronal_charge(self, x):
            self.v = self.v + x

    return Mine


def a_moving_threshold(sj):
    class Mine(simple(sj)):
        @property
        def v_threshold(self):
            v = self._memories["v"]
            return 0.5 + (0.25 if isinstance(v, float) else float(v.detach().mean()) / 8)

        @v_threshold.setter
        def v_threshold(self, value):
            pass

        def neuronal_charge(self, x):
            self.v = self.v + x

    return Mine


def only_a_moving_threshold(sj):
    mine = a_moving_threshold(sj)
    base = sj.neuron.IFNode if sj.version == "2.0" else simple(sj)
    return type("Mine", (base,), {"v_threshold": vars(mine)["v_threshold"]})


@pytest.mark.parametrize(
    "cls", [twice_the_membrane, another_surrogate, a_moving_threshold, only_a_moving_threshold]
)
def test_properties_and_methods_with_the_names_of_settings(sj, cls):
    if sj.version == "0.0.0.0.12" and "threshold" in cls.__name__:
        pytest.skip("a threshold is a memory there, which no property may be")
    rev = assert_like_stock(made(cls(sj), sj), X)
    assert rev.treatment != "analytic"


def test_the_first_step_is_another():
    """Where the membrane starts as a number: the first step says nothing of the others."""
    for version, base in [("0.0.0.0.12", "MultiStepIFNode"), ("2.0", "SimpleIFNode")]:
        sj = modules(version)

        class Mine(getattr(sj.neuron, base)):
            def neuronal_charge(self, x):
                self.v = self.v + (x if isinstance(self.v, float) else 2 * x)

        rev = assert_like_stock(made(Mine, sj, multi=True), X, multi=True)
        assert rev.treatment == "generic replay"
        assert "operation by operation" in rev.treatment_reason


class Plain:
    def neuronal_charge(self, x):
        self.v = self.v + x


@pytest.mark.one_in(2)
@pytest.mark.parametrize("own", [True, False], ids=["written", "inherited"])
@pytest.mark.parametrize("multi", [False, True], ids=["steps", "sequences"])
def test_a_method_set_on_the_instance(sj, own, multi):
    if own:
        cls = type("Mine", (Plain, sequences(sj) if multi else simple(sj)), {})
    else:
        cls = getattr(sj.neuron, "MultiStepIFNode" if multi and sj.version == "0.0.0.0.12" else "IFNode")
    node = made(cls, sj, multi=multi)
    both = assert_both_like_stock(node, X, multi)
    rev = next(both)
    outcome(rev, X, multi=multi)
    assert rev.treatment == "analytic"
    for one in (node, rev):
        if hasattr(one, "neuronal_reset"):
            one.neuronal_reset = lambda spike, one=one: setattr(one, "v", one.v * (1.0 - spike) * 0.5)
        else:
            one.single_step_functional_forward = lambda inputs, states, **_: ((inputs[0] * 1.0,), states)
    assert next(both, None) is None
    assert rev.treatment == "the tape"


def test_a_class_that_gets_a_reset_later(sj):
    cls = type("Mine", (Plain, simple(sj)), {})
    node = made(cls, sj)
    both = assert_both_like_stock(node, X)
    rev = next(both)
    outcome(rev, X)
    assert rev.treatment == "analytic"
    cls.neuronal_reset = lambda self, spike: setattr(self, "v", self.v * 0.5)
    assert next(both, None) is None
    assert rev.treatment == "generic replay"


def test_a_class_that_gets_a_property_later(sj):
    class Mine(simple(sj)):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.factor = 1.0

        def neuronal_charge(self, x):
            self.v = self.v + x * self.factor

    node = made(Mine, sj)
    both = assert_both_like_stock(node, X)
    rev = next(both)
    outcome(rev, X)
    assert rev.treatment == "analytic"
    Mine.factor = property(lambda self: 2.0)
    assert next(both, None) is None
    assert rev.treatment == "generic replay"


def test_a_subclass_of_a_subclass(sj):
    mine = type("Mine", (Plain, simple(sj)), {})
    heir = type("Heir", (mine,), {"__init__": lambda self, **settings: mine.__init__(self, **settings)})
    other = type(
        "Other", (heir,), {"neuronal_reset": lambda self, spike: setattr(self, "v", self.v - spike)}
    )
    assert assert_like_stock(made(heir, sj), X).treatment == "analytic"
    assert assert_like_stock(made(other, sj), X).treatment == "generic replay"  # sets by a function
    assert assert_like_stock(made(other, sj, v_reset=None), X).treatment == "generic replay"


@pytest.mark.one_in(2)
def test_a_surrogate_that_is_exchanged(sj):
    node = made(type("Mine", (Plain, simple(sj)), {}), sj)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return (u >= 0).to(u)

        @staticmethod
        def backward(ctx, grad):
            return grad * (ctx.saved_tensors[0].abs() < 0.5).to(grad) * 2.0

    class Module(nn.Module):
        def forward(self, u):
            return Steep.apply(u)

    def to_another(one):
        one.surrogate_function = sj.surrogate.Sigmoid(alpha=2.0)

    def to_a_users(one):
        one.surrogate_function = Module()

    def to_a_function(one):
        del one.surrogate_function
        one.surrogate_function = Steep.apply

    for change in (to_another, to_a_users):
        assert assert_like_stock(node, X, change=change).treatment == "analytic"
    node = made(type("Mine", (Plain, simple(sj)), {}), sj)
    assert assert_like_stock(node, X, change=to_a_function).treatment == "generic replay"


def test_a_surrogate_of_a_users_is_a_part_of_its_neuron(sj):
    """And no neuron of one's own that happens to stand in another."""

    class Steps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u):
            ctx.save_for_backward(u)
            return (u >= 0).to(u)

        @staticmethod
        def backward(ctx, grad):
            return grad * (ctx.saved_tensors[0].abs() < 0.5).to(grad)

    class Mine(nn.Module):
        def forward(self, u):
            return Steps.apply(u)

    rev = assert_like_stock(made(sj.neuron.IFNode, sj, surrogate_function=Mine()), X)
    assert type(rev.surrogate_function) is Mine
    assert rev.treatment == "analytic"


@pytest.mark.one_in(2)
def test_empty_batches_and_single_steps(sj):
    multi = True
    node = made(type("Mine", (Plain, sequences(sj)), {}), sj, multi=multi)
    rev = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    for x in (X[:, :0], X[:1], X[:0] if sj.version == "0.0.0.0.14" else X[:1, :1]):
        if not x.shape[0]:
            for one in (node, rev):
                one.reset()
                with pytest.raises(RuntimeError):
                    one(x)
            continue
        for _ in range(2):
            expected, found = outcome(node, x, multi=multi), outcome(rev, x, multi=multi)
        assert [*map(same, expected, found)] == [True] * len(expected)
        assert rev.treatment == "analytic"


def test_a_factor_that_a_tensor_holds(sj):
    class Mine(simple(sj)):
        def neuronal_charge(self, x):
            self.v = self.v + x * torch.tensor(1.0)

    assert assert_like_stock(made(Mine, sj), X).treatment == "generic replay"


@pytest.mark.one_in(2)
def test_terms_in_another_order_where_they_lie_otherwise(sj):
    """``x + v`` has the values of ``v + x``, and is laid out as x is."""

    class Mine(simple(sj)):
        def neuronal_charge(self, x):
            self.v = x + self.v

    node = made(Mine, sj)
    assert assert_like_stock(node, X, V).treatment == "analytic"
    x = X.transpose(1, 3)
    assert_like_stock(node, x, x[0].contiguous() / 4)


def test_sequences_alone_are_no_claim():
    sj = modules("2.0")

    class Mine(sj.neuron.LIFNode):
        multi_step_functional_forward = sj.base.MemoryModule.multi_step_functional_forward

    for multi in (False, True):
        assert assert_like_stock(made(Mine, sj, multi=multi), X, multi=multi).treatment == "generic replay"


@pytest.mark.one_in(2)
def test_on_the_grid_other_equations_for_another_shape(sj):
    class Mine(sj.neuron.SimpleBaseNode if sj.version == "2.0" else sj.neuron.BaseNode):
        tau = 2.0

        def neuronal_charge(self, x):
            if x.shape[-1] != 7:
                self.v = self.v + x
            else:
                self.v = self.v + (x - self.v) / self.tau

    found = []
    for convert in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), made(Mine, sj))
        if convert:
            srp.convert_to_reversible(net)
            assert net[1].arithmetic == "grid"
            with pytest.warns(UserWarning, match="another step than of a small input"):
                net(torch.ones(3, 5))
            assert net[1].arithmetic == "stock"
            net[1].reset()
        net(torch.ones(3, 5) * 3).mul(torch.arange(7.0)).sum().backward()
        found.append(net[0].weight.grad)
    assert torch.equal(*found)
