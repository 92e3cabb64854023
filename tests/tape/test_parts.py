"""Sequences written part by part, `out[t] = step`: stock's values, and bits where steps are bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from own_neurons import Alternating, Fire, spikes, times_less
from snn_reversible_plugin import tape
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step
from snn_reversible_plugin.tape.handles import Kept


def lif_by_slices(x_seq, make=torch.zeros_like):
    v, out = 0.0, make(x_seq)
    for t in range(len(x_seq)):
        v = v * 0.25 + x_seq[t]
        s = Fire.apply(v - 0.5)
        v = v * (1 - s.detach())
        out[t] = s
    return out


def lif_batch_first(x):
    v, out = 0.0, torch.zeros_like(x)
    for t in range(x.shape[1]):
        v = v * 0.25 + x[:, t]
        s = Fire.apply(v - 0.5)
        v = v * (1 - s.detach())
        out[:, t] = s
    return out


def lif_reading_back(x_seq):
    """The step before is read out of what was written."""
    out, membranes = torch.zeros_like(x_seq), torch.zeros_like(x_seq)
    membranes[0] = x_seq[0]
    for t in range(1, len(x_seq)):
        out[t - 1] = Fire.apply(membranes[t - 1] - 0.5)
        membranes[t] = membranes[t - 1] * 0.25 * (1 - out[t - 1]) + x_seq[t]
    out[-1] = Fire.apply(membranes[-1] - 0.5)
    return out


class ConvBySlices(nn.Conv2d):
    def forward(self, x_seq):
        out = torch.zeros(*x_seq.shape[:2], self.out_channels, *x_seq.shape[3:])
        for t in range(len(x_seq)):
            out[t] = super().forward(x_seq[t])
        return out


@pytest.mark.one_in(2)
@pytest.mark.parametrize("neuron", [lif_by_slices, lif_batch_first, lif_reading_back])
def test_what_is_written_by_slices_is_bits(neuron):
    net = Alternating(neuron, [nn.Linear(128, 128) for _ in range(3)])
    held, peak = times_less(net, spikes(8, 128))
    assert held > 60 and peak > 1.5


def test_convolutions_written_by_slices():
    net = Alternating(lif_by_slices, [ConvBySlices(8, 8, 3, padding=1) for _ in range(4)])
    assert times_less(net, (torch.rand(6, 4, 8, 16, 16) > 0.5).float())[0] > 60


def test_slices_of_bits_wait_as_bits_until_their_backward_whatever_their_layout():
    """A stream is rebuilt through all blocks before it, and their spikes are needed again, each later."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ConvBySlices(4, 4, 3, padding=1)

        def forward(self, x):  # batch first in memory, so that a slice is laid out unlike a step
            return x + self.conv(lif_by_slices(x.transpose(0, 1).contiguous().transpose(0, 1)))

    peaks = []
    for blocks in (2, 4):
        net = nn.Sequential(nn.Conv3d(4, 4, 1), *(Block() for _ in range(blocks)))
        x_seq = torch.rand(4, 4, 32, 32)[:, None].expand(4, 2, 4, 32, 32)

        def loss(net=net, x_seq=x_seq):
            with tape.recording():
                return net[1:](net[0](x_seq.transpose(1, 2)).transpose(1, 2)).square().mean()

        loss().backward()
        peaks.append(count_step(loss)[1])
    stream = 4 * 2 * 4 * 32 * 32 * 4
    assert peaks[1] - peaks[0] < 3 * stream


def test_a_whole_that_is_read_at_each_step_is_copied_once_a_step():
    """Not T parts for each of T versions."""
    weight = torch.rand(16, requires_grad=True)

    def forward(steps):
        out, total = torch.zeros(steps, 16), 0.0
        for t in range(steps):
            out[t] = weight * t
            version = out.clone()
            total = total + (version * version).sum()
        return total

    (expected,) = torch.autograd.grad(forward(30), weight)
    with tape.recording():
        loss = forward(30)
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


def test_a_part_that_must_be_kept_leaves_the_whole_as_it_is():
    """Random numbers can't be made again: as much is held as in stock, and no more."""
    weight = torch.rand(64, 64, requires_grad=True)

    def forward():
        out = torch.zeros(8, 64, 64)
        for t in range(8):
            out[t] = weight * torch.rand(64, 64)
        return (out * out).sum()

    def held(context):
        torch.manual_seed(0)
        with AllocationCounter() as counter:
            with context:
                loss = forward()
            live = counter.live
        return live, torch.autograd.grad(loss, weight)[0]

    stock, expected = held(torch.enable_grad())
    ours, found = held(tape.recording())
    assert torch.equal(found, expected)
    assert ours <= stock + 4096


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bool])
def test_parts_that_are_cast_as_they_are_written(dtype):
    weight = torch.randn(5, 6, requires_grad=True)

    def forward():
        out = torch.zeros(3, 5, 6, dtype=dtype)
        for t in range(3):
            out[t] = weight.detach() * t if dtype is torch.bool else weight * t
        return (out.double() * weight * out[1].double()).sum()

    (expected,) = torch.autograd.grad(forward(), weight)
    with tape.recording():
        loss = forward()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


