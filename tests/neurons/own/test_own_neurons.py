"""Neurons that users wrote: their recorded operations stand in for them where that is proved."""

import copy
import gc
import math
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import Fire, gradients
from snn_reversible_plugin.neurons.own import call
from snn_reversible_plugin.neurons.own.call import Proved
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.sliced import cut

pytestmark = pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows")
PROVED = "proved: its recorded operations, a few rows at a time"
STEPS, BATCH, WIDE = 3, 12, 128


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small layers are cut, too, but for the first one of a network."""
    monkeypatch.setattr(call, "AT_ONCE", 500)
    monkeypatch.setattr(call, "MOST_KINDS", 3)
    monkeypatch.setattr(call, "_shared", OrderedDict())


class Triangle(torch.autograd.Function):
    """With a width that is saved as a tensor and read as a number."""

    @staticmethod
    def forward(ctx, v, width):
        ctx.save_for_backward(v, torch.tensor([width]))
        return (v > 0).float()

    @staticmethod
    def backward(ctx, grad):
        v, width = ctx.saved_tensors
        width = width[0].item()
        return grad.clone() * (1 / width) * (1 / width) * (width - v.abs()).clamp(min=0), None


class Sigmoid(torch.autograd.Function):
    """Whose derivative has an exponential."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        s = (4 * v).sigmoid()
        return grad * s * (1 - s) * 4


class Arctan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return torch.ge(v, 0).to(v.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2 / (1 + (math.pi / 2 * ctx.saved_tensors[0]).pow(2))


class HardReset(nn.Module):
    """``mem * tau + x``, set to zero by a product; the batch first."""

    def __init__(self, tau=0.5, threshold=1.0, width=1.0):
        super().__init__()
        self.act, self.tau, self.threshold, self.width = Triangle.apply, tau, threshold, width

    def forward(self, x):
        mem, spikes = 0, []
        for t in range(x.shape[1]):
            mem = mem * self.tau + x[:, t, ...]
            spike = self.act(mem - self.threshold, self.width)
            mem = (1 - spike) * mem
            spikes.append(spike)
        return torch.stack(spikes, dim=1)


class SoftReset(nn.Module):
    """Time first, a step of its own, and what it detaches."""

    decay = 0.9

    def step(self, x, v):
        v = self.decay * v + x
        s = Arctan.apply(v - 1.0)
        return s, v - s.detach()

    def forward(self, x_seq):
        v = torch.zeros_like(x_seq[0])
        found = []
        for x in x_seq:
            s, v = self.step(x, v)
            found.append(s)
        return torch.stack(found)


class Adaptive(nn.Module):
    """Two states."""

    def forward(self, x_seq):
        v = a = torch.zeros_like(x_seq[0])
        found = []
        for x in x_seq:
            v = 0.8 * v + x
            s = Fire.apply(v - 1 - a)
            v, a = v - s * (1 + a), 0.9 * a + 0.1 * s
            found.append(s)
        return torch.stack(found)


class WithSigmoid(nn.Module):
    def forward(self, x_seq):
        v, found = 0.0, []
        for x in x_seq:
            v = v + (x - v) / 2.0
            s = Sigmoid.apply(v - 0.5)
            v = v * (1.0 - s)
            found.append(s)
        return torch.stack(found)


def network(neuron, wide=WIDE):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), neuron, nn.Linear(24, wide), copy.deepcopy(neuron))


def inputs(first):
    return 3 * torch.rand(BATCH, STEPS, 16) if first else 3 * torch.rand(STEPS, BATCH, 16)


def step(net, x):
    out = net(x)
    loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
    loss.backward()
    return [out.detach(), *gradients(net)]


def assert_like_stock(neuron, x=None, wide=WIDE, change=None, autocast=False):
    """Trains twice; ``change`` is done to both neurons of both networks in between."""
    stock = network(neuron, wide)
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(isinstance(neuron, HardReset)) if x is None else x
    for again in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            expected, found = step(stock, x), step(converted, x)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a.signbit(), b.signbit())
            assert a.stride() == b.stride()
        assert expected[0].any()
        assert all(grad.any() for grad in expected[1:])
        if change is not None and not again:
            for net in (stock, converted):
                change(net[1])
                change(net[3])
    return converted


