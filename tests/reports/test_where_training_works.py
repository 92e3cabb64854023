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
