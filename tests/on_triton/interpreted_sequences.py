"""Sequences under Triton's interpreter: to the bit what stock's own kernels make of the same numbers."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import triton

from snn_reversible_plugin.neurons.integrate_fire import on_triton
from snn_reversible_plugin.neurons.integrate_fire.reference import Rule

try:
    from spikingjelly._ops.if_ import triton as stock_if
    from spikingjelly._ops.lif import triton as stock_lif
    from spikingjelly._ops.plif import triton as stock_plif

    KERNELS = {
        name: (module._forward_kernel, module._backward_kernel)
        for name, module in (("if", stock_if), ("lif", stock_lif), ("plif", stock_plif))
    }
except (ImportError, AttributeError):
    pytest.skip("SpikingJelly 2.0 with its Triton kernels is not installed", allow_module_level=True)

NAMES = ["Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "SuperSpike", "Erf"]
TAU, Q, ALPHA, THRESHOLD, BLOCK = 1.7, 0.37, 2.3, 0.8, 256


class Case(NamedTuple):
    kind: str
    decay_input: bool
    v_reset: float | None
    detach_reset: bool
    surrogate: str

    @property
    def rule(self) -> Rule:
        tau = TAU if self.kind == "lif" else None
        return Rule(tau, self.decay_input, THRESHOLD, self.v_reset, self.detach_reset)

    @property
    def q(self) -> torch.Tensor | None:
        return torch.tensor(Q) if self.kind == "plif" else None

    def leak(self) -> tuple[Any, ...]:
        """What stock's kernels take of the leak, and then of the reset."""
        return {"if": (), "lif": (TAU,), "plif": (self.q,)}[self.kind]

    def constants(self, tail: tuple[Any, ...]) -> tuple[Any, ...]:
        return ((self.decay_input,) if self.kind != "if" else ()) + (self.v_reset is None, *tail)


CASES = [
    Case(*case)
    for case in itertools.product(
        ["if", "lif", "plif"], [False, True], [None, 0.0, -0.3], [False, True], NAMES
    )
    if case[0] != "if" or not case[1]
]
# [T, n], which membranes have a gradient, and the dtype of currents and of the spikes' gradients.
KINDS = [
    (1, 1, "v_last", torch.float32),
    (3, 259, "v_last", torch.float32),
    (3, 40, "v_seq", torch.float32),
    (2, 261, "v_last", torch.float16),
    (2, 16, "v_seq", torch.bfloat16),
]


class Stock(NamedTuple):
    spikes: torch.Tensor
    membranes: torch.Tensor
    x: torch.Tensor
    start: torch.Tensor
    q: torch.Tensor


