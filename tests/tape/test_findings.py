"""What a report says of neurons that nobody knows: what is bits, what is kept in full, and why."""

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import Fire, lif
from snn_reversible_plugin.tape.findings import REMEDIES
from snn_reversible_plugin.tape.recipes import Refused


class Own(nn.Module):
    """It keeps its spikes, so that the tape records it."""

    def forward(self, x):
        self.spikes = lif(x)
        return self.spikes


class Noisy(nn.Module):
    def forward(self, x):
        return Fire.apply(x * torch.rand_like(x) - 0.2)


class Counting(nn.Module):
    def forward(self, x):
        return torch.round(torch.clamp(x, 0, 4))


@pytest.fixture(scope="module", params=["memory", "speed"])
def report(request):
    neurons = Own(), Counting(), Noisy()
    layers = [part for neuron in neurons for part in (nn.Linear(64, 64), neuron)]
    with pytest.warns(UserWarning, match="knows"):
        net = srp.convert_to_reversible(nn.Sequential(*layers, nn.Linear(64, 4)), mode=request.param)
    return srp.memory_report(net, torch.rand(4, 32, 64))


def test_bits_are_found_where_they_are_made(report):
    found = {(one.module, one.operation): one for one in report.bits}
    spikes, counts = found["1", "gt"], found["3", "round"]
    assert spikes.bytes == spikes.elements // 8 == 4 * 32 * 64 // 8
    # The order of eight codes and a bit for each, and more for those that are not the most frequent.
    assert 8 + counts.elements // 8 <= counts.bytes < 3 * counts.elements // 8


def test_what_is_kept_in_full_says_why_and_what_to_change(report):
    assert report.kept == sorted(report.kept, key=lambda one: -one.bytes)
    (noise,) = [one for one in report.kept if one.operation == "rand_like"]
    assert noise.module == "5" and noise.shape == (4, 32, 64) and noise.bytes == 4 * 32 * 64 * 4
    assert "random" in noise.why and "bernoulli" in noise.remedy
    currents = [one for one in report.kept if one.operation == "addmm"]
    if report.mode == "memory":
        assert {one.module for one in currents} <= {"6"}  # the small output
    else:
        assert {one.module for one in currents} == {"2", "6"}
        instead = {one.module for one in report.kept if one.operation in ("add", "mul")}
        assert instead == {"1", "5"}  # as large as the currents that they were computed from
        assert currents[0].why == Refused.WORK and "memory" in currents[0].remedy
    report.print()


def test_every_reason_has_a_remedy():
    reasons = {value for name, value in vars(Refused).items() if name.isupper()}
    assert reasons <= REMEDIES.keys()
