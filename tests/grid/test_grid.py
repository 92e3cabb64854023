"""The grid: exact to undo, idempotent, transparent to gradients."""

import gc
import math
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin import grid
from snn_reversible_plugin.grid import decays
from snn_reversible_plugin.grid.range import check_step
from snn_reversible_plugin.grid.step import Record
from snn_reversible_plugin.grid.step import reference as steps_torch
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule, fire_reset_vjp
from snn_reversible_plugin.neurons.on_grid.remainders import Remainders
from snn_reversible_plugin.neurons.surrogates import in_one_pass
from snn_reversible_plugin.ops import forms

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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (256.0, r"reaches 256, .*bits=16.*below 256 .*fewer bits"),
        (-256.0, r"reaches 256, .*bits=16.*below 256 .*fewer bits"),
        (1e30, r"reaches 1e\+30, .*bits=16.*below 256 .*fewer bits"),
        (math.inf, r"is infinite, .*torch\.isinf"),
        (-math.inf, r"is infinite, .*torch\.isinf"),
        (math.nan, r"holds NaN, .*torch\.isnan"),
    ],
)
def test_leaving_the_range_names_stream_value_and_remedy(value, said):
    reaches = [grid.reach(torch.tensor([1.0, -2.0])), grid.reach(torch.tensor([0.0, value]))]
    with pytest.raises(OverflowError, match=f"block 1: x2 {said}"):
        grid.check_range(["block 0: x1", "block 1: x2"], reaches, 16)
    with pytest.raises(OverflowError, match=f"block 1: x2 {said}"):
        grid.watch("block 1: x2", reaches[1], 16)  # no backward runs
    for number in (float(reaches[1]), reaches[1]):
        with pytest.raises(OverflowError, match=f"lif {said.replace('fewer bits', 'lower them')}"):
            check_step(number, "lif", 16, "lower them")


class Watching(torch.autograd.Function):
    """Hands in a reach in its backward, and does there what it is told."""

    @staticmethod
    def forward(ctx, x, name, value, then):
        ctx.call = name, value, then
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        name, value, then = ctx.call
        grid.watch(name, torch.tensor(value), 16)
        return g if then is None else then(g), None, None, None


def _watching(*calls):
    x = torch.zeros(2, requires_grad=True)
    y = x
    for call in reversed(calls):  # the first is the backward's first
        y = Watching.apply(y, *call)
    return x, y.sum()


def test_a_backward_is_looked_at_once_when_it_is_over(monkeypatch):
    looks = []
    check = grid.range._check
    monkeypatch.setattr(grid.range, "_check", lambda found: (looks.append(len(found)), check(found)))
    x, loss = _watching(("a", 1.0, None), ("b", 2.0, None))
    loss.backward()
    assert looks == [2] and torch.equal(x.grad, torch.ones(2))
    x, loss = _watching(("a", 1.0, None), ("b", 300.0, None), ("c", math.nan, None))
    with pytest.raises(OverflowError, match="b reaches 300"):
        loss.backward()
    assert looks == [2, 3] and torch.equal(x.grad, torch.ones(2))  # all of it ran


def test_a_backward_inside_a_backward_has_its_own_look():
    def inner(g):
        with torch.enable_grad():
            _, loss = _watching(("inner", 300.0, None))
        with pytest.raises(OverflowError, match="inner reaches 300"):
            loss.backward()
        return g

    _, loss = _watching(("outer", 1.0, inner), ("outer", 2.0, None))
    loss.backward()
    _, loss = _watching(("outer", 1.0, inner), ("outer", 400.0, None))
    with pytest.raises(OverflowError, match="outer reaches 400"):
        loss.backward()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_backward_that_broke_off_leaves_no_reach_behind(error):
    def broken(_g):
        raise error

    for _ in range(3):
        _, loss = _watching(("before", 300.0, None), ("broken", 1.0, broken))
        with pytest.raises(error):
            loss.backward()
        del loss
    gc.collect()
    assert not list(grid.range._looks.values())
    _, loss = _watching(("after", 1.0, None))
    loss.backward()
    assert not list(grid.range._looks.values())


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


# Decay.

BETAS = st.one_of(
    st.floats(2.0**-16, 1.0, width=32, exclude_min=True),
    st.sampled_from([1.0, 0.5, 0.25, 0.75, 0.9, 0.99, 1 / 3, 1 - 2.0**-24, 0.5 + 2.0**-24]),
).map(lambda beta: float(torch.tensor(beta)))


