"""snnTorch neurons step by step against stock: outputs, gradients and attributes, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import snntorch
import torch
from snntorch import surrogate
from torch import Tensor, nn

from snn_reversible_plugin.snntorch import RevLeaky
from snn_reversible_plugin.snntorch import steps as analytic
from snntorch_against_stock import (
    RESETS,
    STATES,
    assert_same,
    charged_fixture,  # noqa: F401
    converted,
    equal,
    inputs,
    make,
    one_thread_fixture,  # noqa: F401
    trajectory,
)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("hidden", [False, True], ids=["explicit", "hidden"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", STATES)
def test_steps_are_stock_steps(
    kind: str, reset: str, learned: bool, hidden: bool, charged: list[str]
) -> None:
    neuron = make(kind, learned, reset_mechanism=reset, init_hidden=hidden)
    for steps, every in itertools.product((1, 5), (True, False)):
        assert_same(neuron, inputs(steps, 3, 4), every=every)
    if not hidden:
        for requires_grad in (False, True):
            start = tuple(torch.randn(3, 4).requires_grad_(requires_grad) for _ in range(STATES[kind]))
            assert_same(neuron, inputs(4, 3, 4), start=start)
    assert bool(charged) == (kind != "Alpha" or reset == "zero")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", STATES)
def test_inputs_without_a_gradient(kind: str, reset: str) -> None:
    """Only what depends on a learned parameter has a gradient then, and the user can see it."""
    for learned in ({}, {"learn_threshold": True}, {"learn_beta": True}, {"learn_alpha": True}):
        if learned.keys() & {"learn_beta", "learn_alpha"} and kind in ("Lapicque", "Alpha"):
            continue
        if "learn_alpha" in learned and not kind.endswith("Synaptic"):
            continue
        for delay in (True, False) if kind in ("Leaky", "Synaptic", "RLeaky") else (True,):
            delayed = {} if delay else {"reset_delay": False}
            neuron = make(kind, reset_mechanism=reset, **learned, **delayed)
            for start in ((), tuple(torch.randn(3, 4) for _ in range(STATES[kind]))):
                assert_same(neuron, inputs(3, 3, 4), of_inputs=False, start=start)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", STATES)
def test_fifty_steps(kind: str) -> None:
    assert_same(make(kind, True, spike_grad=surrogate.fast_sigmoid()), inputs(50, 5, 4))


@pytest.mark.parametrize("reset", RESETS[:2])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "RLeaky"])
def test_reset_without_delay(kind: str, reset: str, charged: list[str]) -> None:
    for learned, hidden in itertools.product((False, True), (False, True)):
        settings = {"reset_mechanism": reset, "reset_delay": False, "init_hidden": hidden}
        assert_same(make(kind, learned, **settings), inputs(6, 3, 4))
    assert charged


def test_reset_without_delay_fails_in_rsynaptic_as_in_stock() -> None:
    neuron = make("RSynaptic", reset_delay=False)
    for one in (neuron, converted(neuron)):
        with pytest.raises(TypeError, match="NoneType"):
            one(torch.randn(3, 4).requires_grad_())


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "shape", [(4,), (0, 4), (1, 4), (2, 7, 4), (2, 3, 5, 4), (0, 3, 5, 4), (3, 0)], ids=str
)
@pytest.mark.parametrize("kind", ["Leaky", "Lapicque", "Synaptic", "Alpha"])
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    for reset in RESETS:
        assert_same(make(kind, True, reset_mechanism=reset), inputs(3, *shape))


def test_a_single_number_is_left_to_stock(charged: list[str]) -> None:
    assert_same(make("Leaky", True), inputs(3))
    assert not charged


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["atan", "fast_sigmoid", "sigmoid", "straight_through_estimator"])
@pytest.mark.parametrize("kind", ["Leaky", "Lapicque", "Synaptic", "RSynaptic"])
def test_layouts(kind: str, name: str) -> None:
    """Channels-last inputs under contiguous gradients: the order of a threshold's sum depends on it."""
    conv = {"conv2d_channels": 4, "kernel_size": 3} if kind.startswith("R") else {}
    for reset in RESETS:
        neuron = make(kind, True, reset_mechanism=reset, spike_grad=getattr(surrogate, name)(), **conv)
        xs = [x.contiguous(memory_format=torch.channels_last) for x in inputs(4, 2, 4, 6, 5)]
        assert_same(neuron, xs)
        assert_same(neuron, [torch.randn(2, 5, 4, 6).transpose(1, 2) for _ in range(3)])
        assert_same(neuron, [torch.randn(2, 4, 1, 5).expand(2, 4, 6, 5) for _ in range(2)])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "RLeaky", "RSynaptic"])
