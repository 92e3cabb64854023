"""The written-out gradients against autograd, and the sweeps in place against the specification."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snn_reversible_plugin.neurons.integrate_fire import in_place as sweeps
from snn_reversible_plugin.neurons.integrate_fire import reference as dynamics
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, OutputGradients, Rule, Wanted
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops import chunks as cuts
from snn_reversible_plugin.reports.measure import AllocationCounter

ALL = Wanted(x=True, v=True, q=True)
RULES = [
    Rule(tau, decay_input, 0.7, v_reset, detach_reset)
    for tau, decay_input, v_reset, detach_reset in itertools.product(
        [None, 1.9], [True, False], [0.0, None, -0.2], [True, False]
    )
]


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx, grad):
        return triangle(grad, ctx.saved_tensors[0])


def triangle(grad, u):
    return grad * (1 - u.abs()).clamp_min(0)


def smooth_vjp(grad, u):
    s = torch.sigmoid(u)
    return torch.ops.aten.sigmoid_backward(grad, s)


BINARY = Surrogate(triangle, uniform=True)
SMOOTH = Surrogate(smooth_vjp, torch.sigmoid)
FIRE = {BINARY: Spike.apply, SMOOTH: torch.sigmoid}


def by_autograd(x_seq, v, rule, surrogate, q, g_s, g_v, g_v_seq):
    """The neuron as a user would write it, and autograd's gradients of x_seq, v and q."""
    x_seq, v, q = (t.detach().requires_grad_() if t is not None else None for t in (x_seq, v, q))
    spikes, voltages, state = [], [], v
    rest = 0.0 if rule.v_reset is None else rule.v_reset
    for x in x_seq:
        if q is None and rule.tau is None:
            h = state + x
        else:
            pull = x - (state - rest) if rule.decay_input else state - rest
            leak = pull / rule.tau if q is None else pull * q
            h = state + leak if rule.decay_input else state - leak + x
        s = FIRE[surrogate](h - rule.v_threshold)
        r = s.detach() if rule.detach_reset else s
        state = h - r * rule.v_threshold if rule.v_reset is None else r * rule.v_reset + (1.0 - r) * h
        spikes.append(s)
        voltages.append(state)
    outputs = torch.stack(spikes), state, torch.stack(voltages)
    pairs = [(o, g) for o, g in zip(outputs, (g_s, g_v, g_v_seq), strict=True) if g is not None]
    inputs = [x_seq, v] + ([] if q is None else [q])
    grads = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])
    return [t.detach() for t in outputs], grads


def problem(rule, shape=(4, 3, 5), dtype=torch.float32, learnable=False):
    x_seq, v = torch.randn(shape, dtype=dtype) * 1.3, torch.randn(shape[1:], dtype=dtype) * 0.5
    q = torch.tensor(0.4, dtype=dtype) if learnable else None
    rule = rule._replace(tau=None) if learnable else rule
    g_s, g_v, g_v_seq = torch.randn_like(x_seq), torch.randn_like(v), torch.randn_like(x_seq)
    return x_seq, v, rule, q, g_s, g_v, g_v_seq


def assert_same(x_seq, v, rule, surrogate, q, given_grads, owned=False):
    expected, grads = by_autograd(x_seq, v, rule, surrogate, q, *given_grads)
    neuron = Neuron(rule, surrogate, q)
    for run, vjp, how in (
        (dynamics.sequence, dynamics.sequence_vjp, {}),
        (sweeps.multi_step, sweeps.multi_step_vjp, {"owned": owned}),
    ):
        got = run(x_seq, v, neuron, True)
        assert all(map(torch.equal, got, expected))
        assert all(map(torch.equal, run(x_seq, v, neuron, False)[:2], expected))
        found = vjp(
            x_seq.clone(memory_format=torch.preserve_format),
            v,
            OutputGradients(*given_grads),
            neuron,
            ALL,
            **how,
        )
        assert torch.equal(found.x, grads[0])
        first, second = found.v
        assert torch.equal(first if second is None else first + second, grads[1])
        if q is not None:
            assert torch.equal(sum(found.q[1:], found.q[0]), grads[2])


