"""Whose bytes a report's rows are, and what it says of times."""

from dataclasses import replace

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.timing import TimeRatio
from snn_reversible_plugin.tape.findings import REMEDIES, KeptInFull
from snn_reversible_plugin.tape.recipes import Refused


@pytest.fixture(scope="module")
def report():
    model = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(), layer.MaxPool2d(2), layer.Flatten(),
        layer.Linear(8 * 16, 16), neuron.LIFNode(), layer.Linear(16, 10),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    return srp.memory_report(srp.convert_to_reversible(model), torch.rand(8, 4, 2, 8, 8))


def test_spikes_stand_with_the_neurons_that_fired_them(report):
    rows = {row.name: row for row in report.modules}
    assert rows["1"].bytes == 8 * 4 * 8 * 64 // 8  # a bit an element, though the pool saved them
    assert "2" not in rows or rows["2"].bytes == 0
    spikes = 8 * 4 * 8 * 64 * 4
    assert rows["1"].stock_bytes >= 3 * spikes  # charged membranes, membranes, and the spikes themselves
    assert (
        rows["2"].stock_bytes == 3 * spikes // 4
    )  # its own: indices of 8 bytes, and floats for the linear
    assert [(bits.module, bits.bytes) for bits in report.bits if bits.module == "1"] == [
        ("1", rows["1"].bytes)
    ]


def test_rows_are_nearly_all_that_is_held(report):
    # The allocator also counts what the model returns, and the membranes that neurons are left with.
    assert 0.95 * report.stock.held <= sum(row.stock_bytes for row in report.modules) <= report.stock.held


def printed(report, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    report.print()
    return capsys.readouterr().out.splitlines()


def test_a_time_is_never_that_of_one_step(report, capsys, monkeypatch):
    assert report.time_ratio.rounds >= 3
    ratio = TimeRatio(1.25, 1.2, 1.3, 3)
    lines = printed(replace(report, time_ratio=ratio), capsys, monkeypatch, 200)
    assert "time of a training step, of stock's: 1.25x (quartiles 1.20x and 1.30x)" in lines


def test_rows_stay_on_a_line_and_what_needs_words_stands_below(report, capsys, monkeypatch):
    lines = printed(report, capsys, monkeypatch, 100)
    rows = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert len(rows) == len(report.modules) + 2  # held and peak
    assert [cells[3].strip() for cells in rows if cells[1].strip() == "LIFNode"] == ["analytic"] * 2
    assert [line for line in lines if "all time steps" in line] == [
        "1, 5: analytic, stock arithmetic: it runs all time steps in one call"
    ]


def test_neurons_on_the_grid_say_so_in_their_row(capsys, monkeypatch):
    net = nn.Sequential(layer.Linear(8, 8), neuron.LIFNode(), layer.Linear(8, 2))

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x_seq):
            return torch.stack([self.net(x) for x in x_seq])

    lines = printed(srp.memory_report(Loop(), torch.rand(3, 2, 8)), capsys, monkeypatch, 120)
    assert any("reversed in time, 2^-16" in line for line in lines if "LIFNode" in line)
    assert "net.1: reversed in time, grid arithmetic" in lines


def test_what_cannot_matter_is_not_printed(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    held = report.converted.held

    def kept(size, remedy):
        return KeptInFull("6", "rand", (size // 4,), size, "it draws random numbers", remedy)

    lines = [kept(held, "use less"), kept(held, REMEDIES[Refused.SMALL]), kept(held // 200, "use fewer")]
    replace(report, kept=lines).print()
    printed = capsys.readouterr().out
    assert "use less" in printed
    assert "nothing to change" not in printed
    assert "use fewer" not in printed