def units_around(beta: float, seed: int) -> torch.Tensor:
    """Integers below 2^24: small ones, large ones, and such whose product with beta is close to a half."""
    generator = torch.Generator().manual_seed(seed)
    bound = 2**24 - 1
    anywhere = torch.randint(-bound, bound + 1, (300,), generator=generator)
    halves = ((torch.randint(-1000, 1000, (100,), generator=generator) + 0.5) / beta).round().long()
    near = [*halves.unbind(), *(halves + 1).unbind(), *(halves - 1).unbind()]
    ends = torch.tensor([bound, -bound, bound - 1, 0, 1, -1])
    return torch.cat([anywhere, torch.stack(near), torch.arange(-50, 50), ends]).clamp(-bound, bound)


@settings(deadline=None, max_examples=150)
@given(beta=BETAS, seed=st.integers(0, 2**31), bits=st.integers(0, 23))
def test_decay_is_rounding_and_undecay_undoes_it_bit_for_bit(beta, seed, bits):
    units = units_around(beta, seed)
    u = units.double().mul(2.0**-bits).float()
    v = grid.decay(u, beta, bits)
    exact = [(Fraction(beta) * int(unit) + Fraction(1, 2)).__floor__() for unit in units[::7]]
    assert [int(one) for one in v.double()[::7] * 2.0**bits] == exact
    digits = grid.remainder(u, beta, bits)
    assert digits.min() >= 0 and digits.max() < math.ceil(1 / beta)
    assert same_bits(grid.undecay(v, digits, beta, bits), u + 0.0)


# The specification first.
FORMS = {form.__name__.rpartition(".")[2]: form for form in [*forms.forms_of(forms.GRID_STEP, "cpu")][::-1]}
RESETS = [decays.NONE, decays.SUBTRACT, decays.BEFORE, decays.AFTER]


def on_grid(generator: torch.Generator, n: int, scale: float = 2.0**16) -> torch.Tensor:
    # A sum on the grid is never -0, so no state that is rebuilt is.
    return torch.randn(n, generator=generator).mul_(scale).round_().div_(scale).add_(0.0)


def as_record(form: Any, pieces: list[Any]) -> Any:
    store = Remainders(torch.empty(0))
    store.append([torch.as_tensor(piece) for piece in pieces])
    record = store.record(0)
    return torch.tensor(record.tolist(), dtype=torch.uint8) if form is steps_torch else record


def assert_forms_agree(step: decays.Step, u: torch.Tensor, current: torch.Tensor, threshold: Any) -> None:
    """All forms take the step to the same bits, and back to where it came from."""
    expected, longest = None, 0
    for name, form in FORMS.items():
        spikes, out = torch.empty_like(u), torch.empty_like(u)
        bits = form.fire(u, threshold, False, spikes)
        assert torch.equal(spikes, (u > threshold).float()), name
        again = torch.empty_like(u)
        form.fired(bits, again)
        assert torch.equal(again, spikes), name
        fired = torch.empty_like(u)
        pieces, reach, new = form.charge(u, current, bits, step, Record(), out, (threshold, False, fired))
        unrecorded, same_reach, none = form.charge(u, current, bits, step, None, torch.empty_like(u))
        assert none is None, name
        again = torch.empty_like(u)
        assert torch.equal(torch.as_tensor(new), torch.as_tensor(form.fire(out, threshold, False, again)))
        assert torch.equal(fired, again), name
        assert sum(map(len, unrecorded)) == 0, name
        assert float(reach) == float(same_reach) == float(grid.reach(out)), name
        record = as_record(form, pieces)
        assert same_bits(form.undo(out, current, bits, step, record), u), name
        gated = torch.empty_like(u)
        form.gate(current, threshold, bits, gated)
        assert same_bits(gated, current * threshold * (1 - spikes)), name
        if expected is None:
            expected, longest = out, len(record)
        assert same_bits(out, expected), name
        assert step.reset in (decays.BEFORE, decays.AFTER) or len(record) <= longest, name


@settings(deadline=None, max_examples=75)
@given(
    beta=BETAS,
    seed=st.integers(0, 2**31),
    n=st.sampled_from([0, 1, 7, 8, 401, 2000]),
    reset=st.sampled_from(RESETS),
    theta=st.floats(0.0, 4.0, width=32),
    gain=st.sampled_from([None, 0.3]),
)
def test_steps_of_all_forms_agree_and_are_undone(beta, seed, n, reset, theta, gain):
    generator = torch.Generator().manual_seed(seed)
    theta = round(theta * 2.0**16) / 2.0**16
    step = decays.Step(decays.decay_of(beta, beta, beta, "lif"), theta * 2.0**16, reset, 2.0**16, gain)
    u, current = on_grid(generator, n), torch.randn(n, generator=generator)
    assert_forms_agree(step, u, current, theta)