NEURONS = [HardReset(), SoftReset(), Adaptive(), WithSigmoid()]


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.one_in(2)
def test_it_is_proved_and_trains_as_stock(neuron, autocast):
    converted = assert_like_stock(neuron, autocast=autocast)
    assert isinstance(converted[3], Proved)
    assert converted[1].treatment == converted[3].treatment == PROVED
    cut = [len(list(proof.parts())) for proof in call._known[converted[3]].of.values()]
    assert cut == [1] if isinstance(neuron, WithSigmoid) else cut[0] >= 3
    assert not isinstance(srp.restore(converted)[1], Proved)


def test_in_evaluation():
    stock = network(HardReset()).eval()
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(True)
    for a, b in zip(step(stock, x), step(converted, x), strict=True):
        assert torch.equal(a, b)
    assert converted[3].treatment == PROVED
    with torch.no_grad():
        assert torch.equal(stock(x), converted(x))


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps(steps):
    x = 6 * torch.rand(BATCH, steps, 16)
    assert assert_like_stock(HardReset(), x)[3].treatment == PROVED


def test_gradients_that_are_laid_out_otherwise():
    stock = network(SoftReset())
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(False)
    for net in (stock, converted):
        net(x).mean().backward()  # an expanded one
    for a, b in zip(gradients(stock), gradients(converted), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(converted(x).sum(), converted[2].weight, create_graph=True)


class WritesBehind(nn.Module):
    """Currents and spikes that somebody writes to after the neuron has read them."""

    def __init__(self):
        super().__init__()
        self.layer, self.neuron, self.last = nn.Linear(16, WIDE), Base(), nn.Linear(WIDE, 5)

    def forward(self, x):
        current = self.layer(x)
        spikes = self.neuron(current)
        current += 1
        spikes *= current
        return self.last(spikes)


def test_writes_to_what_it_took_and_gave():
    torch.manual_seed(0)
    stock = WritesBehind()
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(False)
    for a, b in zip(step(stock, x), step(converted, x), strict=True):
        assert torch.equal(a, b)
    assert converted.neuron.treatment == PROVED


def test_two_backwards_and_copies():
    stock = network(Base())
    converted = copy.deepcopy(srp.convert_to_reversible(copy.deepcopy(stock)))
    x, grads = inputs(False), []
    for net in (stock, converted):
        loss = net(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append(gradients(net))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
    assert converted[3].treatment == PROVED


def test_zeros_keep_their_sign():
    """A gradient of -0 becomes +0 where several steps are added up, and stays where there is one."""
    for steps in (1, 3):
        x = torch.full((BATCH, steps, WIDE), -5.0, requires_grad=True)
        neuron = HardReset()
        signs = []
        for one in (neuron, srp.convert_to_reversible(copy.deepcopy(neuron))):
            (g,) = torch.autograd.grad(one(x), x, torch.full_like(x, -1.0))
            signs.append(g.signbit())
        assert torch.equal(*signs)
        assert signs[0].any() == (steps == 1)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_it_holds_less_and_peaks_lower_than_on_the_tape(mode):
    x = inputs(True).repeat(1, 2, 1)
    net = network(HardReset(), wide=2048)
    net.append(nn.Linear(2048, 4))

    def taped():
        with srp.reversible(net, mode=mode):
            return net(x).mean()

    on_tape = count_step(taped)
    net.zero_grad()
    srp.convert_to_reversible(net, mode=mode)
    proved = count_step(lambda: net(x).mean())
    assert proved[0] < on_tape[0]
    assert proved[1] < 0.85 * on_tape[1]


# -- what must not be proved ---------------------------------------------------------------------------

FACTOR = 0.5
SEEN = []


def scaled(v):
    return v * FACTOR


class Base(nn.Module):
    """A loop around a step that can be anything."""

    def __init__(self):
        super().__init__()
        self.tau, self.calls, self.kept = 0.5, 0, []

    def forward(self, x_seq):
        v, found = 0.0, []
        for x in x_seq:
            v, s = self.step(v, x)
            found.append(s)
        return torch.stack(found)

    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class StoresSpikes(Base):
    def step(self, v, x):
        v = v * self.tau + x
        self.last = Fire.apply(v - 1.0)
        return v * (1 - self.last), self.last


class Counts(Base):
    """Whose third step differs."""

    def step(self, v, x):
        self.calls += 1
        s = Fire.apply(v * self.tau + x - (2.0 if self.calls % 3 == 0 else 1.0))
        return (v * self.tau + x) * (1 - s), s


class Appends(Base):
    def step(self, v, x):
        s = Fire.apply(v * self.tau + x - 1.0)
        self.kept.append(s.detach())
        return (v * self.tau + x) * (1 - s), s


class AppendsToAGlobal(Base):
    def step(self, v, x):
        s = Fire.apply(v * self.tau + x - 1.0)
        SEEN.append(1)
        return (v * self.tau + x) * (1 - s), s


class OnlyOnTheSample(Base):
    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - 1.0)
        return (v if x.sum() > 100 else v * (1 - s)), s


class LooksAtItsInput(Base):
    def forward(self, x_seq):
        if x_seq.detach().abs().mean().item() > 1e6:
            return x_seq
        v, found = 0.0, []
        for x in x_seq:
            v, s = self.step(v, x)
            found.append(s)
        return torch.stack(found)


class Catches(Base):
    """A recording fails where a value is asked for; the code goes on otherwise."""

    def step(self, v, x):
        v = v * self.tau + x
        try:
            threshold = 2.0 if x.sum() > 0 else 1.0
        except Exception:
            threshold = 1.0
        s = Fire.apply(v - threshold)
        return v * (1 - s), s


class Draws(Base):
    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - 1.0 - 0.1 * torch.rand_like(v))
        return v * (1 - s), s


