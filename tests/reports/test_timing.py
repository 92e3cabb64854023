"""What is said of a step's time beside stock's, and what it costs to know."""

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports import timing, trial
from snn_reversible_plugin.reports.timing import TimeRatio, in_turns


class Clock:
    """A clock that steps move on, and a record of who stepped."""

    def __init__(self, monkeypatch):
        self.now, self.taken = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def step(self, name, seconds):
        def taken():
            self.now += seconds
            self.taken.append(name)
            return seconds

        return taken


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 11), (0.125, 8), (0.5, 3), (60.0, 3)])
def test_short_steps_take_many_rounds_and_long_ones_few(monkeypatch, seconds, rounds):
    clock = Clock(monkeypatch)
    found = in_turns([clock.step("stock", seconds), clock.step("converted", seconds)])
    assert found == [[seconds] * rounds] * 2


def test_who_goes_first_changes(monkeypatch):
    clock = Clock(monkeypatch)
    in_turns([clock.step("stock", 1), clock.step("converted", 1)], rounds=2)
    assert clock.taken == ["stock", "converted", "converted", "stock"]


def test_a_ratio_is_that_of_steps_of_one_round():
    """Of medians it would be one: the machine was busy in the first and the third round."""
    ratio = TimeRatio.of([4.0, 2.0, 4.2, 2.1, 2.0], [2.0, 1.0, 2.0, 1.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2.0, 2.0, 2.1, 5)
    assert str(ratio) == "2.00x (quartiles 2.00x and 2.10x)"


@pytest.mark.parametrize(("high", "noisy"), [(1.14, False), (1.16, True)])
def test_no_single_figure_where_quartiles_are_far_apart(high, noisy):
    said = str(TimeRatio(1.0, 1.0, high, 7))
    assert (said == "between 1.0x and 1.2x: too noisy here") == noisy
    assert ("1.00x" in said) != noisy


def test_report_and_verify_time_in_one_way(monkeypatch):
    model, seen = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode()), []
    ratio = TimeRatio(9.0, 8.9, 9.1, 7)
    monkeypatch.setattr(trial, "in_turns", lambda steps, rounds: [[one()] for one in steps])
    monkeypatch.setattr(trial.TimeRatio, "of", lambda *found: seen.append(found) or ratio)
    assert srp.verify(model, torch.rand(2, 4)).time_ratio is ratio
    assert srp.memory_report(model, torch.rand(2, 4)).time_ratio is ratio
    assert len(seen) == 2


def test_the_step_is_warm_and_stock_is_stock(monkeypatch):
    """Counting takes the first step of each, and the ratio is converted over stock."""
    model, order = srp.convert_to_reversible(nn.Sequential(nn.Linear(4, 4), neuron.LIFNode())), []
    lean = type(model[1])

    def counted(run):
        order.append(("counted", type(model[1]) is lean))
        return 1, 2

    def timed(run):
        order.append(("timed", type(model[1]) is lean))
        return 3.0 if type(model[1]) is lean else 2.0

    monkeypatch.setattr(trial, "count_step", counted)
    monkeypatch.setattr(trial, "time_step", timed)
    stock, converted, ratio = trial.costs(trial.Step(model, (torch.rand(2, 4),)), rounds=1)
    assert order == [(what, lean) for what in ("counted", "timed") for lean in (False, True)]
    assert (stock.seconds, converted.seconds, ratio.median) == (2.0, 3.0, 1.5)
