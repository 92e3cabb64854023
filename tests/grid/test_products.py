"""Products with factors of every kind, undone: each value comes back bit for bit."""

import pytest
import torch

from snn_reversible_plugin.grid import decay
from snn_reversible_plugin.grid.digits import pack_digits, unpack_digits
from snn_reversible_plugin.grid.products import LARGEST, SMALLEST, divide, factors, multiply

BELOW_ONE = 1 - 2.0**-24
FACTORS = [
    0.5, -0.5, 0.5 + 2.0**-25, 0.49999997, 2 / 3, 0.9, BELOW_ONE, -BELOW_ONE, 1.0, -1.0, 1 + 2.0**-23, 1.1,
    -1.7, 3.0, 1 / 3, 0.1, 1 / 7, SMALLEST, SMALLEST * 0.999, 1e-3, -1e-6, 0.0, -0.0, 1e-45, 513.7,
    LARGEST - 1, LARGEST, 1e30, float("inf"), float("nan"),
]  # fmt: skip


def integers(largest, count=4000):
    torch.manual_seed(0)
    largest = max(min(largest, 2**24 - 1), 1)
    u = torch.randint(-largest, largest + 1, (count,))
    return torch.cat((u, torch.arange(-50, 51).clamp(-largest, largest), torch.tensor([largest, -largest])))


@pytest.mark.parametrize("bits", [0, 16, 23])
@pytest.mark.parametrize("alpha", FACTORS)
def test_every_value_comes_back(alpha, bits):
    (factor,), _ = factors([torch.tensor(alpha)])
    # Of the range, what the product does not leave it with.
    in_range = abs(alpha) <= 1 or not abs(alpha) < LARGEST
    u = integers(2**24 if in_range else int(2**24 / abs(alpha)) - 1).float() * 2.0**-bits
    product, record = multiply(u, factor, bits)
    assert torch.equal(product, decay(u, alpha, bits)) or not abs(alpha) < float("inf")
    back = divide(product, factor, record, bits)
    assert torch.equal(back, u)
    assert not (torch.signbit(back) & (back == 0)).any()


@pytest.mark.parametrize(
    ("alpha", "bits_each"), [(1.0, 0), (-1.5, 0), (0.5, 1), (-0.99, 1), (0.4, 8 / 5), (0.01, 8)]
)
def test_what_is_stored(alpha, bits_each):
    (factor,), _ = factors([torch.tensor([alpha])])
    _, record = multiply(torch.zeros(8000), factor, 16)
    assert 8 * sum(piece.nbytes for piece in record) == pytest.approx(8000 * bits_each, rel=1e-2)


def test_a_factor_a_channel_and_layouts():
    torch.manual_seed(0)
    alpha = torch.tensor([0.5, -0.7, 1e-9, 1.3, 0.0, 0.1]).view(1, 6, 1, 1)
    (factor,), _ = factors([alpha])
    assert factor.radix == 10 and factor.stores.flatten().tolist() == [0, 0, 1, 0, 1, 0]
    u = torch.randint(-(2**20), 2**20, (2, 6, 5, 3)).float() * 2.0**-16
    for layout in (torch.contiguous_format, torch.channels_last):
        laid_out = u.to(memory_format=layout)
        product, record = multiply(laid_out, factor, 16)
        assert torch.equal(divide(product, factor, record, 16), u)
        assert torch.equal(product, decay(u, alpha, 16))


def test_no_elements_and_no_factors():
    (factor,), _ = factors([torch.tensor([0.3])])
    product, record = multiply(torch.zeros(0, 4), factor, 16)
    assert divide(product, factor, record, 16).shape == (0, 4)
    assert factors([]) == ([], None)


@pytest.mark.parametrize("radix", [1, 2, 3, 5, 6, 7, 16, 17, 255, 256])
@pytest.mark.parametrize("count", [0, 1, 8, 1001])
def test_digits(radix, count):
    torch.manual_seed(radix)
    digits = torch.randint(radix, (count,))
    record = pack_digits(digits.double(), radix)
    assert record.dtype is torch.uint8 and len(record) <= max(count, 1)
    assert torch.equal(unpack_digits(record, radix, count).long(), digits)