@pytest.mark.parametrize("shape", [(4,), (1,), (3, 4)], ids=str)
def test_parameters_of_each_neuron(kind: str, shape: tuple[int, ...], charged: list[str]) -> None:
    for reset, learned in itertools.product(RESETS, (False, True)):
        values = {"beta": torch.rand(shape) * 1.3 - 0.1, "threshold": torch.rand(shape) + 0.5}
        if kind.endswith("Synaptic"):
            values["alpha"] = torch.rand(shape) * 1.3 - 0.1
        assert_same(make(kind, learned, reset_mechanism=reset, **values), inputs(4, 3, 4))
    assert charged


@pytest.mark.parametrize("kind", ["RLeaky", "RSynaptic"])
def test_recurrent_layers(kind: str, charged: list[str]) -> None:
    for reset, learned in itertools.product(RESETS, (False, True)):
        settings = {"reset_mechanism": reset, "learned": learned}
        assert_same(make(kind, all_to_all=False, V=torch.rand(4), **settings), inputs(5, 3, 4))
        conv = make(kind, conv2d_channels=3, kernel_size=(3, 1), **settings)
        assert_same(conv, inputs(5, 2, 3, 5, 4))
    assert charged


def test_a_recurrent_layer_of_ones_own_is_left_to_stock(charged: list[str]) -> None:
    neuron = make("RLeaky", True)
    neuron.recurrent = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    twin = converted(neuron)
    torch.manual_seed(1)
    expected = trajectory(neuron, inputs(1, 3, 4))
    torch.manual_seed(1)
    assert equal(expected, trajectory(twin, inputs(1, 3, 4)))
    assert not charged


def test_a_tensor_in_two_roles() -> None:
    """The membrane as current, and as the spikes that a recurrent layer reads."""
    for kind in STATES:
        neuron = make(kind, True)
        found = []
        for one in (neuron, converted(neuron)):
            torch.manual_seed(2)
            leaf = torch.randn(5, 4).requires_grad_()
            first = leaf * 2
            out = one(first, *[first] * STATES[kind])
            torch.autograd.backward([first, *out], [torch.randn(5, 4) for _ in range(len(out) + 1)])
            found.append([leaf.grad, *[p.grad for p in one.parameters()]])
        assert equal(*found), kind


# Surrogates.

CLOSURES = {
    "atan": surrogate.atan(1.3),
    "fast_sigmoid": surrogate.fast_sigmoid(slope=10),
    "fast_sigmoid, float": surrogate.fast_sigmoid(slope=7.3),
    "sigmoid": surrogate.sigmoid(slope=4),
    "straight_through_estimator": surrogate.straight_through_estimator(),
    "triangular": surrogate.triangular(0.8),
    "heaviside": surrogate.heaviside(),
    "spike_rate_escape": surrogate.spike_rate_escape(beta=2, slope=3),
    "SFS": surrogate.SFS(slope=5, B=0.2),
    "SSO": surrogate.SSO(mean=0.1, variance=0.4),
    "custom_surrogate": surrogate.custom_surrogate(lambda x, grad, out: grad * x.cos() + out),
    "lambda": lambda x: surrogate.FastSigmoid.apply(x, 4.0),
    "tensor": surrogate.fast_sigmoid(slope=torch.tensor(6.0)),
    "soft": torch.sigmoid,
}
ANALYTIC = set(CLOSURES) - {"SSO", "custom_surrogate", "lambda", "tensor", "soft"}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("kind", ["Leaky", "RSynaptic"])
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", CLOSURES)
def test_surrogates(name: str, reset: str, kind: str, charged: list[str]) -> None:
    assert (analytic.known_surrogate(CLOSURES[name]) is not None) == (name in ANALYTIC)
    for dtype in (torch.float32, torch.float64):
        one_to_one = {"all_to_all": False} if kind.startswith("R") else {}
        neuron = make(kind, True, reset_mechanism=reset, spike_grad=CLOSURES[name], **one_to_one)
        assert_same(neuron.to(dtype), inputs(4, 3, 4, dtype=dtype))
    assert charged