def test_other_layouts_of_what_is_written():
    weight = torch.randn(6, 5, requires_grad=True)

    def forward():
        out = torch.zeros(4, 5, 6)
        out[0] = weight.t()
        out[1] = weight[:, :1].t()  # is expanded
        out[2] = out[0]
        out[3, 1:3] = weight.t()[0]
        return sum((out[t] * out[t] * (t + 1)).sum() for t in range(4))

    (expected,) = torch.autograd.grad(forward(), weight)
    with tape.recording():
        loss = forward()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


def test_writes_through_an_alias_and_after_a_detach():
    weight = torch.randn(4, 3, requires_grad=True)

    def forward():
        out = torch.zeros(4, 3)
        out[0] = weight[0] * 2
        whole = out.clone() * weight
        out.detach()[1] = 7.0
        out.data[2] = 5.0
        out[3] = weight[3] + out[1]
        return (whole * out * out).sum()

    (expected,) = torch.autograd.grad(forward(), weight)
    with tape.recording():
        loss = forward()
    assert torch.equal(torch.autograd.grad(loss, weight)[0], expected)


SIZES = 4, 3, 6
INDICES = [
    0, 1, 3, -1, slice(0, 2), slice(1, 3), slice(None, None, 2), (slice(None), 1), (0, 2),
    (slice(1, 3), slice(0, 2)), (..., slice(1, 4)), (2, slice(None), slice(None, None, 3)), slice(None),
    (slice(0, 0),), None,
]  # fmt: skip
KINDS = [
    "copy",
    "copy",
    "copy",
    "spikes",
    "add",
    "mul",
    "fill",
    "read",
    "read",
    "whole",
    "own",
    "view",
    "mask",
]


@given(
    steps=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, len(INDICES) - 1)), max_size=10),
    start=st.sampled_from(["zeros", "empty", "current", "spikes", "noise"]),
    mode=st.sampled_from(["memory", "speed"]),
)
@settings(max_examples=75, deadline=None, derandomize=True, database=None)
def test_random_programs(steps, start, mode):
    """Writes that overlap, cover a part or all of it, and reads between them."""
    torch.manual_seed(0)
    leaves = [torch.randn(SIZES, requires_grad=True) for _ in range(2)]

    def program():
        a, b = leaves
        out = {
            "zeros": lambda: torch.zeros(SIZES),
            "empty": lambda: torch.empty(SIZES).fill_(0.5),
            "current": lambda: a * 2,
            "spikes": lambda: (a > 0).float(),
            "noise": lambda: torch.rand(SIZES) + a,
        }[start]()
        source, total = b * 1.5, b.sum()
        for kind, at in steps:
            index = INDICES[at]
            if kind == "copy":
                out[index] = source[index]
            elif kind == "spikes":
                out[index] = Fire.apply(source[index])
            elif kind == "add":
                out[index] += source[index]
            elif kind == "mul":
                out[index] *= 0.5
            elif kind == "fill":
                out[index] = 0.25
            elif kind == "own":
                out[0] = out[2] * 0.5 + source[1]
            elif kind == "mask":
                out[out.detach() > 0.3] = 0.75
            elif kind == "view":
                out.view(-1)[3:11] = source.view(-1)[2:10]
            else:  # what is saved of `out` must be a copy, or autograd itself refuses the next write
                read = out.clone() if kind == "whole" else out[index] + 0.5
                total = total + (read * read).sum()
        return total + (out * out).sum()

    torch.manual_seed(1)
    expected_value = program()
    expected = torch.autograd.grad(expected_value, leaves, allow_unused=True)
    torch.manual_seed(1)
    with tape.recording(mode, check=True):
        value = program()
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    assert torch.equal(value, expected_value)
    for stock, ours in zip(expected, found, strict=True):
        assert (stock is None) == (ours is None)
        assert stock is None or torch.equal(stock, ours)


def test_a_slice_that_was_just_written_does_not_lead_to_the_whole():
    weight = torch.rand(6, 64, requires_grad=True)
    with tape.recording():
        out = torch.zeros(6, 64)
        for t in range(6):
            out[t] = weight[t] * 2
        assert "write" not in str(tape.handle_of(out[3]).func)
        assert "write" in str(tape.handle_of(out[2:4]).operands()[0].func)
        for row in out:
            assert "write" not in str(tape.handle_of(row).func)
        assert not isinstance(tape.handle_of(out), Kept)
