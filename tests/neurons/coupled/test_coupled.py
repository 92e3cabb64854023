"""The coupled node: undone bit for bit, with the gradient of its equations, bit for bit."""

import copy
import gc
import math
import pickle

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from snntorch import surrogate as st_surrogate
from snntorch import utils
from spikingjelly.activation_based import functional, layer, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import snntorch, spikingjelly
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.grid import snap
from snn_reversible_plugin.neurons.coupled import in_place as coupled_sweeps
from snn_reversible_plugin.neurons.coupled import reference as coupled
from snn_reversible_plugin.neurons.coupled.call import run_sequence
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step
from snn_reversible_plugin.snntorch.coupled import surrogate_of as surrogate_of_snntorch
from snn_reversible_plugin.spikingjelly.coupled import surrogate_of as surrogate_of_spikingjelly

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(1, 1, 2), (5, 3, 4), (4, 2, 6, 3, 5), (3, 1, 2, 1, 7), (3, 0, 4), (2, 70, 8, 16, 16)]


class Mine(torch.autograd.Function):
    """A surrogate that a user wrote, which fires above the threshold."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx, g):
        (u,) = ctx.saved_tensors
        return g * (1 - u.abs()).clamp(min=0)


JELLY = {
    "atan": surrogate.ATan(),
    "atan 1.3": surrogate.ATan(alpha=1.3),
    "sigmoid": surrogate.Sigmoid(),
    "quadratic": surrogate.PiecewiseQuadratic(),
    "exp": surrogate.PiecewiseExp(),
    "softsign": surrogate.SoftSign(),
    "erf": surrogate.Erf(),
    "leaky relu": surrogate.LeakyKReLU(),
    "rect": surrogate.Rect(),
    "a user's": Mine.apply,
}
TORCH = {
    "atan": st_surrogate.atan(),
    "fast sigmoid": st_surrogate.fast_sigmoid(slope=10),
    "sigmoid": st_surrogate.sigmoid(),
    "straight through": st_surrogate.straight_through_estimator(),
    "triangular": st_surrogate.triangular(),
    "spike rate escape": st_surrogate.spike_rate_escape(),
    "sparse": st_surrogate.SFS(),
}


def constants_of(tau=2.0, alpha=0.0, beta=0.5, v_threshold=1.0, bits=16, detach_reset=False):
    return coupled.constants_of(
        "node",
        tau=tau,
        alpha=alpha,
        beta=beta,
        v_threshold=v_threshold,
        bits=bits,
        detach_reset=detach_reset,
    )


def node_of(constants, dtype=torch.float32):
    known = surrogate_of_spikingjelly(surrogate.ATan(), dtype, torch.device("cpu"), torch.Size([1, 2]))
    return coupled.Node(constants, known, "node")


def same_bits(a, b):
    words = torch.int64 if a.dtype is torch.float64 else torch.int32
    return a.dtype is b.dtype and torch.equal(a.contiguous().view(words), b.contiguous().view(words))


def plain(node, x_seq, s=None):
    """What a node computes, as its equations in the order of the paper, differentiated by autograd."""
    function = getattr(node, "surrogate_function", None)
    dtype = torch.float64 if x_seq.dtype is torch.float64 else torch.float32

    def fire(u):
        return function(u) if function is not None else node.spike_grad(u).to(u.dtype)

    leak = None if node.w is None else node.w.sigmoid().to(dtype)
    return coupled.sequence(x_seq, s, node.constants, fire, leak)


def plain_loop(node, x_seq, s=None):
    """The same a step at a time, as a user's loop would."""
    outputs = []
    for x in x_seq:
        y_seq, s = plain(node, x.unsqueeze(0), s)
        outputs.append(y_seq[0])
    return torch.stack(outputs), s


def outcome(run, node, x_seq, s=None, weights=(1, 1)):
    """Outputs, states, and all gradients of a weighted sum of both."""
    leaves = [z.clone().requires_grad_() for z in ([x_seq] if s is None else [x_seq, s])]
    y_seq, s_out = run(node, *leaves)
    loss = 0
    for z, weight in zip((y_seq, s_out), weights, strict=True):
        if weight:
            loss = loss + (z * torch.sin(torch.arange(z.numel(), dtype=z.dtype).view(z.shape))).sum()
    parameters = list(node.parameters())
    return [y_seq, s_out, *torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True)]