@pytest.mark.one_in(4)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("surrogate", [BINARY, SMOOTH], ids=["binary", "smooth"])
@pytest.mark.parametrize("learnable", [False, True], ids=["fixed", "learnable"])
def test_gradients_are_autograds(rule, surrogate, learnable):
    for dtype, owned in itertools.product([torch.float32, torch.float64, torch.bfloat16], [False, True]):
        x_seq, v, used, q, *grads = problem(rule, dtype=dtype, learnable=learnable)
        for g_s, g_v, g_v_seq in itertools.product(*([None, g] for g in grads)):
            if not (g_s is None and g_v is None and g_v_seq is None):
                assert_same(x_seq, v, used, surrogate, q, (g_s, g_v, g_v_seq), owned)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4).map(lambda s: (1 + s[0], *s[1:], 2)),
    rule=st.sampled_from(RULES),
    learnable=st.booleans(),
    layout=st.sampled_from(["plain", "reversed", "channels_last", "gradient_reversed", "expanded"]),
    seed=st.integers(0, 9),
)
@settings(max_examples=120, deadline=None)
def test_any_shape_and_layout(shape, rule, learnable, layout, seed):
    torch.manual_seed(seed)
    x_seq, v, rule, q, g_s, g_v, _ = problem(rule, shape, learnable=learnable)
    order = range(x_seq.dim())
    if layout == "reversed":
        x_seq = x_seq.permute(*order[::-1]).contiguous().permute(*order[::-1])
    elif layout == "channels_last" and x_seq.dim() == 5:
        x_seq = x_seq.movedim(2, -1).contiguous().movedim(-1, 2)
        v, g_s = (t.movedim(-3, -1).contiguous().movedim(-1, -3) for t in (v, g_s))
    elif layout == "gradient_reversed":
        g_s = g_s.permute(*order[::-1]).contiguous().permute(*order[::-1])
    elif layout == "expanded":
        g_s = g_s[:1, ..., :1].expand(x_seq.shape)
    assert_same(x_seq, v, rule, BINARY, q, (g_s, g_v, None))


def same_bits(a, b):
    """Equal to the sign of a zero; of numbers that are none the bits are nobody's business."""
    none = a.isnan()
    bits = (torch.where(none, 0.0, t).contiguous().view(torch.int32) for t in (a, b))
    return torch.equal(none, b.isnan()) and torch.equal(*bits) and a.stride() == b.stride()


def atan(grad, u):
    return u.mul_(1.7).mul_(u).add_(1).reciprocal_().mul_(0.4).mul(grad)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("threshold", [0.7, 0.0])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.detach_reset], ids=str)
@pytest.mark.parametrize("shape", [(3, 37), (5, 4, 3, 7, 5), (9, 6), (1, 8)])
def test_short_sequences_are_compiled_with_the_same_bits(rule, threshold, shape, monkeypatch):
    kernels = pytest.importorskip(
        "snn_reversible_plugin.neurons.integrate_fire.kernels", exc_type=ImportError
    )
    calls, run = [], kernels.backward
    monkeypatch.setattr(kernels, "backward", lambda *args: calls.append(run(*args)))
    neuron = Neuron(rule._replace(v_threshold=threshold), Surrogate(atan, uniform=True))
    torch.manual_seed(0)
    x_seq = torch.randn(shape).mul_(2)
    x_seq.view(-1)[:6] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, threshold, 0.0])
    tensors = (x_seq, torch.randn(shape), torch.randn(shape[1:]), torch.randn(shape[1:]))
    layouts = [tensors]
    if len(shape) == 5:
        layouts.append(tuple(t.movedim(-3, -1).contiguous().movedim(-1, -3) for t in tensors))
    for (x, g_s, g_v, start), value in itertools.product(layouts, (0.0, 0.3, None)):
        v = start if value is None else value
        s, after, _ = dynamics.sequence(x, v, neuron)
        found = sweeps.multi_step(x, v, neuron)
        assert same_bits(s, found[0])
        assert same_bits(after, found[1])
        for g_out, g_last in ((g_s, g_v), (g_s, None), (torch.ones(()).expand(shape), g_v)):
            grads = (OutputGradients(g_out, g_last), neuron)
            expected = dynamics.sequence_vjp(x, v, *grads, sweeps.ONLY_X).x
            calls.clear()
            assert same_bits(expected, sweeps.multi_step_vjp(x, v, *grads).x)
            owned, last = x.clone(), torch.empty_like(after)
            assert sweeps.multi_step_vjp(owned, v, *grads, owned=True, v_last=last).x is owned
            assert same_bits(expected, owned)
            assert same_bits(after, last)
            assert calls