class Normalizes(Base):
    """Rows of the batch see each other."""

    def step(self, v, x):
        v = v * self.tau + x - x.mean(0)
        s = Fire.apply(v - 0.1)
        return v * (1 - s), s


class ByTheBatch(Base):
    """A number that hangs on how many rows there are."""

    def step(self, v, x):
        v = v * self.tau + x * x.shape[0] / 8
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class ByTheRow(Base):
    def step(self, v, x):
        v = v * self.tau + x * torch.tensor([[float(i)] for i in range(len(x))])
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class Learns(Base):
    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.5))

    def step(self, v, x):
        v = v * self.decay + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class HandsItselfOn(Base):
    def step(self, v, x):
        v = v * getattr(self, "ta" + "u") + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class InAClosure(Base):
    def step(self, v, x):
        v = (lambda: v * self.tau)() + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class Asks(Fire):
    """Of what autograd has, and not the code."""

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * (v.abs() < len(ctx.next_functions))


class ReadsTheGraph(Base):
    def step(self, v, x):
        v = v * self.tau + x
        s = Asks.apply(v - 1.0)
        return v * (1 - s), s


class NotBits(Base):
    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s * 2.0


class APropertyBeforeANumber(Base):
    """The number that is stored under its name is another."""

    def __init__(self):
        super().__init__()
        self.__dict__["leak"] = 0.5

    @property
    def leak(self):
        return self.__dict__["leak"] / 2

    def step(self, v, x):
        v = v * self.leak + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


# The same operations, if all rows are taken at a time.
UNCUT = {
    Normalizes: "its mean does not leave the rows of a batch apart",
    ByTheBatch: "a number in it hangs on the batch",
    ByTheRow: "a number in it hangs on the batch",
}
NEVER = {
    StoresSpikes: "its step sets an attribute, last",
    Counts: "its step sets an attribute, calls",
    Appends: "it reads self.kept, a list",
    AppendsToAGlobal: "it reads SEEN, a list",
    OnlyOnTheSample: "it can't be recorded",
    LooksAtItsInput: "it can't be recorded",
    Catches: "its step has code that can't be followed",
    Draws: "it draws random numbers",
    Learns: "it has parameters or buffers",
    HandsItselfOn: "its step reads getattr",
    InAClosure: "its step hands itself to a function inside",
    ReadsTheGraph: "Asks.backward reads .next_functions of something",
    APropertyBeforeANumber: "it reads self.leak, a property",
    NotBits: "its output is not zeros and ones by construction",
}