def whole(node, x_seq, s=None):
    if isinstance(node, snntorch.CoupledLIF):
        return looped(node, x_seq, s)
    node.step_mode = "m"
    (y_seq,), (s_out,) = node.functional_forward((x_seq,), (0.0 if s is None else s,))
    return y_seq, s_out


def looped(node, x_seq, s=None):
    outputs = []
    for x in x_seq:
        if isinstance(node, snntorch.CoupledLIF):
            y, s = node(x, node.reset_mem() if s is None else s)
        else:
            node.step_mode = "s"
            (y,), (s,) = node.functional_forward((x,), (0.0 if s is None else s,))
        outputs.append(y)
    return torch.stack(outputs), s


EQUATIONS = {whole: plain, looped: plain_loop}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), index
        assert a is None or (a.dtype is b.dtype and a.shape == b.shape), index
        # NaN is what snnTorch's sigmoid gives far from the threshold.
        assert a is None or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), index


def inputs(shape, dtype=torch.float32):
    states = torch.float64 if dtype is torch.float64 else torch.float32
    return (torch.randn(shape) * 2).to(dtype), snap(torch.randn(shape[1:], dtype=states))


# -- the inverse ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=75)
@given(
    seed=st.integers(0, 2**31),
    tau=st.floats(1, 50),
    shift=st.integers(0, 7),
    alpha=st.floats(-2, 2),
    bits=st.integers(7, 18),
    threshold=st.floats(-1, 2),
    size=st.floats(0.01, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.sampled_from([(1, 1, 2), (40, 2, 6), (9, 3, 2, 5)]),
)
@example(
    seed=0, tau=1.0, shift=0, alpha=0.0, bits=7, threshold=7.907434193013098e-48, size=1.0,
    dtype=torch.float32, shape=(40, 2, 6),
)  # fmt: skip
def test_steps_are_undone_bit_for_bit(seed, tau, shift, alpha, bits, threshold, size, dtype, shape):
    torch.manual_seed(seed)
    constants = constants_of(tau, alpha, 2.0**-shift, threshold, bits)
    x_seq = torch.randn(shape, dtype=dtype) * size
    s = snap(torch.randn(shape[1:], dtype=dtype), bits)
    node = node_of(constants, dtype)
    after = coupled_sweeps.forward(x_seq, s, node)
    undone = coupled_sweeps.inverse(after, node)
    if undone.reached < 2.0 ** (24 - bits):
        assert same_bits(undone.x_seq, snap(x_seq, bits - shift))
        assert same_bits(undone.s, s)
    expected_y, expected_s = coupled.sequence(x_seq, s, constants, surrogate.ATan())
    assert same_bits(after.y_seq, expected_y)
    assert same_bits(after.s, expected_s)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("tau", "beta", "bits"),
    [(1.0, 1.0, 8), (1.0, 0.5, 16), (2.0, 0.5, 14), (2.0, 0.25, 16), (8.0, 0.125, 16), (20.0, 2**-5, 16)],
)
@pytest.mark.parametrize("steps", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_thousands_of_steps_are_undone_bit_for_bit(steps, tau, beta, bits):
    constants = constants_of(tau, beta=beta, bits=bits)
    x_seq = 1 + 2 * torch.randn(steps, 2, 6)
    s = snap(torch.randn(2, 6), constants.bits)
    node = node_of(constants)
    after = coupled_sweeps.forward(x_seq, s, node)
    spikes = coupled_sweeps.forward(x_seq, s, node, coupled=False).y_seq
    assert 0.01 < spikes.mean() < 0.95
    undone = coupled_sweeps.inverse(after, node)
    assert undone.reached < 2.0 ** (24 - constants.bits)
    assert same_bits(undone.x_seq, snap(x_seq, constants.bits - constants.shift))
    assert same_bits(undone.s, s)


def test_each_remainder_is_needed():
    constants = constants_of(beta=0.25)
    x_seq = torch.randn(20, 1, 4)
    node = node_of(constants)
    after = coupled_sweeps.forward(x_seq, None, node)
    ((part, stored),) = after.remainders
    assert stored.shape == (20, 2, 1) and stored.dtype is torch.uint8
    for t in (0, 13):
        for place in (0, 1):
            spoiled = stored.clone()
            spoiled[t, place] ^= 1
            undone = coupled_sweeps.inverse(after._replace(remainders=[(part, spoiled)]), node)
            assert undone.s[0, 0] != 0


# -- the gradient -----------------------------------------------------------------------------------


@pytest.mark.one_in(7)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learn_tau", [False, True])
@pytest.mark.parametrize("run", [whole, looped])
def test_gradients_are_those_of_the_equations(run, learn_tau, dtype, beta, shape):
    x_seq, s = inputs(shape, dtype)
    for alpha, detach_reset, tau in ((0.0, False, 2.0), (-0.3, False, 3.3), (0.25, True, 1.5)):
        node = spikingjelly.CoupledLIF(tau, alpha, beta, detach_reset=detach_reset, learn_tau=learn_tau)
        assert_same(outcome(run, node, x_seq, s), outcome(EQUATIONS[run], node, x_seq, s))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", JELLY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_surrogates_of_spikingjelly(name, dtype):
    for shape in SHAPES[1:]:
        x_seq, s = inputs(shape, dtype)
        node = spikingjelly.CoupledLIF(surrogate_function=JELLY[name])
        assert_same(outcome(whole, node, x_seq, s), outcome(plain, node, x_seq, s))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learn_tau", [False, True])
def test_surrogates_of_snntorch(name, dtype, learn_tau):
    for shape in SHAPES[1:]:
        x_seq, s = inputs(shape, dtype)
        node = snntorch.CoupledLIF(1.7, 0.25, 0.25, spike_grad=TORCH[name], learn_tau=learn_tau)
        assert_same(outcome(whole, node, x_seq, s), outcome(plain_loop, node, x_seq, s))


def test_they_fire_as_their_frameworks_do():
    at_threshold = torch.full((1, 1, 2), 2.0)
    settings = {"tau": 2.0, "beta": 0.5}
    assert whole(spikingjelly.CoupledLIF(**settings), at_threshold)[0][0, 0, 0] == 2.0
    assert whole(snntorch.CoupledLIF(**settings), at_threshold)[0][0, 0, 0] == 1.0
    mine = spikingjelly.CoupledLIF(**settings, surrogate_function=Mine.apply)
    assert whole(mine, at_threshold)[0][0, 0, 0] == 1.0


@pytest.mark.parametrize("run", [whole, looped])
@pytest.mark.parametrize("weights", [(1, 0), (0, 1)])
def test_either_output_alone(weights, run):
    x_seq, s = inputs((5, 3, 4))
    node = spikingjelly.CoupledLIF(learn_tau=True)
    for start in (s, None):
        expected = outcome(EQUATIONS[run], node, x_seq, start, weights)
        assert_same(outcome(run, node, x_seq, start, weights), expected)


def test_other_layouts():
    x_seq = torch.randn(4, 2, 6, 3, 5)
    node = spikingjelly.CoupledLIF()
    expected = outcome(plain, node, x_seq)
    for layout in (x_seq.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (4, 2)),
                   x_seq.transpose(0, 1).contiguous().transpose(0, 1),
                   x_seq.transpose(3, 4).contiguous().transpose(3, 4)):  # fmt: skip
        assert_same(outcome(whole, node, layout), expected)
    expanded = x_seq[:1].expand(4, -1, -1, -1, -1)
    assert_same(outcome(whole, node, expanded), outcome(plain, node, expanded))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("run", [whole, looped])
