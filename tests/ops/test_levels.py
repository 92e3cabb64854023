"""Small integers in a few bits: every value comes back bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin.ops import forms, levels, planes

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
@settings(max_examples=75, deadline=None, derandomize=True, database=None)
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


@given(
    span=st.sampled_from(SPANS),
    dtype=st.sampled_from(DTYPES),
    codes=st.lists(st.integers(0, 15), max_size=60),
    zeros=st.integers(0, 200),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(max_examples=75, deadline=None, derandomize=True, database=None)
@pytest.mark.parametrize("form", list(forms.forms_of(forms.PLANES, "cpu")), ids=lambda form: form.__name__)
def test_planes_come_back_in_any_range(form, span, dtype, codes, zeros, cut):
    low, high = span
    values = levels.values_of(low, high, dtype, torch.device("cpu"))
    codes = (codes + [0] * zeros)[:: -1 if zeros % 2 else 1]
    flat = values[torch.tensor(codes, dtype=torch.int64) % len(values)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "CHUNK", 32)
        patch.setattr(planes, "_form", lambda _: form)
        packed = planes.pack_planes(flat, low, high)
        each = (torch.tensor(codes, dtype=torch.int64) % len(values)).split(32)
        size = sum(bytes_of(part, len(values)) for part in each if len(part))
        assert (packed is None) == (size >= levels.pack_levels(flat, low, high).nbytes)
        if packed is None:
            return
        assert packed.bits.nbytes == size
        begin, end = sorted(round(part * flat.numel()) for part in cut)
        for first, last in ((0, flat.numel()), (begin, end)):
            out = flat.new_full((last - first,), 7)
            planes.unpack_planes(packed, out, first, low, high)
            assert torch.equal(as_integers(out), as_integers(flat[first:last]))


def test_forms_of_planes_give_the_same_bytes():
    codes = torch.rand(4001).pow(3).mul(8).byte()
    for some in (codes, codes[:1], codes.clamp(max=0), codes[:0]):
        packed = [form.pack(some, 8, 10**6) for form in forms.forms_of(forms.PLANES, "cpu")]
        assert len(packed) > 1
        assert all(torch.equal(one, packed[0]) for one in packed)


def bytes_of(codes, values):
    """A byte a value for their order, and a bit for each element that is none of the more frequent ones."""
    counts = sorted(torch.bincount(codes, minlength=values).tolist(), reverse=True)
    return values + sum((sum(counts[k:]) + 7) // 8 for k in range(values))


def test_planes_take_as_many_bits_as_values_are_more_frequent():
    flat = torch.full((8000,), 4.0)
    flat[::4], flat[::8], flat[5] = 0, 2, -0.0
    packed = planes.pack_planes(flat, 0, 4)
    # The order of eight values; a bit for all, for the 2001 that are not 4, for the 1001 that are none of
    # the two most frequent, and for the zero with a sign, which comes last.
    assert packed.bits.nbytes == 8 + 1000 + 251 + 126 + 1
    assert planes.pack_planes(torch.arange(8000) % 7.0, 0, 6) is None, "four bits each are no more"
