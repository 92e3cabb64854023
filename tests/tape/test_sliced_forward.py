"""Mode "minimal": a convolution's forward on slices of the batch, with its bits."""

import pytest
import torch

from snn_reversible_plugin import tape
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.tape.sliced import cut, forward


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 12)
    monkeypatch.setattr(forward, "_seen", {})


CASES = {
    "plain": ((9, 4, 16, 16), {"padding": 1}),
    "groups, stride, dilation": ((7, 4, 16, 16), {"groups": 2, "stride": 2, "dilation": 2}),
    "no bias": ((6, 4, 16, 16), {"bias": False}),
    "one dimension": ((8, 4, 200), {}),
    "three dimensions": ((5, 4, 6, 6, 6), {}),
    "one sample": ((1, 4, 32, 32), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_slices_have_the_bits_and_the_layout_of_the_whole(name, channels_last):
    shape, how = CASES[name]
    conv = getattr(torch.nn, f"Conv{len(shape) - 2}d")(4, 6, 3, **how)
    x = torch.rand(shape)
    if channels_last and len(shape) == 4:
        x, conv = x.to(memory_format=torch.channels_last), conv.to(memory_format=torch.channels_last)
    expected = conv(x)
    for _ in range(2):  # the first time of a shape as a whole
        with tape.recording("minimal"):
            found = conv(x)
        assert torch.equal(expected, found) and expected.stride() == found.stride()
    assert [*forward._seen.values()] != [None] or len(x) == 1


def test_the_workspace_is_a_slices():
    x = torch.rand(32, 64, 16, 16)
    conv, peaks = torch.nn.Conv2d(64, 64, 3, padding=1), []
    for mode in ("memory", "minimal"):
        for _ in range(2):
            with AllocationCounter() as counter, tape.recording(mode):
                conv(x)
        peaks.append(counter.peak)
    assert peaks[1] < 1.2 * x.nbytes < 1.8 * x.nbytes < peaks[0]


def test_where_slices_have_other_bits_it_runs_as_a_whole(monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    x, conv = torch.rand(9, 4, 16, 16), torch.nn.Conv2d(4, 6, 3)
    with tape.recording("minimal"):
        conv(x)
    assert [*forward._seen.values()] == [None]
    monkeypatch.setattr(forward.Part, "of", None)  # nothing is cut any more
    with tape.recording("minimal"):
        conv(x)