def test_a_thousand_steps(run, device):
    x_seq, s = inputs((1000, 2, 4))
    node = spikingjelly.CoupledLIF(alpha=0.1, learn_tau=True)
    assert_same(outcome(run, node, x_seq, s), outcome(EQUATIONS[run], node, x_seq, s))
    if device != "cpu":
        there = outcome(run, node.to(device), x_seq.to(device), s.to(device))
        assert all(a.device.type == device for a in there)


def test_under_autocast():
    x_seq, s = inputs((5, 3, 4))
    node, fc = spikingjelly.CoupledLIF(), nn.Linear(4, 4)

    def network(run):
        def forward(node, x_seq, s):
            with torch.autocast("cpu", torch.bfloat16):
                return run(node, fc(x_seq), s)

        return forward

    ours = outcome(network(whole), node, x_seq, s)
    assert ours[0].dtype is torch.float32
    assert_same(ours, outcome(network(plain), node, x_seq, s))


# -- a user's loop ----------------------------------------------------------------------------------


def loop_gradients(node_of, loss_of, steps=6):
    """Gradients under a loss of all outputs and states, given how to run a step."""
    torch.manual_seed(1)
    x_seq = (torch.randn(steps, 3, 4) * 2).requires_grad_()
    outputs, states, s = [], [], None
    for x in x_seq:
        y, s = node_of(x, s)
        outputs.append(y)
        states.append(s)
    return loss_of(x_seq, outputs, states)


