"""Bits under Triton's interpreter: every size, dtype and width as the specification packs them."""

import pytest
import torch

from snn_reversible_plugin.ops.bits import on_triton, reference

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int16,
    torch.int32, torch.int64,
]  # fmt: skip


@pytest.mark.parametrize("bits_each", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1023, 1024, 2061])
def test_pack_and_unpack(n, bits_each):
    for dtype in DTYPES:
        flat = torch.randint(2**bits_each, (n,)).to(dtype)
        packed = on_triton.pack_bits(flat, bits_each)
        assert torch.equal(packed, reference.pack_bits(flat, bits_each)), dtype
        out = torch.full_like(flat, True)
        on_triton.unpack_bits(packed, out, bits_each)
        assert torch.equal(out, flat), dtype


def test_a_bit_is_set_where_an_element_is_not_zero():
    flat = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), 1e-45, -3.0])
    assert on_triton.pack_bits(flat).tolist() == [0b111001]


def test_a_record_that_begins_anywhere_in_memory():
    flat = torch.randint(8, (100,)).float()
    record = torch.cat((torch.full((3,), 255, dtype=torch.uint8), reference.pack_bits(flat, 3)))[3:]
    out = torch.empty(101)[1:]
    on_triton.unpack_bits(record, out, 3)
    assert torch.equal(out, flat)