def stock(case: Case, x: torch.Tensor, v: torch.Tensor, g_s: torch.Tensor, g_v: torch.Tensor) -> Stock:
    """What stock's kernels compute; arguments in the order of their launches."""
    steps, n = x.shape
    forward, backward = KERNELS[case.kind]
    seq, to, grid = g_v.dim() == 2, case.v_reset or 0.0, (triton.cdiv(n, BLOCK),)
    found = Stock(torch.empty_like(x), torch.empty_like(g_v), torch.empty_like(g_s), *torch.empty(2, n))
    h = torch.empty(steps, n)
    forward[grid](
        x, v, found.spikes, found.membranes, h, steps, n, *case.leak(), THRESHOLD, to,
        *case.constants((seq, BLOCK, None)),
    )  # fmt: skip
    pointers = (g_s, g_v, h, found.x, found.start)
    if case.kind == "plif":
        pointers = (g_s, g_v, x, v, h, found.x, found.start, found.q)
    unroll = (1,) if case.kind == "lif" else ()
    backward[grid](
        *pointers, steps, n, *case.leak(), THRESHOLD, to, ALPHA,
        *case.constants((case.detach_reset, NAMES.index(case.surrogate), seq, *unroll, BLOCK, None)),
    )  # fmt: skip
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second of a wider place."""
    return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("kind", ["if", "lif", "plif"])
def test_there_and_back_as_stock(kind, reset):
    cases = [case for case in CASES if case.kind == kind and case.v_reset == reset]
    for number, case in enumerate(cases):
        steps, n, membranes, dtype = KINDS[number % len(KINDS)]
        x, v, g_s = (
            torch.randn(steps, n).mul(1.5).to(dtype),
            torch.randn(n),
            torch.randn(steps, n).to(dtype),
        )
        g_v = torch.randn(n) if membranes == "v_last" else torch.randn(steps, n)
        expected = stock(case, x, v, g_s, g_v)
        made = on_triton.Made(
            torch.empty_like(x), torch.empty(n), torch.empty(steps, n) if membranes == "v_seq" else None
        )
        on_triton.forward(strided(x) if number % 2 else x, v, case.rule, case.q, made)
        assert same_bits(made.spikes, expected.spikes), case
        assert same_bits(getattr(made, membranes), expected.membranes), case

        given = on_triton.Given(strided(g_s) if number % 2 else g_s, **{membranes: g_v})
        wanted = on_triton.Wanted(
            torch.empty_like(x), torch.empty(n), None if case.q is None else torch.empty(n), torch.empty(n)
        )
        surrogate = case.surrogate, ALPHA
        on_triton.backward(x, v, case.rule, case.q, surrogate, given, wanted)
        assert same_bits(wanted.x, expected.x), case
        assert same_bits(wanted.start, expected.start) and same_bits(wanted.v_last, made.v_last), case
        assert wanted.q is None or same_bits(wanted.q, expected.q), case

        # The currents' own place becomes their gradient's.
        on_triton.backward(x, v, case.rule, case.q, surrogate, given, on_triton.Wanted(x))
        assert same_bits(x, expected.x), case


def test_gradients_that_are_not_there_are_zeros():
    case = Case("lif", True, 0.0, False, "ATan")
    x, v, g = torch.randn(3, 9), torch.randn(9), torch.randn(3, 9)
    for g_s, g_v in ((g, None), (None, g[0])):
        expected = stock(
            case, x, v, torch.zeros(3, 9) if g_s is None else g_s, torch.zeros(9) if g_v is None else g_v
        )
        wanted = on_triton.Wanted(torch.empty(3, 9))
        on_triton.backward(x, v, case.rule, None, ("ATan", ALPHA), on_triton.Given(g_s, g_v), wanted)
        assert same_bits(wanted.x, expected.x)


def test_one_gradient_of_all_spikes_and_one_membrane_of_all_neurons():
    case = Case("if", False, None, True, "Sigmoid")
    x, g_s = torch.randn(3, 20), torch.ones(()).expand(3, 20)
    expected = stock(case, x, torch.full((20,), 0.25), g_s.contiguous(), torch.zeros(20))
    made, wanted = (
        on_triton.Made(torch.empty_like(x), torch.empty(20)),
        on_triton.Wanted(torch.empty_like(x)),
    )
    assert on_triton.forward(x, 0.25, case.rule, None, made) is None
    assert same_bits(made.spikes, expected.spikes) and same_bits(made.v_last, expected.membranes)
    on_triton.backward(x, 0.25, case.rule, None, ("Sigmoid", ALPHA), on_triton.Given(g_s), wanted)
    assert same_bits(wanted.x, expected.x)


def test_a_place_for_membranes_serves_many_blocks(monkeypatch):
    monkeypatch.setattr(on_triton, "FEWEST", 2)
    monkeypatch.setattr(on_triton, "MOST_BYTES", 0)
    case, n = Case("plif", True, 0.0, False, "Erf"), 5 * on_triton.SIZE + 3
    x, v, g_s, g_v = torch.randn(3, n).half(), torch.randn(n), torch.randn(3, n).half(), torch.randn(n)
    expected = stock(case, x, v, g_s, g_v)
    wanted = on_triton.Wanted(torch.empty_like(x), torch.empty(n), torch.empty(n))
    on_triton.backward(x, v, case.rule, case.q, ("Erf", ALPHA), on_triton.Given(g_s, g_v), wanted)
    assert all(
        same_bits(ours, theirs)
        for ours, theirs in ((wanted.x, expected.x), (wanted.start, expected.start), (wanted.q, expected.q))
    )


def test_no_neurons():
    rule, x = Case("lif", True, 0.0, True, "ATan").rule, torch.empty(3, 0)
    made = on_triton.Made(torch.empty(3, 0), torch.empty(0))
    on_triton.forward(x, 0.0, rule, None, made)
    on_triton.backward(x, 0.0, rule, None, ("ATan", 2.0), on_triton.Given(x), on_triton.Wanted(x))


def test_currents_that_are_needed_once_more_are_not_overwritten():
    case, x = Case("plif", True, 0.0, True, "ATan"), torch.randn(2, 3)
    wanted = on_triton.Wanted(x, q=torch.empty(3))
    with pytest.raises(ValueError, match="place of its own"):
        on_triton.backward(x, 0.0, case.rule, case.q, ("ATan", 2.0), on_triton.Given(x.clone()), wanted)