LOSSES = {
    "all": lambda x, y, s: [torch.autograd.grad(sum(o.pow(2).sum() for o in y), x)],
    "states too": lambda x, y, s: [torch.autograd.grad(sum(o.pow(3).sum() for o in (*y, *s)), x)],
    "first outputs": lambda x, y, s: [torch.autograd.grad(sum(o.pow(2).sum() for o in y[:3]), x)],
    "middle state": lambda x, y, s: [torch.autograd.grad(s[2].pow(2).sum(), x)],
    "from a state on": lambda x, y, s: [torch.autograd.grad(y[5].pow(2).sum(), s[2])],
    "twice": lambda x, y, s: [
        torch.autograd.grad(y[5].pow(2).sum() + s[5].sum(), x, retain_graph=True) for _ in range(2)
    ],
    "one by one": lambda x, y, s: [
        torch.autograd.grad(o.pow(2).sum(), x, retain_graph=True) for o in (*y, *s[::-1], *y[::-1])
    ],
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("framework", [spikingjelly, snntorch])
def test_losses_of_a_loop(framework, loss):
    node = framework.CoupledLIF()

    def step(run):
        def of(x, s):
            y_seq, s = run(node, x.unsqueeze(0), s)
            return y_seq[0], s

        return of

    ours, theirs = (loop_gradients(step(run), LOSSES[loss]) for run in (looped, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def test_a_state_used_by_two_steps():
    node = snntorch.CoupledLIF()
    x = (torch.randn(4, 3, 6) * 2).requires_grad_()

    def total(step):
        y0, s0 = step(x[0], None)
        y1, s1 = step(x[1], s0)
        y2, s2 = step(x[2], s0)
        y3, s3 = step(x[3], s1 + s2)
        return (y0 * y1 * y2 * y3).sum() + (s3 * s0).sum()

    def by_equations(x, s):
        y_seq, s = plain(node, x.unsqueeze(0), s)
        return y_seq[0], s

    ours = torch.autograd.grad(total(lambda x, s: node(x, node.reset_mem() if s is None else s)), x)
    assert_same(ours, torch.autograd.grad(total(by_equations), x))


def test_truncated_back_propagation():
    def gradients(run):
        torch.manual_seed(1)
        node, s, found = spikingjelly.CoupledLIF(learn_tau=True), None, []
        for x in torch.randn(9, 3, 4) * 2:
            x.requires_grad_()
            y, s = run(node, x.unsqueeze(0), s)
            if len(found) % 3 == 2:
                (y.pow(2).sum() + s.sum()).backward()
                s = s.detach()
            found.append(x)
        return [node.w.grad, *(x.grad for x in found)]

    assert_same(gradients(looped), gradients(plain))


def test_a_loop_holds_outputs_and_bits_and_no_states():
    node, n = snntorch.CoupledLIF(beta=0.25), 16 * 64

    def loss_of(steps, x_seq):
        mem = node.reset_mem()
        total = 0
        for x in x_seq[:steps]:
            spk, mem = node(x, mem)
            total = total + spk.sum()
        return total

    x_seq = torch.randn(60, 16, 64, requires_grad=True)
    held = [count_step(lambda steps=steps: loss_of(steps, x_seq))[0] for steps in (10, 60)]
    bits = n * 2 // 8
    assert (held[1] - held[0]) / 50 == pytest.approx(4 * n + bits, rel=0.02)


@pytest.mark.slow
def test_a_sequence_holds_outputs_and_bits_and_one_state():
    n = 16 * 64
    for beta, bits in ((1.0, 0), (0.5, 1), (0.125, 3)):
        node = spikingjelly.CoupledLIF(tau=1.0, beta=beta, step_mode="m")
        for steps in (10, 40):
            x_seq = torch.randn(steps, 16, 64, requires_grad=True)
            functional.reset_net(node)
            held, _ = count_step(lambda node=node, x=x_seq: node(x).sum())
            assert held == 4 * n * steps + bits * n * steps // 8 + 4 * n + 4


def test_without_gradients_nothing_is_held():
    node = spikingjelly.CoupledLIF(step_mode="m")
    for x_seq, grad in ((torch.randn(5, 3, 4, requires_grad=True), False), (torch.randn(5, 3, 4), True)):
        with torch.set_grad_enabled(grad):
            y_seq, s = whole(node, x_seq)
        assert y_seq.grad_fn is None and s.grad_fn is None
        assert_same([y_seq, s], plain(node, x_seq.detach()))
        assert_same(looped(node, x_seq.detach()), [y_seq, s])


# -- errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [whole, looped])
@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, math.nan])
@pytest.mark.parametrize("framework", [spikingjelly, snntorch])
def test_leaving_the_range_is_an_error_of_the_backward(framework, value, run):
    x_seq = torch.randn(5, 3, 4)
    x_seq[2, 1, 3] = value
    node = framework.CoupledLIF()
    said = r"reaches .*bits=16.*fewer bits" if math.isfinite(value) else "(is infinite|holds NaN), "
    with pytest.raises(OverflowError, match=rf"CoupledLIF on \(3, 4\) {said}"):
        outcome(run, node, x_seq)
    outcome(run, node, x_seq.clamp(-100, 100).nan_to_num())


def test_states_that_grow_are_named_as_the_reason():
    x_seq = -torch.ones(100, 1, 2)
    with pytest.raises(OverflowError, match=r"beta=0\.5 is above 1 / tau=0\.25"):
        outcome(whole, spikingjelly.CoupledLIF(tau=4.0, beta=0.5), x_seq)
    outcome(whole, spikingjelly.CoupledLIF(tau=4.0, beta=0.125), x_seq)


@pytest.mark.parametrize("beta", [0.3, 0.0, -0.5, 2.0, math.nan, "half"])
def test_a_beta_that_is_no_power_of_two(beta):
    for framework in (spikingjelly, snntorch):
        with pytest.raises(ValueError, match="power of two"):
            framework.CoupledLIF(beta=beta)
    with pytest.raises(ValueError, match=r"Take 0\.25 or 0\.5"):
        spikingjelly.CoupledLIF(beta=0.3)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"tau": 0.5}, "tau=0.5"),
        ({"tau": math.inf}, "tau=inf"),
        ({"tau": 1.0, "learn_tau": True}, "start above 1"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"bits": 24}, "bits must be"),
        ({"bits": 2, "beta": 0.125}, "at least 3 bits"),
    ],
)
def test_settings_that_do_not_fit(setting, match):
    for framework in (spikingjelly, snntorch):
        with pytest.raises(ValueError, match=match):
            framework.CoupledLIF(**setting)