@pytest.mark.parametrize(("cls", "why"), [*NEVER.items(), *UNCUT.items()])
def test_what_is_more_than_its_operations_is_taped(cls, why):
    stock = network(cls())
    converted = srp.convert_to_reversible(copy.deepcopy(stock))
    x = inputs(False)
    for _ in range(2):
        results = []
        for net in (stock, converted):
            torch.manual_seed(3)
            results.append(step(net, x))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    for neuron in (converted[1], converted[3]) if cls in NEVER else (converted[3],):
        assert call.why_taped(neuron).startswith(f"the tape, for {why}")
    for a, b in ((stock[1], converted[1]), (stock[3], converted[3])):
        assert (a.calls, len(a.kept)) == (b.calls, len(b.kept))


def test_a_base_that_is_written_out_is_proved():
    """The cases above are refused for what they do, and not for what they share."""
    assert assert_like_stock(Base())[3].treatment == PROVED


class OtherInEvaluation(Base):
    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - (1.0 if self.training else 0.5))
        return v * (1 - s), s


class OtherSurrogate(Base):
    def __init__(self):
        super().__init__()
        self.act = Fire.apply

    def step(self, v, x):
        v = v * self.tau + x
        s = self.act(v - 1.0)
        return v * (1 - s), s


class Rectangle(nn.Module):
    width = 1.0

    def forward(self, v):
        return Wide.apply(v, self.width)


class Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, width):
        ctx.width = width
        ctx.save_for_backward(v)
        return (v > 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].abs() < ctx.width), None


class WithASurrogate(Base):
    def __init__(self):
        super().__init__()
        self.act, self.squash = Rectangle(), nn.Hardtanh(-4.0, 4.0)

    def step(self, v, x):
        v = self.squash(v * self.tau + x)
        s = self.act(v - 1.0)
        return v * (1 - s), s


class ReadsAGlobal(Base):
    def step(self, v, x):
        v = scaled(v) + x
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


class Threshold(Base):
    def __init__(self):
        super().__init__()
        self.threshold = 1.0

    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - self.threshold)
        return v * (1 - s), s


def _eval(neuron):
    neuron.eval()


def _threshold(neuron):
    neuron.threshold = 0.75


def _a_step_of_its_own(neuron):
    neuron.step = lambda v, x: (0.25 * v + x, Fire.apply(v * 0.25 + x - 1.0))


def _another(neuron):
    neuron.act = Arctan.apply


def _no_function(neuron):
    neuron.act = lambda v: 2 * Fire.apply(v)


def _a_hook(neuron):
    neuron.act.register_forward_hook(lambda _module, _inputs, out: out * 1.5)


def _a_width(neuron):
    neuron.act.width, neuron.squash.max_val = 0.5, 2.0


def _factor(_neuron):
    globals()["FACTOR"] = 0.9


CHANGES = [(OtherInEvaluation, _eval), (Threshold, _threshold), (Threshold, _a_step_of_its_own),
           (ReadsAGlobal, _factor), (OtherSurrogate, _another), (OtherSurrogate, _no_function),
           (WithASurrogate, _a_hook), (WithASurrogate, _a_width)]  # fmt: skip


@pytest.mark.parametrize(("cls", "change"), CHANGES)
def test_what_it_reads_is_looked_at_again(cls, change, monkeypatch):
    monkeypatch.setitem(globals(), "FACTOR", 0.5)
    neuron = cls()
    converted = srp.convert_to_reversible(copy.deepcopy(neuron))
    converted(torch.rand(STEPS, BATCH, 3, requires_grad=True))
    assert converted.treatment == PROVED
    assert_like_stock(neuron, change=change)


def test_code_that_is_exchanged_is_seen(monkeypatch):
    def exchange(neuron):
        monkeypatch.setattr(Fire, "backward", staticmethod(lambda ctx, grad: 2 * grad))

    assert_like_stock(Base(), change=exchange)


def test_a_surrogate_whose_gradient_differs_by_a_constant():
    """Two classes with one forward: each keeps its own gradient."""

    class Double(Fire):
        @staticmethod
        def backward(ctx, grad):
            return 2 * Fire.backward(ctx, grad)

    class Other(Base):
        def step(self, v, x):
            v = v * self.tau + x
            s = Double.apply(v - 1.0)
            return v * (1 - s), s

    assert_like_stock(Other())
    assert_like_stock(Base())


def test_many_shapes():
    neuron = srp.convert_to_reversible(Base())
    for rows in range(1, 6):
        x = torch.rand(2, rows, 3, requires_grad=True)
        neuron(3 * x).sum().backward()
    assert "another shape in every call" in neuron.treatment


