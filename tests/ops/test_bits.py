"""Bit packing: every form against the torch form, and a round trip for any shape, layout and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin import ops
from snn_reversible_plugin.ops.bits import on_numpy, reference
from snn_reversible_plugin.ops.layouts import is_dense
from snn_reversible_plugin.tape.handles import Packed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64]


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 5000), seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES))
def test_every_form_packs_the_same_bits(device, n, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    ones = (torch.rand(n, generator=generator) < 0.3).to(device)
    flat = ones.to(dtype)
    expected = reference.pack_bits(flat)
    assert expected.dtype is torch.uint8 and expected.numel() == (n + 7) // 8
    assert torch.equal(ops.pack_bits(flat), expected)
    forms = [reference, ops] + ([on_numpy] if device == "cpu" else [])
    for form in forms:
        out = torch.full_like(flat, True)
        form.unpack_bits(expected, out)
        assert torch.equal(out, flat)


def test_bit_order_is_little():
    flat = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0])
    assert ops.pack_bits(flat).tolist() == [1, 2]


@pytest.mark.parametrize("form", [reference, on_numpy])
def test_more_than_one_chunk(form, monkeypatch):
    monkeypatch.setattr(form, "CHUNK", 64)
    flat = (torch.rand(1000) < 0.5).float()
    out = torch.empty_like(flat)
    form.unpack_bits(form.pack_bits(flat), out)
    assert torch.equal(out, flat)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.permute(0, 3, 1, 2),
    "slice": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, *x.shape[1:]),
    "scalar": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_handle_gives_back_value_layout_and_dtype(layout, dtype, device):
    spikes = LAYOUTS[layout]((torch.rand(3, 4, 5, 6, device=device) < 0.4).to(dtype))
    handle = Packed()
    handle.materialize(spikes)
    assert handle.bits.numel() == (spikes.numel() + 7) // 8
    value, owned = handle.get(last=True)
    assert torch.equal(value, spikes) and value.dtype == dtype and owned
    if is_dense(spikes):
        assert value.stride() == spikes.stride()


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_dense_means_one_stretch_of_memory(sizes, order):
    dims = list(range(len(sizes)))
    order.shuffle(dims)
    x = torch.empty(sizes).permute(dims)
    assert is_dense(x)
    wider = torch.empty([*sizes, 2]).select(-1, 0).permute(dims)
    assert is_dense(wider) == (wider.numel() == 1)
