"""Steps on the grid under Triton's interpreter: there and back to the bit as the specification."""

import math
import random

import numpy as np
import pytest
import snntorch
import torch
from spikingjelly.activation_based import surrogate
from triton.runtime import interpreter

from interpreted import libdevice
from snn_reversible_plugin.grid import decays
from snn_reversible_plugin.grid.step import (
    Record,
    Undo,
    on_triton,
    reference,
    triton_gradient_kernels,
)
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule, fire_reset_vjp
from snn_reversible_plugin.neurons.on_grid.remainders import Remainders
from snn_reversible_plugin.ops import devices
from snn_reversible_plugin.snntorch.surrogates import known_surrogate
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd

SCALE = 2.0**16
RESETS = [decays.NONE, decays.SUBTRACT, decays.BEFORE, decays.AFTER]
BETAS = [1.0, 1 - 2.0**-24, 0.9, 0.5 + 2.0**-24, 0.5, 1 / 3, 1 / 300, 2.0**-16]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def record_of(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)


def on_grid(n: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(n).mul_(SCALE * size).round_().div_(SCALE).add_(0.0)


def step_of(beta, reset: str, theta, gain: float | None = None) -> decays.Step:
    low, high = (beta, beta) if isinstance(beta, float) else (float(end) for end in torch.aminmax(beta))
    return decays.Step(decays.decay_of(beta, low, high, "lif"), theta * SCALE, reset, SCALE, gain)


def check(step: decays.Step, u: torch.Tensor, current: torch.Tensor, threshold) -> None:
    """The step, recorded and not, and back."""
    spikes, ours, expected = (torch.empty_like(u) for _ in range(3))
    bits = reference.fire(u, threshold, False, expected)
    assert torch.equal(on_triton.fire(u, threshold, False, spikes), bits)
    assert torch.equal(spikes, expected)
    on_triton.fired(bits, ours)
    assert torch.equal(ours, spikes)

    out, fired, their_out, their_fired = (torch.empty_like(u) for _ in range(4))
    pieces, reach, new = on_triton.charge(u, current, bits, step, Record(), out, (threshold, False, fired))
    _, their_reach, their_new = reference.charge(
        u, current, bits, step, Record(), their_out, (threshold, False, their_fired)
    )
    assert same_bits(out, their_out) and torch.equal(fired, their_fired) and torch.equal(new, their_new)
    assert reach == their_reach
    assert same_bits(on_triton.undo(out, current, bits, step, record_of(pieces)), u)

    again = torch.empty_like(u)
    nothing, same_reach, none = on_triton.charge(u, current, bits, step, None, again)
    assert nothing == [] and none is None and same_reach == reach and same_bits(again, out)
    whole = step.reset in (decays.BEFORE, decays.AFTER)
    digit_bits = math.ceil(math.log2(step.decay.radix))
    assert len(record_of(pieces)) == (3 * len(u) if whole else (len(u) * digit_bits + 7) // 8)

    gated = torch.empty_like(u)
    on_triton.gate(current, threshold, bits, gated)
    assert same_bits(gated, current * threshold * (1 - spikes))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("beta", BETAS)
def test_units_of_every_kind_are_rounded_and_rebuilt(beta, reset):
    beta = float(torch.tensor(beta))
    bound = 2**24 - 1
    halves = ((torch.randint(-1000, 1000, (60,)) + 0.5) / beta).round().long()
    ends = torch.tensor([bound, -bound, bound - 1, 1 - bound, 0, 1, -1])
    anywhere = torch.randint(-bound, bound + 1, (300,))
    units = torch.cat((anywhere, halves, halves + 1, halves - 1, ends)).clamp(-bound, bound)
    u = units.double().div(SCALE).float()
    check(step_of(beta, reset, 0.75, 0.3), u, torch.zeros_like(u), 0.75)


def preimages_at_a_boundary(e: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays p / 2^e, and the lowest units that become values whose quotient by p is next to an integer."""
    betas, units = [], []
    for seed in range(n):
        generator = random.Random(seed)
        p = 2 * generator.randrange(2**22, 2**23) + 1
        rest = generator.choice([-2, -1, 0, 1, 2])
        v = (rest + 2 ** (e - 1)) * pow(2, -e, p) % p - generator.choice([0, p])
        wanted = v * 2**e - 2 ** (e - 1)
        lowest = -(-wanted // p)
        if abs(lowest) < 2**24:
            betas.append(p / 2**e)
            units.append(lowest)
    return torch.tensor(betas), torch.tensor(units).double().div(SCALE).float()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("units_off", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("e", [24, 26])
def test_quotients_next_to_an_integer(monkeypatch, e, units_off):
    """On a GPU a division may be off by two units in the last place."""

    def divide(builder, left, right):
        quotient = left.data / right.data
        moved = (quotient.view(np.int32) + np.int32(units_off)).view(np.float32)
        return interpreter.TensorHandle(np.where(quotient == 0, quotient, moved), left.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fdiv", divide)
    betas, lowest = preimages_at_a_boundary(e, 4000)
    assert len(lowest) > 400
    for units in (0, 1, -1):
        u = lowest + units / SCALE
        check(step_of(betas, decays.NONE, 0.75), u, torch.zeros_like(u), 0.75)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("n", [0, 1, 8, 401, 1031])
def test_sizes(n, reset):
    check(step_of(float(torch.tensor(0.9)), reset, 0.5), on_grid(n), torch.randn(n), 0.5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("smallest", [0.6, 0.4, 0.01])
def test_a_beta_and_a_threshold_for_each_neuron(smallest, reset):
    n = 401
    betas = torch.rand(n).mul_(1 - smallest).add_(smallest).clamp_(smallest, 1)
    theta = on_grid(n).abs()
    check(step_of(betas, reset, theta), on_grid(n, 4.0), torch.randn(n), theta)
    one = step_of(betas[:1], reset, torch.tensor(0.75))
    check(one, on_grid(n, 4.0), torch.randn(n), torch.tensor(0.75))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("to", [None, 0.0, -0.25, 1.5])
@pytest.mark.parametrize(("n", "size", "each"), [(0, 1.0, False), (1, 1.0, False), (333, 40.0, True)])
def test_resets_at_once_by_themselves_and_with_their_charge(n, size, each, to):
    u, current = on_grid(n, size), torch.randn(n)
    theta = on_grid(n).abs() if each else 0.5
    step = step_of(float(torch.tensor(0.8)), decays.NONE, theta)
    h, s, after = (torch.empty_like(u) for _ in range(3))
    _, reach, bits = reference.charge(u, current, None, step, Record(), h, (theta, True, s))
    _, reach_after = reference.reset(h, s, step.theta, to, SCALE, True, after)

    found = torch.empty_like(u)
    planes, its_reach = on_triton.reset(h, s, step.theta, to, SCALE, True, found)
    assert same_bits(found, after) and its_reach == reach_after
    assert len(record_of(planes)) == (0 if to is None else 3 * n)
    assert same_bits(on_triton.unreset(after, bits, step.theta, to, SCALE, record_of(planes)), h)
    assert on_triton.reset(h, s, step.theta, to, SCALE, False, found)[0] == []

    for wanted in (torch.empty_like(u), None):
        fired, found = torch.empty_like(u), torch.empty_like(u)
        lost, overshoots, both, its_bits = on_triton.charge_and_reset(
            u, current, step, to, Record(), (wanted, found), (theta, True, fired)
        )
        assert wanted is None or same_bits(wanted, h)
        assert same_bits(found, after) and torch.equal(fired, s) and torch.equal(its_bits, bits)
        assert both == max(reach, reach_after)
        charged, before = on_triton.undo_charge_and_reset(
            after, current, bits, step, to, (record_of(lost), record_of(overshoots))
        )
        assert same_bits(charged, h) and same_bits(before, u)


@pytest.mark.parametrize("to", [None, 0.0, -0.25, 1.5])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_gradients_through_a_reset(threshold, to):
    for n in (0, 1, 1031):
        h = torch.randn(n).mul_(4).round_().div_(4)  # some at the threshold
        g_v, g_s = torch.randn(n), torch.randn(n)
        for call in (
            lambda form, out: form.add_past_reset(h, threshold, g_v, out),  # noqa: B023
            lambda form, out: form.add_through_reset(h, threshold, to, g_v, out),  # noqa: B023
        ):
            ours, theirs = g_s.clone(), g_s.clone()
            call(on_triton, ours)
            call(reference, theirs)
            assert same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter says so of inf - inf
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 256.0, 2.0**20])
def test_a_reach_sees_what_left_the_range(value):
    step = step_of(1.0, decays.NONE, 1.0)
    far = torch.zeros(1000)
    far[997] = value
    out = torch.empty(1000)
    for u, current in ((torch.zeros(1000), far), (far, torch.zeros(1000))):
        _, reach, _ = on_triton.charge(u, current, None, step, Record(), out)
        assert not reach < 256
    # What a charge brings back into the range was lost before it.
    _, reach, _ = on_triton.charge(far, -far, None, step, Record(), out)
    assert value == 256.0 or not reach < 256
    _, reach = on_triton.reset(far, torch.zeros(1000), 1.0, None, SCALE, True, out)
    assert not reach < 256


@pytest.mark.parametrize("beta", [0.45, 0.0, -0.5, 1.5, float("nan"), 2.0**-17])
def test_what_a_record_has_no_room_for_is_not_lost_in_silence(beta):
    step = step_of(0.75, decays.NONE, 1.0)
    learned = decays.Decay(torch.tensor(beta), None, None, None, step.decay.radix, False)
    u, out = on_grid(1000), torch.empty(1000)
    _, reach, _ = on_triton.charge(
        u, torch.zeros(1000), None, decays.Step(learned, 1.0, decays.NONE, SCALE), Record(), out
    )
    assert reach.isnan()


def test_an_overshoot_that_takes_more_than_its_planes_is_not_lost_in_silence():
    theta, h = -200.0, torch.full((9,), 100.0)
    step = step_of(0.75, decays.AFTER, theta)
    bits = reference.fire(h, theta, False, torch.empty(9))
    for lost in (
        on_triton.charge(h, torch.zeros(9), bits, step, Record(), torch.empty(9))[1],
        on_triton.reset(h, torch.ones(9), theta * SCALE, 0.0, SCALE, True, torch.empty(9))[1],
    ):
        assert lost.isnan()


def test_a_reach_goes_on_from_step_to_step():
    step = step_of(1.0, decays.NONE, 1.0)
    zeros, out, reach = torch.zeros(40), torch.empty(40), None
    for far in (3.0, 200.0, 7.0):
        _, reach, _ = on_triton.charge(zeros, zeros + far, None, step, Record(reach), out)
    assert reach == 200.0
    _, _, same, _ = on_triton.charge_and_reset(
        zeros, zeros + 250.0, step, 0.0, Record(reach), (None, out), (1.0, True, torch.empty(40))
    )
    assert same is reach and reach == 250.0


def test_what_a_step_wrote_down_is_one_stretch_of_memory():
    step, u = step_of(0.9, decays.NONE, 0.5), on_grid(41)
    devices.HOSTS, hosts = frozenset(), devices.HOSTS
    try:
        store = Remainders(u)
        lost, overshoot, _, bits = on_triton.charge_and_reset(
            u, torch.randn(41), step, 0.0, Record(), (None, torch.empty(41)), (0.5, True, torch.empty(41))
        )
        store.append(lost)
        store.append([bits, *overshoot])
        store.append([bits, *lost])
    finally:
        devices.HOSTS = hosts
    records = [torch.as_tensor(store.record(index)) for index in range(3)]
    assert records[1].data_ptr() == bits.data_ptr() and len(records[1]) == 6 + 3 * 41
    assert torch.equal(records[1], torch.cat((bits, *overshoot)))
    assert torch.equal(records[2], torch.cat((bits, *lost)))


KNOWN = [
    as_autograd(getattr(surrogate, name)(alpha=alpha))
    for name, alpha in (
        ("ATan", 2.3),
        ("ATan", 1.0),
        ("PiecewiseQuadratic", 1.3),
        ("SoftSign", 2.0),
        ("SuperSpike", 1.7),
        ("Sigmoid", 4.0),
        ("PiecewiseExp", 1.3),
        ("Erf", 2.1),
    )
] + [
    known_surrogate(getattr(snntorch.surrogate, name)(value))
    for name, value in (("atan", 2.0), ("fast_sigmoid", 25), ("sigmoid", 2.5))
]


@pytest.fixture(autouse=True)
def of_a_device(monkeypatch):
    """Its library; and the sigmoid as torch has it on CUDA, where a CPU's takes another exponential."""
    monkeypatch.setattr(triton_gradient_kernels, "libdevice", libdevice)
    monkeypatch.setattr(torch.Tensor, "sigmoid_", lambda x: x.copy_((1 + (-x).exp()).reciprocal()))


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_surrogates(known):
    write = on_triton.in_one_pass(known.name, dict(known.parameters))
    even = 1024 + 64  # an exponential's bits may be others where a vector of torch's ends
    odd = 1031 if known.uniform else even
    for n, theta in ((0, 1.0), (odd, 0.5), (even, torch.tensor(0.7)), (even, torch.rand(even))):
        # Far out a derivative is a denormal number, and then zero.
        h, g, out = torch.randn(n).mul_(torch.rand(n) * 40), torch.randn(n), torch.empty(n)
        write(h, theta, g, out)
        assert same_bits(out, known.vjp(g, h - theta))
    assert on_triton.in_one_pass("a formula that nobody knows", {"alpha": 4.0}) is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("to", [None, 0.0, -0.25])
def test_gradients_of_a_step(to, detach):
    """As the specification has them, of spikes, of the membrane, and of both."""
    rule = Rule(None, False, 0.5, to, detach)
    for number, known in enumerate(one for one in KNOWN if not one.strict):
        n = 1031 if known.uniform else 1024 + 64
        h = torch.randn(n).mul_(4).round_().div_(4)  # some at the threshold
        beta = torch.tensor(0.7) if number % 2 else 0.7
        gain = None if number % 2 else 0.3
        everywhere = torch.randn(1)
        for g_s, g_v in (
            (torch.randn(n), torch.randn(n)), (torch.randn(n), None), (None, torch.randn(n)),
            (everywhere, torch.randn(n)), (everywhere, None),
        ):  # fmt: skip
            wide = None if g_s is None else g_s.expand(n)
            g = fire_reset_vjp(h, wide, g_v, rule, known)
            by_v, by_x = torch.empty(n), torch.empty(n)
            on_triton.gradient(h, (g_s, g_v), rule, known, (beta, gain), (by_v, by_x))
            assert same_bits(by_x, g if gain is None else g * gain), known.name
            assert same_bits(by_v, g * beta), known.name
            on_triton.gradient(h, (g_s, g_v), rule, known, (beta, gain), (None, by_v))
            assert same_bits(by_v, by_x)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("beta", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("to", [None, 0.0, -0.25])
def test_a_step_is_undone_with_its_gradients(to, beta):
    """As by itself: the membrane before, and the gradients at the charged one."""
    known = KNOWN[0]
    for n, learned in ((1, False), (333, True)):
        rule, single = Rule(None, False, 0.5, to, n == 1), float(torch.tensor(beta))
        factor = torch.tensor([single]) if learned else single
        gain = 0.3 if learned else None
        step = decays.Step(
            decays.decay_of(factor, single, single, "lif"), 0.5 * SCALE, decays.NONE, SCALE, gain
        )
        u, current, h, after, s = on_grid(n, 2.0), torch.randn(n), *(torch.empty(n) for _ in range(3))
        lost, overshoot, _, bits = on_triton.charge_and_reset(
            u, current, step, to, Record(), (h, after), (0.5, True, s)
        )
        given, wanted = (torch.randn(n), torch.randn(n)), (torch.empty(n), torch.empty(n))
        on_triton.gradient(h, given, rule, known, (factor, gain), wanted)
        for x in (current, None):
            before = None if x is None else torch.empty(n)
            undo = Undo(step, bits, record_of(overshoot), record_of(lost), x, before)
            made = torch.empty(n), torch.empty(n)
            on_triton.gradient(after, given, rule, known, (factor, gain), made, undo)
            assert all(map(same_bits, made, wanted))
            assert before is None or same_bits(before, u)
