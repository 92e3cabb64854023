"""Small integers in a few bits: every value comes back bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin.ops import levels

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPANS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 12), (-1, 1), (-3, 4)]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(tensor):
    return tensor.view(INTEGERS[tensor.element_size()])


@given(
    span=st.sampled_from(SPANS),
    dtype=st.sampled_from(DTYPES),
    codes=st.lists(st.integers(0, 15), max_size=40),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_what_is_packed_comes_back(span, dtype, codes):
    low, high = span
    values = [*range(low, high + 1), -0.0, math.nan, math.copysign(math.nan, -1)]
    flat = torch.tensor([float(values[code % len(values)]) for code in codes], dtype=dtype)
    packed = levels.pack_levels(flat, low, high)
    assert packed.nbytes == (len(codes) * levels.bits_for(low, high) + 7) // 8
    out = torch.empty_like(flat)
    levels.unpack_levels(packed, out, low, high)
    assert torch.equal(as_integers(out), as_integers(flat))


def test_more_than_a_chunk(monkeypatch):
    monkeypatch.setitem(levels._CHUNK, "cpu", 64)
    flat = torch.randint(0, 5, (1000,)).float()
    flat[::7], flat[3::11] = -0.0, math.nan
    out = torch.empty_like(flat)
    levels.unpack_levels(levels.pack_levels(flat, 0, 4), out, 0, 4)
    assert torch.equal(as_integers(out), as_integers(flat))


@pytest.mark.parametrize(
    ("span", "bits"), [((0, 1), 3), ((0, 4), 3), ((0, 5), 4), ((0, 12), 4), ((0, 13), 5)]
)
def test_bits_for(span, bits):
    assert levels.bits_for(*span) == bits