@settings(deadline=None, max_examples=100)
@given(
    smallest=st.sampled_from([2.0**-16, 1 / 300, 0.1, 0.4, 0.5, 0.6, 0.99]),
    seed=st.integers(0, 2**31),
    n=st.sampled_from([1, 13, 401, 2000]),
    reset=st.sampled_from(RESETS),
    each_decays=st.booleans(),
    each_fires=st.booleans(),
)
def test_a_beta_and_a_threshold_for_each_neuron(smallest, seed, n, reset, each_decays, each_fires):
    generator = torch.Generator().manual_seed(seed)
    betas = torch.rand(n, generator=generator).mul_(1 - smallest).add_(smallest).clamp_(smallest, 1)
    beta = betas.double() if each_decays else float(betas[0])
    low, high = (float(end) for end in torch.aminmax(betas)) if each_decays else (beta, beta)
    theta = on_grid(generator, n).abs() if each_fires else 0.75
    step = decays.Step(decays.decay_of(beta, low, high, "lif"), theta * 2.0**16, reset, 2.0**16)
    u, current = on_grid(generator, n) * 4, torch.randn(n, generator=generator)
    assert_forms_agree(step, u, current, theta)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([0, 1, 13, 2000]),
    to=st.sampled_from([None, 0.0, -0.25, 1.5]),
    size=st.sampled_from([1.0, 40.0, 255.0]),
    each=st.booleans(),
)
def test_resets_of_all_forms_agree_and_are_undone(seed, n, to, size, each):
    generator = torch.Generator().manual_seed(seed)
    h = on_grid(generator, n).clamp(-1, 1) * size
    theta = on_grid(generator, n).abs() if each else 0.5
    expected = None
    for name, form in FORMS.items():
        spikes, out = torch.empty_like(h), torch.empty_like(h)
        bits = form.fire(h, theta, True, spikes)
        assert torch.equal(spikes, (h >= theta).float()), name
        pieces, reach = form.reset(h, spikes, theta * 2.0**16, to, 2.0**16, True, out)
        assert form.reset(h, spikes, theta * 2.0**16, to, 2.0**16, False, torch.empty_like(h))[0] == []
        assert float(reach) == float(grid.reach(out)), name
        record = as_record(form, pieces)
        assert same_bits(form.unreset(out, bits, theta * 2.0**16, to, 2.0**16, record), h), name
        expected = out if expected is None else expected
        assert same_bits(out, expected), name


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([0, 1, 13, 2000]),
    to=st.sampled_from([None, 0.0, -0.25, 1.5]),
    threshold=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_gradients_through_a_reset_agree_in_all_forms(seed, n, to, threshold):
    generator = torch.Generator().manual_seed(seed)
    h = on_grid(generator, n, scale=4.0)  # some at the threshold
    g_v, g_s = (torch.randn(n, generator=generator) for _ in range(2))
    past = g_s + g_v * (1.0 - (h >= threshold).float())
    through = g_s + -g_v * threshold if to is None else g_s + -(g_v * h) + g_v * to
    for name, form in FORMS.items():
        out = g_s.clone()
        form.add_past_reset(h, threshold, g_v, out)
        assert same_bits(out, past), name
        out = g_s.clone()
        form.add_through_reset(h, threshold, to, g_v, out)
        assert same_bits(out, through), name


AT_ONCE = {name: form for name, form in FORMS.items() if hasattr(form, "charge_and_reset")}


@pytest.mark.parametrize("form", AT_ONCE.values(), ids=AT_ONCE)
@settings(deadline=None, max_examples=60)
@given(
    beta=BETAS,
    seed=st.integers(0, 2**31),
    n=st.sampled_from([0, 1, 13, 2000]),
    to=st.sampled_from([None, 0.0, -0.25, 1.5]),
    gain=st.sampled_from([None, 0.3]),
    inclusive=st.booleans(),
)
def test_a_step_in_one_call_is_a_charge_and_a_reset(form, beta, seed, n, to, gain, inclusive):
    generator = torch.Generator().manual_seed(seed)
    step = decays.Step(decays.decay_of(beta, beta, beta, "lif"), 0.5 * 2.0**16, decays.NONE, 2.0**16, gain)
    u, current = on_grid(generator, n), on_grid(generator, n, scale=4.0)  # some at the threshold
    h, spikes, after, *again = (torch.empty(n) for _ in range(6))
    _, charged, bits = steps_torch.charge(u, current, None, step, Record(), h, (0.5, inclusive, spikes))
    _, reset = steps_torch.reset(h, spikes, step.theta, to, step.scale, True, after)
    for record in (Record(), None):
        made = form.charge_and_reset(u, current, step, to, record, again[:2], (0.5, inclusive, again[2]))
        lost, overshot, reach, ours = made
        assert all(map(same_bits, again, (h, after, spikes)))
        assert torch.equal(torch.as_tensor(ours), bits)
        assert float(reach) == max(float(charged), float(reset))
    assert not lost and not overshot
    made = form.charge_and_reset(u, current, step, to, Record(), again[:2], (0.5, inclusive, spikes))
    lost, overshot, *_ = made
    records = as_record(form, lost), as_record(form, overshot)
    back = form.undo_charge_and_reset(after, current, ours, step, to, records)
    assert all(map(same_bits, back, (h, u)))


