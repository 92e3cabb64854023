"""Subclasses that write out what a neuron does: the fast path where that is proved, and only there."""

import copy
import gc
import weakref

import pytest
import torch
from spikingjelly.activation_based import base
from torch import nn

import snn_reversible_plugin as srp
from old_spikingjelly import release
from one_neuron import outcome
from snn_reversible_plugin.reports.measure import count_step
from written_out import V, X, assert_like_stock, made, modules, same

OTHER = "its step is none of IFNode's, LIFNode's or ParametricLIFNode's, operation by operation"


# -- classes as users write them -----------------------------------------------------------------------


def charges(sj):
    """The charge, as in 0.0.0.0.14's LIFNode; where 2.0 has charges, in a simple node."""
    simple = sj.version == "2.0"

    class MyLIF(sj.neuron.SimpleBaseNode if simple else sj.neuron.LIFNode):
        def __init__(self, tau=2.0, **settings):
            super().__init__(**settings)
            self.tau = tau

        def neuronal_charge(self, x):
            if self.v_reset is None or self.v_reset == 0.0:
                self.v = self.v + (x - self.v) / self.tau
            else:
                self.v = self.v + (x - (self.v - self.v_reset)) / self.tau

    return MyLIF


def undecayed(sj):
    """The charge of ``decay_input=False``, the leak a product."""

    class MyLIF(sj.neuron.SimpleBaseNode if sj.version == "2.0" else sj.neuron.BaseNode):
        tau = 1.7

        def neuronal_charge(self, x):
            self.v = self.v * (1.0 - 1.0 / self.tau) + x

    return MyLIF


def resets(sj):
    class MyIF(sj.neuron.SimpleIFNode if sj.version == "2.0" else sj.neuron.IFNode):
        def neuronal_reset(self, spike):
            s = spike.detach() if self.detach_reset else spike
            if self.v_reset is None:
                self.v = self.v - s * self.v_threshold
            else:
                self.v = s * self.v_reset + (1.0 - s) * self.v

    return MyIF


def fires(sj):
    class MyIF(sj.neuron.SimpleIFNode if sj.version == "2.0" else sj.neuron.IFNode):
        def neuronal_fire(self):
            return self.surrogate_function(self.v - self.v_threshold)

    return MyIF


def steps(sj):
    """The whole step, by what each release calls it."""

    class MyLIF(sj.neuron.BaseNode):
        def __init__(self, tau=2.0, **settings):
            super().__init__(**settings)
            self.tau = tau

        def once(self, x, v):
            v = v + (x - v) / self.tau
            s = self.surrogate_function(v - self.v_threshold)
            r = s.detach() if self.detach_reset else s
            if self.v_reset is None:
                return s, v - self.v_threshold * r
            return s, (1.0 - r) * v + r * self.v_reset

    if sj.version == "2.0":

        class Functional(MyLIF):
            def single_step_functional_forward(self, inputs, states, **kwargs):
                s, v = self.once(inputs[0], states[0])
                return (s,), (v,)

        return Functional

    class Stepped(MyLIF):
        def forward(self, x):
            s, self.v = self.once(x, self.v)
            return s

        single_step_forward = forward

    if sj.version == "0.0.0.0.14":
        del Stepped.forward
    else:
        del Stepped.single_step_forward
    return Stepped


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    ("v_reset", "detach_reset"), [(0.0, False), (0.0, True), (None, True), (-0.2, False)]
)
@pytest.mark.parametrize("written", [charges, undecayed, resets, fires, steps])
@pytest.mark.parametrize("multi", [False, True], ids=["steps", "sequences"])
def test_what_is_the_same_is_proved(sj, written, multi, v_reset, detach_reset):
    if multi and sj.version == "0.0.0.0.12":
        pytest.skip("it is a type there, which has no step of its own")
    node = made(written(sj), sj, multi=multi, v_reset=v_reset, detach_reset=detach_reset, v_threshold=0.7)
    # A charge that pulls to zero is another where the membrane rests elsewhere.
    pulls_to_zero = written in (undecayed, steps)
    for given in ((X,), (X.transpose(1, 2), V.transpose(0, 1))):
        converted = assert_like_stock(node, *given, multi=multi)
        proved = getattr(converted, "treatment", "") == "analytic"
        assert proved == (not (pulls_to_zero and v_reset))


