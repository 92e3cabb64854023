"""Bit packing: every form against the torch form, and a round trip for any shape, layout and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin.ops import forms
from snn_reversible_plugin.ops.bits import pack_bits, reference, unpack_bits
from snn_reversible_plugin.ops.layouts import is_dense
from snn_reversible_plugin.tape.packed import Packed

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64]


FORMS = {device: list(forms.forms_of(forms.BITS, device)) for device in DEVICES}


@pytest.mark.parametrize("bits_each", [1, 2, 3, 4])
@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 5000), seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES))
def test_every_form_packs_the_same_bits(device, bits_each, n, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(2**bits_each, (n,), generator=generator).to(device, dtype)
    expected = reference.pack_bits(flat, bits_each)
    assert expected.dtype is torch.uint8 and expected.numel() == (n * bits_each + 7) // 8
    assert torch.equal(pack_bits(flat, bits_each), expected)
    for form in FORMS[device]:
        assert torch.equal(form.pack_bits(flat, bits_each), expected)
        out = torch.full_like(flat, True)
        form.unpack_bits(expected, out, bits_each)
        assert torch.equal(out, flat)


@pytest.mark.parametrize("device", DEVICES)
def test_a_bit_is_set_where_an_element_is_not_zero(device):
    flat = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), 1e-45, -3.0], device=device)
    for form in FORMS[device]:
        assert form.pack_bits(flat).tolist() == [0b111001]


def test_bit_order_is_little():
    flat = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0])
    assert pack_bits(flat).tolist() == [1, 2]
    assert pack_bits(torch.tensor([1, 6, 7]), bits_each=3).tolist() == [0b11110001, 1]


@pytest.mark.parametrize("bits_each", [1, 3])
@pytest.mark.parametrize("form", FORMS["cpu"])
def test_more_than_one_chunk(form, bits_each, monkeypatch):
    monkeypatch.setattr(form, "CHUNK", 64)
    flat = torch.randint(2**bits_each, (1000,)).float()
    out = torch.empty_like(flat)
    form.unpack_bits(form.pack_bits(flat, bits_each), out, bits_each)
    assert torch.equal(out, flat)


@pytest.mark.parametrize("device", DEVICES)
def test_a_packed_tensor_is_unpacked_by_the_device_that_holds_it(device):
    flat = torch.tensor([3, 0, 2], device=device)
    out = torch.empty(3, dtype=torch.bfloat16, device=device)
    unpack_bits(pack_bits(flat, bits_each=2), out, bits_each=2)
    assert out.tolist() == [3, 0, 2]


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
