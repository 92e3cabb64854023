"""The grid: exact to undo, idempotent, transparent to gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin import grid

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FINITE = st.floats(-1e4, 1e4, width=32, allow_nan=False)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    words = torch.int64 if a.dtype is torch.float64 else torch.int32
    return a.dtype is b.dtype and torch.equal(a.view(words), b.view(words))


def stream(seed: int, share: float, bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random multiples of 2^-bits that fill a share of the range."""
    bound = int(share * (2 ** (53 if dtype is torch.float64 else 24) - 1))
    numbers = torch.randint(-bound, bound + 1, (257,), generator=torch.Generator().manual_seed(seed))
    return numbers.to(torch.float64).mul(2.0**-bits).to(dtype)


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(0, 23),
    exponent=st.integers(-30, 12),
    dtype=st.sampled_from(DTYPES),
)
def test_a_sum_on_the_grid_is_undone_bit_for_bit(seed, bits, exponent, dtype):
    x = stream(seed, 0.5, bits, grid.stream_dtype(dtype))
    generator = torch.Generator().manual_seed(seed + 1)
    branch = (torch.randn(257, generator=generator, dtype=torch.float64) * 2.0**exponent).to(dtype)
    s = grid.snap(branch, bits)
    y = x + s
    inside = y.abs() < grid.limit(bits, y.dtype)
    assert s.dtype is x.dtype
    assert same_bits((y - s)[inside], x[inside])
    assert torch.equal(grid.reach(y) < grid.limit(bits, y.dtype), inside.all())


@settings(deadline=None, max_examples=100)
@given(value=FINITE, bits=st.integers(0, 23), dtype=st.sampled_from(DTYPES))
def test_snap_is_idempotent_nearest_and_has_no_negative_zero(value, bits, dtype):
    z = torch.tensor([value, -value, 0.0, -0.0], dtype=dtype)
    once = grid.snap(z, bits)
    assert same_bits(grid.snap(once, bits), once)
    assert ((once.double() - z.double()).abs() <= 2.0 ** -(bits + 1)).all()
    assert not torch.signbit(once[once == 0]).any()


@settings(deadline=None, max_examples=50)
@given(value=FINITE, bits=st.integers(0, 23), dtype=st.sampled_from(DTYPES))
def test_the_gradient_passes_straight_through(value, bits, dtype):
    z = torch.full((3,), value, dtype=dtype, requires_grad=True)
    g = torch.randn(3).to(grid.stream_dtype(dtype))
    grid.snap(z, bits).backward(g)
    assert z.grad.dtype is dtype and torch.equal(z.grad, g.to(dtype))


def test_a_hundred_thousand_sums_are_undone():
    x = start = stream(0, 1e-3, 16)
    branches = [grid.snap(torch.randn(257) * 0.01) for _ in range(1000)]
    for s in branches:
        x = x + s
    for s in reversed(branches):
        x = x - s
    assert same_bits(x, start)


@pytest.mark.parametrize("value", [256.0, -256.0, float("inf"), -float("inf"), float("nan"), 1e30])
def test_leaving_the_range_names_stream_value_and_remedy(value):
    reaches = [grid.reach(torch.tensor([1.0, -2.0])), grid.reach(torch.tensor([0.0, value]))]
    with pytest.raises(OverflowError, match=r"block 1: x2 reaches .*bits=16.*fewer bits"):
        grid.check_range(["block 0: x1", "block 1: x2"], reaches, 16)


def test_the_last_value_in_range_passes_and_so_does_an_empty_stream():
    inside = torch.tensor([2.0**8 - 2.0**-16, 0.0])
    grid.check_range(["a", "b"], [grid.reach(inside), grid.reach(torch.empty(0, 3))], 16)
    grid.check_range([], [], 16)


@pytest.mark.parametrize("bits", [-1, 24, 1.5, True, None])
def test_bits_that_do_not_fit_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be"):
        grid.snap(torch.zeros(2), bits)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        grid.snap(torch.zeros(2, dtype=torch.int64))


def test_snap_leaves_its_argument_alone_and_keeps_the_layout():
    z = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    before = z.clone()
    assert grid.snap(z).stride() == z.stride()
    assert torch.equal(z, before)