def test_a_constant_start_is_a_tensor_of_that_value():
    for rule, value in itertools.product(RULES, [0.0, 0.35]):
        x_seq, v, rule, _, g_s, g_v, _ = problem(rule)
        v.fill_(value)
        for a, b in zip(
            sweeps.multi_step(x_seq, value, Neuron(rule, BINARY))[:2],
            sweeps.multi_step(x_seq, v, Neuron(rule, BINARY))[:2],
            strict=True,
        ):
            assert torch.equal(a, b)
        grads = [
            sweeps.multi_step_vjp(x_seq, start, OutputGradients(g_s, g_v), Neuron(rule, BINARY)).x
            for start in (value, v)
        ]
        assert torch.equal(*grads)


def test_an_owned_current_becomes_its_gradient():
    x_seq, v, rule, _, g_s, _, _ = problem(RULES[-1])
    kept, given = x_seq.clone(), (OutputGradients(g_s), Neuron(rule, BINARY))
    sweeps.multi_step_vjp(x_seq, v, *given)
    assert torch.equal(x_seq, kept)
    grads = sweeps.multi_step_vjp(x_seq, v, *given, owned=True)
    assert grads.x is x_seq
    overlapping = kept[:1].expand(kept.shape)
    grads = sweeps.multi_step_vjp(overlapping, v, *given, owned=True)
    assert grads.x is not overlapping


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("store_v_seq", [False, True])
def test_spikes_may_take_the_place_of_currents(rule, store_v_seq, monkeypatch):
    monkeypatch.setattr(sweeps.on_numba, "MOST", 0)
    monkeypatch.setattr(cuts, "chunk_size", lambda device: 7)
    for surrogate, layout in itertools.product((BINARY, SMOOTH), (torch.contiguous_format, "last")):
        x_seq, neuron = torch.randn(4, 3, 2, 5, 3) * 1.3, Neuron(rule, surrogate)
        if layout == "last":
            x_seq = x_seq.movedim(2, -1).contiguous().movedim(-1, 2)
        expected = sweeps.multi_step(x_seq, 0.3, neuron, store_v_seq)
        memory = x_seq.data_ptr()
        found = sweeps.multi_step(x_seq, 0.3, neuron, store_v_seq, over=True)
        assert found[0].data_ptr() == memory and found[0].stride() == expected[0].stride()
        for one, other in zip(expected, found, strict=True):
            assert one is other is None or same_bits(one, other)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_memory_beyond_the_results_is_a_few_chunks(rule, monkeypatch):
    monkeypatch.setattr(cuts, "chunk_size", lambda device: 1024)
    x_seq = torch.randn(8, 64, 1024)
    g_s, size, step = torch.randn_like(x_seq), x_seq.numel() * 4, x_seq[0].numel() * 4
    surrogate = Surrogate(lambda grad, u: u.abs_().reciprocal_().mul_(grad), uniform=True)
    neuron = Neuron(rule, surrogate)
    with AllocationCounter() as counter:
        kept = sweeps.multi_step(x_seq, 0.0, neuron)
    assert counter.peak < size + step + 12 * 4096
    del kept
    with AllocationCounter() as counter:
        sweeps.multi_step_vjp(x_seq, 0.0, OutputGradients(g_s), neuron, owned=True)
    assert counter.peak < 12 * 4096