@pytest.mark.parametrize("form", AT_ONCE.values(), ids=AT_ONCE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 256.0])
def test_its_reach_sees_what_left_the_range(form, value):
    step = decays.Step(decays.decay_of(1.0, 1.0, 1.0, "lif"), 1.0, decays.NONE, 2.0**16)
    current = torch.zeros(1000)
    current[997] = value
    for to in (None, 0.0):  # with the second, what left is back in range after the reset
        made = [torch.empty(1000) for _ in range(3)]
        *_, reach, _ = form.charge_and_reset(
            torch.zeros(1000), current, step, to, Record(), made[:2], (1.0, True, made[2])
        )
        assert not reach < 256


@pytest.mark.parametrize("form", AT_ONCE.values(), ids=AT_ONCE)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("to", [None, 0.0, -0.25])
@pytest.mark.parametrize("beta", [0.7, torch.tensor(0.7)])
@pytest.mark.parametrize("gain", [None, 0.3])
def test_gradients_of_a_step_in_one_call(form, to, detach, beta, gain):
    """As the specification has them, of spikes, of the membrane, and of both."""
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    from snn_reversible_plugin.spikingjelly.surrogates import as_autograd

    rule, n, known = Rule(None, False, 0.5, to, detach), 1031, as_autograd(surrogate.ATan(alpha=2.3))
    assert in_one_pass(known, torch.device("cpu")) is not None
    h, everywhere = torch.randn(n).mul_(4).round_().div_(4), torch.randn(1)  # some at the threshold
    one, other = torch.randn(2, n)
    one[:200], one[:100], other[150:300] = -0.0, 0.0, -0.0  # zeros have signs
    for g_s, g_v in (
        (one, other), (other, one), (one, None), (None, one), (everywhere, other), (everywhere, None),
        (None, everywhere),
    ):  # fmt: skip
        wide = [None if one is None else one.expand(n) for one in (g_s, g_v)]
        g = fire_reset_vjp(h, *wide, rule, known)
        by_v, by_x = torch.empty(n), torch.empty(n)
        form.gradient(h, (g_s, g_v), rule, known, (beta, gain), (by_v, by_x))
        assert same_bits(by_x, g if gain is None else g * gain)
        assert same_bits(by_v, g * beta)
        form.gradient(h, (g_s, g_v), rule, known, (beta, gain), (None, by_v))
        assert same_bits(by_v, by_x)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 256.0])
def test_a_reach_sees_what_left_the_range(form, value):
    step = decays.Step(decays.decay_of(1.0, 1.0, 1.0, "lif"), 1.0, decays.NONE, 2.0**16)
    current = torch.zeros(1000)
    current[997] = value
    _, reach, _ = form.charge(torch.zeros(1000), current, None, step, Record(), torch.empty(1000))
    assert not reach < 256
    _, reach = form.reset(current, torch.zeros(1000), 1.0, None, 2.0**16, True, torch.empty(1000))
    assert not reach < 256


@pytest.mark.parametrize("form", [form for form in FORMS.values() if form is not steps_torch])
@pytest.mark.parametrize(("beta", "bits"), [(0.5, 1.0), (0.6, 0.81), (0.9, 0.21), (0.99, 0.03), (1.0, 0.0)])
def test_how_many_bits_a_step_loses(form, beta, bits):
    n = 1 << 17
    u = torch.randn(n).mul_(2.0**16).round_().div_(2.0**16)
    beta = float(torch.tensor(beta))
    step = decays.Step(decays.decay_of(beta, beta, beta, "lif"), 1.0, decays.NONE, 2.0**16)
    pieces, _, _ = form.charge(u, torch.zeros(n), None, step, Record(), torch.empty(n))
    assert 8 * sum(map(len, pieces)) / n <= bits
    rest, _, _ = form.charge(torch.zeros(n), torch.zeros(n), None, step, Record(), torch.empty(n))
    assert beta <= 0.5 or sum(map(len, rest)) == 0


@pytest.mark.parametrize("missing", [(), ("on_numba",), ("on_numba", "on_numpy")])
def test_the_fastest_form_that_is_installed_computes_steps(monkeypatch, missing):
    for name in missing:
        monkeypatch.setitem(sys.modules, f"snn_reversible_plugin.grid.step.{name}", None)
    left = [form for name, form in FORMS.items() if name not in missing]
    assert next(forms.forms_of(forms.GRID_STEP, "cpu")) is left[-1]