def test_sequences_of_the_release_with_two_types():
    old = release("0.0.0.0.12")

    class MyLIF(old.neuron.MultiStepLIFNode):
        def neuronal_charge(self, x):
            self.v = self.v + (x - self.v) / self.tau

    node = made(MyLIF, old)
    assert assert_like_stock(node, X, multi=True).treatment == "analytic"
    assert assert_like_stock(node, X, V, multi=True).treatment == "analytic"


def test_a_learned_leak(sj):
    if sj.version == "2.0":

        class MyPLIF(sj.neuron.ParametricLIFNode):
            def single_step_functional_forward(self, inputs, states, **kwargs):
                v = states[0] + (inputs[0] - states[0]) * self.w.sigmoid()
                s = self.surrogate_function(v - self.v_threshold)
                return (s,), ((1.0 - s) * v + s * self.v_reset,)

            multi_step_functional_forward = base.MemoryModule.multi_step_functional_forward

    else:

        class MyPLIF(sj.neuron.ParametricLIFNode):
            def neuronal_charge(self, x):
                self.v = self.v + (x - self.v) * self.w.sigmoid()

    for multi in (False, True)[: 1 + (sj.version != "0.0.0.0.12")]:
        converted = assert_like_stock(made(MyPLIF, sj, multi=multi), X, multi=multi)
        assert converted.treatment == "analytic"
    for step in X:  # and what it learns is another number, not another graph
        converted(step.requires_grad_())
    with torch.no_grad():
        converted.w.add_(0.5)
    assert_like_stock(srp.restore(converted), X, multi=multi)


@pytest.mark.one_in(2)
def test_other_dtypes_shapes_and_surrogates(sj):
    cls = charges(sj)
    for dtype, function in [(torch.float64, "Sigmoid"), (torch.bfloat16, "ATan")]:
        node = made(cls, sj, surrogate_function=getattr(sj.surrogate, function)())
        converted = assert_like_stock(node, X.to(dtype), V.to(dtype))
        assert converted.treatment == "analytic"
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_stock(made(cls, sj), X, V)