@pytest.mark.slow
def test_reports_say_what_is_proved_and_what_stands_in_the_way():
    net = nn.Sequential(nn.Linear(16, 24), Base(), nn.Linear(24, 24), StoresSpikes(), nn.Linear(24, 4))
    srp.convert_to_reversible(net)
    rows = {row.name: row.neuron for row in srp.memory_report(net, inputs(False)).modules}
    assert rows["1"] == f"{PROVED}, stock arithmetic"
    assert rows["3"] == "the tape, for its step sets an attribute, last"
    assert srp.verify(net, inputs(False)).ok


class AsksForAValue(Base):
    """Known when it is recorded, in the frames of its first call."""

    def step(self, v, x):
        v = v * self.tau + x
        s = Fire.apply(v - 1.0) if v.sum().item() > -1e9 else v
        return v * (1 - s), s


def test_what_is_not_proved_keeps_nothing_of_its_call():
    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(16, 24), AsksForAValue()))

    def first_call():
        x = inputs(False)
        net(x).sum().backward()
        return weakref.ref(x)

    of_input = first_call()
    gc.collect()
    assert net[1].treatment.startswith("the tape, for") and of_input() is None


def test_modules_that_are_no_more_go(monkeypatch):
    monkeypatch.setattr(call, "MOST_MODULES", 2)
    monkeypatch.setattr(call, "MOST_SHARED", 1)
    monkeypatch.setattr(call, "_known", weakref.WeakKeyDictionary())
    made = []
    for _ in range(5):
        net = srp.convert_to_reversible(nn.Sequential(nn.Linear(16, 24), Base()))
        net(inputs(False)).sum().backward()
        made.append(weakref.ref(net[1]))
    del net
    gc.collect()
    assert sum(one() is not None for one in made) <= 3  # two that are known, and one that is shared


class Crosses(Base):
    """Each row is added to both: a dimension of two that is no batch."""

    def step(self, v, x):
        v = v * self.tau + x
        v = (v.unsqueeze(1) + torch.stack([v, 2 * v])).select(0, 1)
        s = Fire.apply(v - 1.0)
        return v * (1 - s), s


def test_two_rows_that_see_each_other():
    neuron = Crosses()
    converted = srp.convert_to_reversible(copy.deepcopy(neuron))
    x = torch.rand(STEPS, 2, 4096, requires_grad=True)
    grads = [torch.autograd.grad(one(x).sum(), x)[0] for one in (neuron, converted)]
    assert torch.equal(*grads)
    assert grads[0].any()
    assert call.why_taped(converted) == "the tape, for it turns its batch to another dimension"


@pytest.mark.parametrize("neuron", [HardReset, SoftReset])
@pytest.mark.one_in(2)
def test_what_it_saves_is_rebuilt_in_slices_too(neuron, monkeypatch):
    """Beside the gradient that comes in and the one that goes out nothing of the layer stands whole."""
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 16)
    batch_first, inputs = neuron is HardReset, torch.rand(8, 16, 4, 16, 16)

    class Layer(nn.Module):
        def __init__(self, of, to):
            super().__init__()
            self.conv, self.norm, self.fire = nn.Conv2d(of, to, 3, padding=1), nn.BatchNorm2d(to), neuron()

        def forward(self, x):
            return self.fire(self.norm(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))

    torch.manual_seed(0)
    stock = nn.Sequential(Layer(4, 16), nn.Flatten(0, 1), nn.AvgPool2d(4))  # a loss that takes little
    x = inputs if batch_first else inputs.transpose(0, 1).contiguous()
    found, peaks = [], []
    for mode in (None, "memory", "minimal"):
        net = copy.deepcopy(stock)
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        out = net(x)
        out.square().mean().backward()
        found.append((out.detach(), gradients(net)))
        peaks.append(count_step(lambda net=net: net(x).square().mean())[1])
        if mode:
            assert net[0].fire.treatment == PROVED
    assert all(torch.equal(found[0][0], out) for out, _ in found)
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))
    for expected, g in zip(found[0][1], found[2][1], strict=True):
        # The gradient of what a norm subtracts anyway is rounding and nothing else.
        torch.testing.assert_close(g, expected, rtol=1e-4, atol=1e-6)
    assert peaks[2] < 0.8 * peaks[1]
