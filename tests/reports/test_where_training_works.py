"""verify and memory_report run wherever a training step of the model does."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import snn_reversible_plugin as srp

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional  # noqa: E402


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.lif = neuron.LIFNode(step_mode="m")
        self.last = nn.Linear(8, 3)

    def spikes(self, x):
        functional.reset_net(self)
        return self.lif(self.first(x))

    def forward(self, x):
        return self.last(self.spikes(x))


@dataclass
class Output:
    logits: torch.Tensor
    spikes: torch.Tensor | None = None


class InADataClass(Base):
    def forward(self, x):
        return {"nested": [Output(super().forward(x))], "text": "more", "number": 3}


class ByName(Base):
    def forward(self, x, *, scale):
        return super().forward(x * scale)


class Sparse(Base):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8, sparse=True)

    def forward(self, numbers):
        return super().forward(self.table(numbers) * 3)


class Checkpointed(Base):
    reentrant = False

    def forward(self, x):
        return self.last(checkpoint(self.spikes, x, use_reentrant=self.reentrant))


class CheckpointedReentrantly(Checkpointed):
    reentrant = True


class Loop(Base):
    def forward(self, x_seq):
        self.lif.step_mode = "s"
        functional.reset_net(self)
        return torch.stack([self.last(self.lif(self.first(x))) for x in x_seq])


class WithLSTM(Base):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.last(self.dropout(self.lstm(self.spikes(x))[0]))


class NotANumber(Base):
    def forward(self, x):
        out = super().forward(x)
        return out / 0, out * torch.tensor([float("nan"), -float("nan"), 1.0])


class NegativeZero(Base):
    def forward(self, x):
        return super().forward(x) * -0.0


class WithAScriptedPart(Base):
    def __init__(self):
        super().__init__()
        self.first = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(2)))


class Frozen(Base):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class Double(Base):
    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, x):
        return super().forward(x.double())


INPUT = (torch.rand(4, 2, 8, generator=torch.Generator().manual_seed(1)) * 3).requires_grad_()
NUMBERS = torch.arange(8).reshape(4, 2)


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("cls", "x", "kwargs"),
    [
        (InADataClass, INPUT, {}), (ByName, INPUT, {"kwargs": {"scale": 2.0}}), (Sparse, NUMBERS, {}),
        (Checkpointed, INPUT, {}), (CheckpointedReentrantly, INPUT, {}), (Loop, INPUT, {}),
        (WithLSTM, INPUT, {}), (NotANumber, INPUT, {}), (NegativeZero, INPUT, {}), (Frozen, INPUT, {}),
        (Double, INPUT, {}), (WithAScriptedPart, INPUT, {}),
        (Base, INPUT, {"loss": functools.partial(nn.functional.l1_loss, target=torch.zeros(4, 2, 3))}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)  # fmt: skip
def test_reports(cls, x, kwargs):
    net = srp.convert_to_reversible(cls())
    before = x.grad
    verification = srp.verify(net, x, repeats=1, **kwargs)
    assert verification.ok and x.grad is before
    assert srp.memory_report(net, x, **kwargs).stock.held > 0


def test_zero_has_no_sign_and_a_difference_is_one():
    class Signs(Base):
        """Its output is another zero on the tape, or another number."""

        other = -0.0

        def forward(self, x):
            out = super().forward(x) * 0.0
            return out + (self.other if srp.tape.current() is not None else 0.0) * torch.ones(3)

    net = srp.convert_to_reversible(Signs(), arithmetic="stock")
    assert srp.verify(net, INPUT, repeats=1).ok
    net.other = 1e-3
    wrong = srp.verify(net, INPUT, repeats=1)
    assert not wrong.ok and wrong.output_difference == pytest.approx(1e-3)


class Scaled(torch.autograd.Function):
    """Its gradient is what it is told to be."""

    factor = staticmethod(lambda: 1.0)

    @staticmethod
    def forward(ctx, x):
        ctx.factor = Scaled.factor()
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor


class WithAGradient(Base):
    def forward(self, x):
        return super().forward(Scaled.apply(x * 1))


def converted_runs():
    return srp.tape.current() is not None


def verified(monkeypatch, factor):
    calls = []

    def next_factor():
        calls.append(converted_runs())
        return factor(calls)

    monkeypatch.setattr(Scaled, "factor", staticmethod(next_factor))
    return srp.verify(srp.convert_to_reversible(WithAGradient(), arithmetic="stock"), INPUT, repeats=1)


def test_a_stock_that_settles_is_what_counts(monkeypatch):
    """As TorchScript's, whose first calls add up in another order."""
    assert verified(monkeypatch, lambda calls: 0.5 if len(calls) == 1 else 1.0).ok


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "factor",
    [
        lambda calls: 1.0 + calls[-1],
        lambda calls: 1.0 + any(calls),  # the fault stays, so that stock has it from then on
        lambda calls: 0.5 if len(calls) == 1 else 1.0 + any(calls),
    ],
    ids=["each time", "for good", "for good, after stock settled"],
)
def test_a_difference_of_the_gradients_alone_is_reported_always(monkeypatch, factor):
    found = verified(monkeypatch, factor)
    assert found.outputs_equal and not found.gradients_equal and not found.ok
    assert found.gradient_difference > 0 and not found.unseen


def test_a_stock_that_is_never_the_same_is_said_to_be(monkeypatch):
    found = verified(monkeypatch, lambda calls: float(len(calls)))
    assert not found.ok and any("stock itself" in one.operation for one in found.unseen)