@pytest.mark.one_in(2)
def test_in_loops_they_run_on_the_grid(sj):
    net = nn.Sequential(nn.Linear(5, 6), made(charges(sj), sj), nn.Linear(6, 3), made(steps(sj), sj))
    srp.convert_to_reversible(net)
    assert [net[1].treatment, net[3].treatment] == ["reversed in time"] * 2
    known = nn.Sequential(
        nn.Linear(5, 6), made(sj.neuron.LIFNode, sj), nn.Linear(6, 3), made(sj.neuron.LIFNode, sj)
    )
    known.load_state_dict(net.state_dict())
    srp.convert_to_reversible(known)
    found = []
    for one in (net, known):
        out = sum(one(x) for x in X.flatten(1, 2))
        out.mul(out).sum().backward()
        found.append([out, *(p.grad for p in one.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.one_in(2)
def test_it_holds_what_the_known_one_holds(sj):
    def held(cls):
        node = made(cls, sj, multi=sj.version != "0.0.0.0.12", detach_reset=True)
        net = srp.convert_to_reversible(nn.Sequential(nn.Linear(5, 50_000), node, nn.Linear(50_000, 3)))

        def step():
            node.reset()
            return (net(X) if sj.version != "0.0.0.0.12" else sum(net(x) for x in X)).mean()

        step().backward()  # in which it is proved
        return count_step(step)

    ours, known = held(charges(sj)), held(sj.neuron.LIFNode)
    assert ours[0] <= 1.02 * known[0]
    assert ours[1] <= 1.25 * known[1]  # a kernel of its own, and what it works in


# -- what must not be proved ---------------------------------------------------------------------------

GAIN = 1.0
SEEN = []


def gain():
    return GAIN


def against(sj):
    """A neuron of 0.0.0.0.14 or 0.0.0.0.12, and 2.0's that has charges."""
    return sj.neuron.SimpleIFNode if sj.version == "2.0" else sj.neuron.IFNode


def wrong(sj):
    base_class, cases = against(sj), {}

    def case(why):
        def keep(cls):
            cases[cls] = why
            return cls

        return keep

    @case(OTHER)
    class AConstantDiffers(base_class):
        tau = 2.0

        def neuronal_charge(self, x):
            self.v = self.v + (x - self.v) / 2.1

    @case(OTHER)
    class AnotherOrder(base_class):
        """As good, and not the same bits."""

        def neuronal_charge(self, x):
            self.v = (self.v + x / 2) + x / 2

    @case(OTHER)
    class CutsTheGradient(base_class):
        """The forward is the same."""

        def neuronal_reset(self, spike):
            s = spike.detach()
            self.v = (1.0 - s) * self.v + s * self.v_reset

    @case(OTHER)
    class NoSurrogate(base_class):
        def neuronal_fire(self):
            return (self.v >= self.v_threshold).to(self.v) * self.v

    @case(OTHER)
    class OtherReset(base_class):
        def neuronal_reset(self, spike):
            self.v = self.v * (1.0 - spike)

    @case("its neuronal_charge sets an attribute, current")
    class Stores(base_class):
        def neuronal_charge(self, x):
            self.current = x
            self.v = self.v + x

    @case("its neuronal_charge sets an attribute, v")
    class InPlace(base_class):
        def neuronal_charge(self, x):
            self.v = self.v + x
            self.v += 0.25

    @case("it reads SEEN, a list")
    class Appends(base_class):
        def neuronal_charge(self, x):
            SEEN.append(1)
            self.v = self.v + x

    @case("its neuronal_charge calls what it derives from")
    class Super(base_class):
        def neuronal_charge(self, x):
            super().neuronal_charge(2 * x)

    @case("it reads self.level, a property")
    class AProperty(base_class):
        @property
        def level(self):
            return float(torch.rand(()))

        def neuronal_charge(self, x):
            self.v = self.v + x * self.level

    @case("it reads self.leak, a property")
    class APropertyBeforeANumber(base_class):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.__dict__["leak"] = 1.0

        @property
        def leak(self):
            return self.__dict__["leak"] + float(self.v_threshold > 2.0)

        def neuronal_charge(self, x):
            self.v = self.v + x / self.leak

    @case("it can't be recorded")
    class LooksAtValues(base_class):
        def neuronal_charge(self, x):
            self.v = self.v + (x if x.sum() > 0 else 2 * x)

    @case("it draws random numbers")
    class Draws(base_class):
        def neuronal_charge(self, x):
            self.v = self.v + x + 0.1 * torch.rand_like(x)

    @case("it reads self.gain, a Parameter")
    class Learns(base_class):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.gain = nn.Parameter(torch.tensor(1.0))

        def neuronal_charge(self, x):
            self.v = self.v + x * self.gain

    def closed(k):
        @case("its neuronal_charge hands itself to a function inside")
        class AClosure(base_class):
            def neuronal_charge(self, x):
                self.v = (lambda: self.v + k * x)()

        return AClosure

    closed(2.0)
    return cases


NAMES = [cls.__name__ for cls in wrong(modules("2.0"))]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NAMES)
def test_what_differs_is_not_proved(sj, name):
    cls, why = next((cls, why) for cls, why in wrong(sj).items() if cls.__name__ == name)
    node = made(cls, sj)
    converted = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    for _ in range(2):
        results = []
        for one in (node, converted):
            torch.manual_seed(3)
            results.append(outcome(one, X))
    assert [*map(same, *results)] == [True] * len(results[0])
    assert converted.treatment == "generic replay"
    assert why in converted.treatment_reason
    torch.manual_seed(0)
    assert srp.convert_to_reversible(nn.Sequential(nn.Linear(5, 5), node))[1].treatment == "generic replay"


class ByTheSteps:
    """What it does hangs on a number that is not in its operations at the first look."""

    def neuronal_charge(self, x):
        self.v = self.v + (x if x.numel() < 60 else 2 * x)


class InTraining:
    def neuronal_charge(self, x):
        self.v = self.v + (x if self.training else 2 * x)


class ReadsAGlobal:
    def neuronal_charge(self, x):
        self.v = self.v + x * gain()


class ReadsANumber:
    factor = 1.0

    def neuronal_charge(self, x):
        self.v = self.v + self.factor * x


def _factor(node):
    node.factor = 0.5


def _a_charge_of_its_own(node):
    node.neuronal_charge = lambda x: setattr(node, "v", node.v + 3 * x)


def _a_global(_node):
    globals()["GAIN"] = 0.5


def _a_hook(node):
    node.register_forward_hook(lambda _module, _inputs, out: out * 1.5)


def _a_hook_on_the_surrogate(node):
    node.surrogate_function.register_forward_hook(lambda _module, _inputs, out: out * 1.5)


def _a_threshold(node):
    node.v_threshold = 0.5


def _evaluation(node):
    node.eval()


CHANGES = [(ReadsANumber, _factor, False), (ReadsANumber, _a_charge_of_its_own, False),
           (ReadsAGlobal, _a_global, False), (ReadsANumber, _a_hook, True),
           (ReadsANumber, _a_hook_on_the_surrogate, False), (ReadsANumber, _a_threshold, True),
           (InTraining, _evaluation, False)]  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("mixin", "change", "still"), CHANGES)
def test_what_it_reads_is_looked_at_again(sj, mixin, change, still, monkeypatch):
    monkeypatch.setitem(globals(), "GAIN", 1.0)
    cls = type("Mine", (mixin, against(sj)), {})
    node = made(cls, sj)
    assert assert_like_stock(node, X).treatment == "analytic"
    converted = assert_like_stock(node, X, change=change)
    assert (converted.treatment == "analytic") == still


@pytest.mark.one_in(2)
def test_a_branch_on_the_shape(sj):
    cls = type("Mine", (ByTheSteps, against(sj)), {})
    node = made(cls, sj)
    assert assert_like_stock(node, X).treatment == "analytic"
    assert assert_like_stock(node, X.repeat(1, 3, 1, 1)).treatment == "generic replay"


def test_code_that_is_exchanged_is_seen(sj):
    cls = type("Mine", (ReadsANumber, against(sj)), {})

    node = made(cls, sj)
    converted = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    outcome(converted, X)
    assert converted.treatment == "analytic"
    cls.neuronal_charge = lambda self, x: setattr(self, "v", self.v + 2 * x)
    for _ in range(2):
        expected, found = outcome(node, X), outcome(converted, X)
    assert [*map(same, expected, found)] == [True] * len(expected)
    assert converted.treatment == "generic replay"


@pytest.mark.one_in(2)
def test_on_the_grid_a_branch_is_seen_too(sj):
    cls = type("Mine", (ByTheSteps, against(sj)), {})
    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(5, 5), made(cls, sj)))
    net(torch.rand(3, 5))
    assert net[1].arithmetic == "grid"
    net[1].reset()
    with pytest.warns(UserWarning, match="operation by operation"):
        net(torch.rand(20, 5))
    assert net[1].arithmetic == "stock"