def test_single_steps_are_a_sequence():
    for rule, learnable in itertools.product(RULES, [False, True]):
        x_seq, v, rule, q, g_s, g_v, _ = problem(rule, (1, 3, 5), learnable=learnable)
        neuron = Neuron(rule, BINARY, q)
        s, after, h, pull = dynamics.single_step(x_seq[0], v, neuron)
        expected = dynamics.sequence(x_seq, v, neuron)
        assert torch.equal(s, expected[0][0])
        assert torch.equal(after, expected[1])
        one = dynamics.single_step_vjp(h, g_s[0], g_v, neuron, pull)
        many = dynamics.sequence_vjp(x_seq, v, OutputGradients(g_s, g_v), neuron, ALL)
        assert torch.equal(one.x, many.x[0])
        assert torch.equal(one.v[0], many.v[0])
        assert [g.item() for g in one.q] == [g.item() for g in many.q]


@given(n=st.integers(0, 5_000_000), threads=st.integers(1, 80), uniform=st.booleans())
@settings(max_examples=300, deadline=None)
def test_cuts_cover_the_neurons_and_respect_vector_registers(n, threads, uniform):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        parts = cuts.cuts(n, torch.device("cpu"), uniform)

        def ends_of_shares(length):
            pieces = min(threads, -(-length // 32_768)) or 1
            share = -(-length // pieces)
            return [min(length, k * share) for k in range(1, pieces + 1)]

        assert parts[0].start == 0
        assert parts[-1].stop == n
        assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
        if uniform or len(parts) == 1:
            return
        assert max(p.stop - p.start for p in parts) <= cuts.chunk_size(torch.device("cpu"))
        assert all(end % 64 == 0 or end == n for end in ends_of_shares(n))
        for part in parts:
            assert part.start % 64 == 0
            for end in ends_of_shares(part.stop - part.start):
                assert (part.start + end) % 64 == 0 or part.start + end == n


@pytest.mark.parametrize("n", [32_769, 100_003, 131_072 + 17, 262_144 + 200])
def test_cuts_of_a_sigmoid_are_those_of_the_whole(n):
    threads = torch.get_num_threads()
    u = torch.randn(n)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            whole = torch.sigmoid(u)
            for part in cuts.cuts(n, u.device, uniform=False):
                assert torch.equal(torch.sigmoid(u[part]), whole[part])
    finally:
        torch.set_num_threads(threads)


def test_numbers_that_are_not_finite():
    for rule, value in itertools.product(RULES, [math.nan, math.inf, -math.inf]):
        x_seq, v, rule, q, *grads = problem(rule)
        x_seq[1, 0, 0] = value
        expected, (g_x, *_) = by_autograd(x_seq, v, rule, BINARY, q, *grads)
        neuron = Neuron(rule, BINARY)
        got = sweeps.multi_step(x_seq, v, neuron, True)
        found = sweeps.multi_step_vjp(x_seq, v, OutputGradients(*grads), neuron)
        for a, b in zip((*got, found.x), (*expected, g_x), strict=True):
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
            assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay_input", [True, False])
def test_a_learned_leak_may_be_summed_over_chunks(dtype, decay_input, monkeypatch):
    """Then nothing but that sum differs, by rounding, and what stands beside x is a chunk's."""
    monkeypatch.setattr(cuts, "chunk_size", lambda device: 1024)
    rule = Rule(None, decay_input, 0.7, 0.0, False)
    x_seq, v, rule, q, *grads = problem(rule, (3, 5, 6000), dtype, learnable=True)
    neuron, grads = Neuron(rule, BINARY, q), OutputGradients(*grads)
    expected = dynamics.sequence_vjp(x_seq, v, grads, neuron, ALL)
    given = x_seq.clone()
    with AllocationCounter() as counter:
        found = sweeps.multi_step_vjp(
            given, v, grads, neuron, Wanted(x=True, v=False, q=True, sums_chunks=True), owned=True
        )
    assert found.x is given and torch.equal(given, expected.x)
    assert counter.peak < 12 * 1024 * dtype.itemsize
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    scale = max(float(one.abs()) for one in expected.q)
    for one, other in zip(found.q, expected.q, strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * scale)
