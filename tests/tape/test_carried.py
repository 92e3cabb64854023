"""A chain of recipes keeps no more than autograd would have saved in their place."""

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import Fire
from snn_reversible_plugin import tape
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.origins import look_up

pytestmark = pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows")
MODES = ["memory", "speed"]


class Online(nn.Module):
    """A layer that detaches its membrane in each step, and goes backward there."""

    def __init__(self, features=512):
        super().__init__()
        self.fc, self.v = nn.Linear(features, features), None

    def forward(self, x):
        v = torch.zeros_like(x) if self.v is None else self.v.detach()
        v = 0.5 * v + self.fc(x)
        s = Fire.apply(v - 1.0)
        self.v = v - s.detach()
        return s


def held_by(model, steps, x):
    def loss():
        model.v = None
        for _ in range(steps - 1):
            model(x).mean().backward()
        return model(x).mean()

    loss().backward()
    model.zero_grad()
    return count_step(loss)[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_charged_membrane_is_kept_and_not_both_that_it_is_made_of(mode):
    x = torch.rand(256, 512)
    stock, converted = Online(), srp.convert_to_reversible(Online(), mode=mode)
    assert held_by(converted, 3, x) <= 1.02 * held_by(stock, 3, x) + 65536


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_of_sums_keeps_what_is_saved_of_it(mode):
    """Of which the last is saved: all branches would be needed to compute it."""

    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.fcs = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))

        def forward(self, x):
            with torch.no_grad():
                for fc in self.fcs:
                    x = x + fc(x)
            return Fire.apply(self.fcs[0](x).square() - 1.0)

    x = torch.rand(256, 256)
    stock = Streams()
    held = count_step(lambda: stock(x).sum())[0]
    assert (
        count_step(lambda: srp.convert_to_reversible(stock, mode=mode)(x).sum())[0] <= 1.02 * held + 65536
    )


def test_what_autograd_saves_is_paid_for():
    """A product that batch norm saves anyway costs its readers nothing: none of them is kept."""
    x = torch.rand(64, 128)
    fc, bn = nn.Linear(128, 128), nn.BatchNorm1d(128)
    with tape.recording("speed"):
        y = bn(fc(x))
        for _ in range(4):
            y = y * 0.5 + 1.0
            assert look_up(y).treatment == "replayed"


def test_a_debt_is_paid_once_something_is_saved():
    with tape.recording("speed"):
        x = torch.rand(64, 64).requires_grad_() @ torch.rand(64, 64)
        u = x * 2.0
        assert look_up(u).carried
        Fire.apply(u)
        assert look_up(u * 3.0) is not None
    with tape.recording("speed"):
        x = torch.rand(64, 64).requires_grad_() @ torch.rand(64, 64)
        assert look_up(x * 2.0 * 3.0) is None


@pytest.mark.parametrize("lives", [False, True])
def test_a_state_lets_go_of_a_graph_that_is_gone(lives):
    with tape.recording("speed"):
        h = torch.rand(64, 64).requires_grad_() @ torch.rand(64, 64)
        loss = Fire.apply(h - 1.0).sum()
        v = h * 2.0
        bits = h.detach().gt(0).float()
        assert look_up(v) is not None
    loss.backward(retain_graph=lives)
    with tape.recording("speed"):
        assert (look_up(v) is not None) == lives
        assert look_up(bits) is not None