def test_a_step_that_stays_stock_says_why():
    old = release("0.0.0.0.14")

    class Counts(old.neuron.IFNode):
        calls = 0

        def single_step_forward(self, x):
            self.calls += 1
            self.v = self.v + x
            return self.surrogate_function(self.v - 1.0)

    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(5, 5), made(Counts, old)))
    report = {row.name: row.neuron for row in srp.memory_report(net, X).modules}
    assert "sets an attribute, calls" in report["1"]


@pytest.mark.one_in(2)
def test_what_was_proved_does_not_keep_a_neuron(sj):
    node = srp.convert_to_reversible(made(charges(sj), sj), arithmetic="stock")
    outcome(node, X)
    assert node.treatment != "generic replay"
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert gone() is None


def test_two_steps_with_one_forward_are_told_apart():
    """A sum of gradients in another order: three arrive at the spike."""
    old = release("0.0.0.0.12")

    class First(old.neuron.IFNode):
        def neuronal_reset(self, spike):
            self.v = spike * self.v_reset + (1.0 - spike) * self.v

    class Last(old.neuron.IFNode):
        def neuronal_reset(self, spike):
            self.v = (1.0 - spike) * self.v + spike * self.v_reset

    x = X * 1e4
    found = []
    for cls in (First, Last):
        node = made(cls, old, v_reset=0.1)
        assert assert_like_stock(node, x).treatment == "analytic"
        found.append(outcome(node, x)[4])
    assert not torch.equal(*found)