def test_inputs_that_do_not_fit():
    node = spikingjelly.CoupledLIF(step_mode="m")
    for shape, match in (((4, 3, 5), "5 channels"), ((0, 3, 4), "no time steps"), ((4, 3), "takes")):
        with pytest.raises(ValueError, match=match):
            node(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating-point"):
        node(torch.zeros(4, 3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 channels"):
        snntorch.CoupledLIF()(torch.zeros(2, 3))


def test_a_state_of_another_sequence():
    node = spikingjelly.CoupledLIF(step_mode="m")
    node(torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match="reset the network"):
        node(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="does not belong"):
        node(torch.zeros(4, 3, 2, dtype=torch.float64))
    functional.reset_net(node)
    node(torch.zeros(4, 2, 2))
    with pytest.raises(ValueError, match="does not belong"):
        snntorch.CoupledLIF()(torch.zeros(3, 2), torch.zeros(2, 2))


def test_what_was_changed_in_place_is_noticed():
    x_seq = torch.randn(5, 3, 4, requires_grad=True)
    y_seq, _ = whole(spikingjelly.CoupledLIF(), x_seq)
    y_seq.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_seq.sum().backward()
    node = snntorch.CoupledLIF()
    y0, s0 = node(x_seq[0], node.reset_mem())
    y1, _ = node(x_seq[1], s0)
    y0.detach().zero_()
    with pytest.raises(RuntimeError, match="output of CoupledLIF on"):
        y1.sum().backward()
    y0, s0 = node(x_seq[0], node.reset_mem())
    s0.detach().zero_()
    with pytest.raises(RuntimeError, match="state of CoupledLIF on"):
        y0.sum().backward()


@pytest.mark.parametrize(
    "function",
    [
        surrogate.PoissonPass(),
        surrogate.ATan(spiking=False),
        lambda u: u.clamp(0, 1),
        lambda u: (u > 0).float(),
    ],
    ids=["random", "not spiking", "not binary", "no gradient"],
)
def test_surrogates_that_can_not_be_undone(function):
    with pytest.raises(ValueError, match="can't undo"):
        whole(spikingjelly.CoupledLIF(surrogate_function=function), torch.zeros(2, 1, 2))


@pytest.mark.parametrize("function", [st_surrogate.SSO(), lambda u: (u > 0).float()])
def test_surrogates_of_snntorch_that_can_not_be_undone(function):
    with pytest.raises(ValueError, match="can't undo"):
        snntorch.CoupledLIF(spike_grad=function)(torch.zeros(1, 2))


def test_a_second_derivative_is_refused():
    x_seq = torch.randn(3, 2, 4, requires_grad=True)
    y_seq, _ = whole(spikingjelly.CoupledLIF(), x_seq)
    (g,) = torch.autograd.grad(y_seq.pow(2).sum(), x_seq, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# -- in the frameworks ------------------------------------------------------------------------------


def network(node=spikingjelly.CoupledLIF, depth=4, **kwargs):
    layers = []
    for i in range(depth):
        layers += [layer.Conv2d(2 if i == 0 else 6, 6, 3, padding=1), layer.BatchNorm2d(6), node(**kwargs)]
    model = nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(6, 3))
    functional.set_step_mode(model, "m")
    return model


def training_step(model, x_seq, check=False):
    model.zero_grad()
    functional.reset_net(model)
    if check:
        with srp.reversible(model, check=True):
            out = model(x_seq)
    else:
        out = model(x_seq)
    out.pow(2).sum().backward()
    return [out, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize("learn_tau", [False, True])
@pytest.mark.one_in(2)
def test_in_a_converted_network(learn_tau, mode):
    x_seq = torch.rand(6, 2, 2, 8, 8)
    model = network(learn_tau=learn_tau)
    converted = srp.convert_to_reversible(copy.deepcopy(model), mode=mode)
    assert not settings_of(converted).stays_stock
    expected = training_step(model, x_seq)
    assert_same(training_step(converted, x_seq), expected)
    assert_same(training_step(converted, x_seq, check=True), training_step(model, x_seq))
    functional.reset_net(converted)
    assert srp.verify(converted, x_seq).ok
    assert type(srp.restore(converted)[2]) is spikingjelly.CoupledLIF


def test_on_a_tape_outputs_are_stored_as_spikes():
    x_seq = torch.rand(8, 2, 2, 16, 16)
    model = network(depth=6)

    def held(model):
        functional.reset_net(model)
        return count_step(lambda: model(x_seq).pow(2).sum())[0] / (x_seq.numel() / 2 * 6 * 6)

    plainly = held(model)
    functional.reset_net(model)
    with_tape = held(srp.convert_to_reversible(model))
    # Outputs and the batch norms' inputs, 4 bytes each; two of three outputs become bits.
    assert plainly == pytest.approx(8 + 1 / 8 + 4 / 8, rel=0.05)
    assert with_tape < 2.5


def test_the_report_names_it():
    model = srp.convert_to_reversible(network())
    rows = {row.name: row for row in srp.memory_report(model, torch.rand(4, 2, 2, 8, 8)).modules}
    assert rows["2"].neuron == "reversed in time, grid arithmetic"
    assert rows["2"].bytes < rows["2"].stock_bytes


@pytest.mark.parametrize("states", ["carry", "reset"])
def test_inside_reversible_blocks(states):
    def branch():
        conv = layer.Conv2d(2, 2, 3, padding=1, step_mode="m")
        return nn.Sequential(spikingjelly.CoupledLIF(step_mode="m"), conv)

    blocks = [srp.RevSBlock(branch(), branch()) for _ in range(3)]
    model = srp.RevSSequence(blocks, states=states, check=True)
    twin = copy.deepcopy(model)
    twin.reversible = False
    x_seq = 2 * torch.randn(3, 2, 4, 5, 5)
    found = []
    for chain in (model, twin):
        x = x_seq.clone().requires_grad_()
        out = chain(x) + chain(x) if states == "carry" else chain(x)
        out.pow(2).sum().backward()
        found.append([out, x.grad, *(p.grad for p in chain.parameters())])
    assert_same(*found)
    assert model.last_rebuild.flipped_bits == 0


def test_a_loop_in_a_converted_network():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(8, 16), snntorch.CoupledLIF()
            self.fc2, self.lif2 = nn.Linear(16, 8), snntorch.CoupledLIF(learn_tau=True)

        def forward(self, x_seq):
            mem1, mem2, outputs = self.lif1.reset_mem(), self.lif2.reset_mem(), []
            for x in x_seq:
                y, mem1 = self.lif1(self.fc1(x), mem1)
                y, mem2 = self.lif2(self.fc2(y), mem2)
                outputs.append(y)
            return torch.stack(outputs)

    model, x_seq = Loop(), 2 * torch.randn(20, 3, 8)
    found = []
    for convert in (lambda model: model, srp.convert_to_reversible):
        converted = convert(model)
        converted.zero_grad()
        converted(x_seq).pow(2).sum().backward()
        found.append([p.grad.clone() for p in converted.parameters()])
    assert_same(*found)


@pytest.mark.slow
def test_a_long_loop_leaves_no_cycles_behind():
    node, x = snntorch.CoupledLIF(), torch.randn(2, 4, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with AllocationCounter() as counter:
            mem = node.reset_mem()
            for _ in range(500):  # a membrane kept by each would be 16,000 bytes
                spk, mem = node(x, mem)
            spk.sum().backward()
            del spk, mem
            node.reset_mem()
        assert counter.live < 1000
    finally:
        gc.enable()


def test_a_users_subclass_is_left_as_it_is():
    class Own(spikingjelly.CoupledLIF):
        pass

    model = srp.convert_to_reversible(network(Own))
    assert type(model[2]) is Own
    training_step(model, torch.rand(4, 2, 2, 8, 8))


def test_resets_and_hidden_states_of_spikingjelly():
    node = spikingjelly.CoupledLIF(step_mode="m")
    x_seq = torch.randn(6, 2, 4)
    together, _ = whole(node, x_seq)
    assert torch.equal(torch.cat([node(x_seq[:4]), node(x_seq[4:])]), together)
    assert isinstance(node.v, torch.Tensor)
    functional.reset_net(node)
    assert node.v == 0.0
    node.step_mode = "s"
    x = x_seq[0].clone().requires_grad_()
    node(x)
    functional.detach_net(node)
    assert node.v.grad_fn is None


def test_resets_and_hidden_states_of_snntorch():
    net = nn.Sequential(nn.Linear(4, 6), snntorch.CoupledLIF(init_hidden=True))
    x_seq = 20 * torch.randn(5, 2, 4)
    utils.reset(net)
    first = torch.stack([net(x) for x in x_seq])
    again = torch.stack([net(x) for x in x_seq])
    assert net[1].mem.grad_fn is not None and not torch.equal(first, again)
    utils.reset(net)
    assert net[1].mem.grad_fn is None
    assert torch.equal(torch.stack([net(x) for x in x_seq]), first)
    assert net(x_seq[0, :1]).shape == (1, 6)  # a batch of another size starts afresh
    with pytest.raises(TypeError, match="init_hidden"):
        net[1](torch.zeros(2, 6), torch.zeros(2, 6))
    spk, mem = snntorch.CoupledLIF(init_hidden=True, output=True)(torch.zeros(2, 6))
    assert spk.shape == mem.shape


@pytest.mark.parametrize("framework", [spikingjelly, snntorch])
def test_copies_pickles_and_state_dicts(framework):
    node = framework.CoupledLIF(3.0, 0.25, 0.25, learn_tau=True)
    x_seq = torch.randn(4, 2, 4)
    assert list(node.state_dict()) == ["w"]
    assert node.tau == pytest.approx(3.0)
    twins = [copy.deepcopy(node)]
    if framework is spikingjelly:  # snnTorch's surrogates are closures
        twins.append(pickle.loads(pickle.dumps(node)))
    for twin in twins:
        assert_same(outcome(whole, twin, x_seq), outcome(whole, node, x_seq))
    assert "beta=0.25" in repr(node)


def test_registered_by_name():
    srp.register()
    from spikingjelly.activation_based import neuron

    assert neuron.CoupledLIF is spikingjelly.CoupledLIF


def test_run_sequence_is_public_to_other_frameworks():
    x_seq = torch.randn(4, 2, 4, requires_grad=True)
    known = surrogate_of_snntorch(st_surrogate.atan(), torch.float32)
    y_seq, s = run_sequence(x_seq, None, coupled.Node(constants_of(), known, "mine"))
    assert_same((y_seq, s), coupled.sequence(x_seq, None, constants_of(), st_surrogate.atan()))