def test_lso_fails_as_in_stock() -> None:
    """snnTorch 1.0 calls its stochastic operator with an argument missing."""
    for one in (snntorch.Leaky(0.9, spike_grad=surrogate.LSO()), RevLeaky(0.9, spike_grad=surrogate.LSO())):
        with pytest.raises(TypeError, match="missing"):
            one(torch.randn(3, 4).requires_grad_())


def test_parameters_inside_a_custom_surrogate_get_their_gradient() -> None:
    gradients = []
    for cls in (snntorch.Leaky, RevLeaky):
        torch.manual_seed(3)
        slope = nn.Parameter(torch.tensor(2.0))

        def fire(x: Tensor, slope: Tensor = slope) -> Tensor:
            soft = torch.sigmoid(slope * x)
            return soft + ((x > 0).float() - soft).detach()

        neuron = cls(0.9, spike_grad=fire)
        loss, mem = 0.0, neuron.reset_mem()
        for x in inputs(5, 3, 4):
            spk, mem = neuron(x.requires_grad_(), mem)
            loss = loss + (spk * torch.randn(3, 4)).sum() + mem.square().sum()
        loss.backward()
        gradients.append(slope.grad)
    assert equal(*gradients)
    assert gradients[0] is not None


def test_a_surrogate_that_another_version_computes_differently_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from snn_reversible_plugin.snntorch import surrogates

    surrogates._trusted.cache_clear()
    monkeypatch.setattr(surrogate.ATan, "backward", staticmethod(lambda ctx, grad: (grad * 0.5, None)))
    try:
        assert surrogates.known_surrogate(surrogate.atan(1.75)) is None
    finally:
        surrogates._trusted.cache_clear()


# Numbers.


@pytest.mark.parametrize("kind", ["Leaky", "Lapicque", "Synaptic", "Alpha"])
def test_float64(kind: str, charged: list[str]) -> None:
    for reset, whole in itertools.product(RESETS, (False, True)):
        neuron = make(kind, True, reset_mechanism=reset)
        assert_same(neuron.double() if whole else neuron, inputs(4, 3, 4, dtype=torch.float64))
    neuron = make(kind, True, threshold=torch.rand(4, dtype=torch.float64), reset_mechanism="subtract")
    assert_same(neuron, inputs(3, 3, 4))
    assert charged


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["Leaky", "Lapicque", "Synaptic", "Alpha"])
def test_half_precision_currents(kind: str, dtype: torch.dtype) -> None:
    for reset in RESETS:
        neuron = make(kind, True, reset_mechanism=reset)
        assert_same(neuron, inputs(5, 3, 4, dtype=dtype))
        assert_same(neuron, inputs(3, 3, 4, dtype=dtype), start=(torch.randn(3, 4),) * STATES[kind])
        assert_same(neuron.to(dtype), inputs(5, 3, 4, dtype=dtype))


def test_nan_and_infinity() -> None:
    for kind in ("Leaky", "Lapicque", "Synaptic", "Alpha"):
        xs = inputs(4, 3, 4)
        xs[1][0, 0], xs[1][1, 1], xs[2][2, 2] = float("nan"), float("inf"), -float("inf")
        for reset in RESETS:
            assert_same(make(kind, True, reset_mechanism=reset), xs)
