"""snnTorch neurons against stock: outputs, gradients and attributes, bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
import torch.nn.functional as F
from snntorch import functional, surrogate, utils
from snntorch.functional.quant import state_quant
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.memory import count_step
from snn_reversible_plugin.registry import StaysStock, reversible_type
from snn_reversible_plugin.snntorch import RevLapicque, RevLeaky, RevSynaptic, analytic, register, step


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype is b.dtype and a.shape == b.shape and a.stride() == b.stride()
        return same and torch.equal(torch.nan_to_num(a, 77.0), torch.nan_to_num(b, 77.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def detached(values: Any) -> Any:
    return [v.detach().clone() if isinstance(v, Tensor) else v for v in values]


def attributes(neuron: nn.Module) -> dict[str, Any]:
    names = ("mem", "syn", "syn_exc", "syn_inh", "spk", "reset")
    found = {name: getattr(neuron, name) for name in names if hasattr(neuron, name)}
    return {name: value.detach().clone() for name, value in found.items()}


def trajectory(
    neuron: nn.Module,
    xs: list[Tensor],
    every: bool = True,
    start: tuple[Tensor, ...] = (),
    of_inputs: bool = True,
) -> list[Any]:
    """All that a user can see of a loop over time and its backward.

    Gradients enter at every output (or the last step's), and at the input current too, so that more
    than two terms meet at each tensor.
    """
    generator = torch.Generator().manual_seed(len(xs))

    def like(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return noise.to(tensor.dtype)

    leaves = [x.detach().clone().requires_grad_(of_inputs) for x in xs]
    currents = [leaf * 1.5 for leaf in leaves]
    state = tuple(s.detach().clone().requires_grad_(s.requires_grad) for s in start)
    first = state
    outputs = []
    for current in currents:
        out = neuron(current, *state)
        out = out if isinstance(out, tuple) else (out,)
        outputs.append(out)
        if not neuron.init_hidden:
            state = out[-neuron_states(neuron) :]
    torch.manual_seed(5)  # some surrogates draw random numbers in their backward
    tensors = [*currents, *itertools.chain.from_iterable(outputs)]
    roots = tensors if every else [currents[-1], *outputs[-1]]
    roots = [root for root in roots if root.requires_grad]
    grads = [like(root) for root in roots]
    if roots:
        torch.autograd.backward(roots, grads)
    parameters = {name: p.grad for name, p in neuron.named_parameters()}
    of_start = [s.grad for s in first]
    neuron.zero_grad()
    seen = [t.requires_grad for t in tensors], detached(tensors), [x.grad for x in leaves]
    return [*seen, of_start, parameters, attributes(neuron)]


STATES = {"Leaky": 1, "Lapicque": 1, "Synaptic": 2, "Alpha": 3, "RLeaky": 2, "RSynaptic": 3}


def neuron_states(neuron: nn.Module) -> int:
    names = [cls.__name__ for cls in type(neuron).__mro__]
    return next(count for name, count in STATES.items() if name in names)


def converted(neuron: nn.Module) -> nn.Module:
    """A copy with the reversible class, outside of any converted model."""
    twin = copy.deepcopy(neuron)
    twin.__class__ = reversible_type(neuron)
    return twin


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and wait for each other where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NAMES = ("requires_grad", "outputs", "input gradients", "state gradients", "parameters", "attributes")


def assert_same(neuron: nn.Module, xs: list[Tensor], **kwargs: Any) -> nn.Module:
    """The converted neuron, after a run without a tape and one with it gave what stock gives."""
    twins = [converted(neuron) for _ in range(2)]
    expected = trajectory(copy.deepcopy(neuron), xs, **kwargs)
    for twin, context in zip(twins, (nullcontext(), tape.recording()), strict=True):
        with context:
            actual = trajectory(twin, xs, **kwargs)
        for what, a, b in zip(NAMES, expected, actual, strict=True):
            assert equal(a, b), f"{what} ({context})"
    return twins[0]


def inputs(steps: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) * 1.3 + 0.4 for _ in range(steps)]


@pytest.fixture
def charged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The charges that ran analytically, by name."""
    seen: list[str] = []
    apply = step.Charging.apply

    def watched(plan: step.Plan, *args: Any) -> Any:
        seen.append(plan.charge.__name__)
        return apply(plan, *args)

    monkeypatch.setattr(step.Charging, "apply", watched)
    return seen


def make(kind: str, learned: bool = False, **settings: Any) -> nn.Module:
    """A neuron for inputs of 4 features, with everything learned that its type can learn."""
    settings = {"learn_threshold": learned} | settings
    if kind == "Alpha":
        return snntorch.Alpha(**{"alpha": 0.9, "beta": 0.7} | settings)
    if kind == "Lapicque":
        return snntorch.Lapicque(**({"R": 2.0, "C": 1.5} if "beta" not in settings else {}) | settings)
    settings = {"beta": 0.8, "learn_beta": learned} | settings
    if kind.endswith("Synaptic"):
        settings = {"alpha": 0.7, "learn_alpha": learned} | settings
    if kind.startswith("R"):
        settings = {"learn_recurrent": learned} | settings
        if not {"all_to_all", "conv2d_channels"} & settings.keys():
            settings["linear_features"] = 4
    return getattr(snntorch, kind)(**settings)


RESETS = ("subtract", "zero", "none")


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


@pytest.mark.parametrize("name", CLOSURES)
def test_surrogates(name: str, charged: list[str]) -> None:
    assert (analytic.derivative_of(CLOSURES[name]) is not None) == (name in ANALYTIC)
    for kind, reset in itertools.product(("Leaky", "RSynaptic"), RESETS):
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
        assert surrogates.derivative_of(surrogate.atan(1.75)) is None
    finally:
        surrogates._trusted.cache_clear()


# Settings.


@pytest.mark.parametrize("delay", [True, False], ids=["delayed", "undelayed"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_graded_spikes(learned: bool, delay: bool) -> None:
    for factor, reset in itertools.product((1.0, 0.3, torch.tensor([1.0]), torch.rand(4)), RESETS):
        neuron = snntorch.Leaky(
            0.9,
            graded_spikes_factor=factor,
            learn_graded_spikes_factor=learned,
            reset_mechanism=reset,
            reset_delay=delay,
        )
        assert_same(neuron, inputs(4, 3, 4))


def test_inhibition() -> None:
    with pytest.warns(UserWarning, match="unstable"):
        neuron = snntorch.Leaky(0.9, inhibition=True, learn_beta=True, learn_threshold=True)
    assert_same(neuron, inputs(4, 3, 4))


@pytest.mark.parametrize("kind", STATES)
def test_state_quant_runs_stocks_step(kind: str, charged: list[str]) -> None:
    neuron = make(kind, True, state_quant=state_quant(num_bits=4, uniform=True))
    assert reversible_type(neuron).treatment == "stock step, replayed from its states"
    twin = assert_same(neuron, inputs(4, 3, 4))
    assert isinstance(twin, getattr(snntorch, kind))
    assert not charged


def test_surrogate_disable() -> None:
    for learned in (False, True):
        assert_same(make("Leaky", learned, surrogate_disable=True), inputs(4, 3, 4))


@pytest.mark.parametrize(
    "given",
    [
        {"beta": 0.7},
        {"beta": 0.7, "R": 2.0},
        {"beta": 0.7, "C": 2.0},
        {"R": torch.tensor(2), "C": torch.tensor(3)},
        {"R": 1.0, "C": 2.0, "per_neuron": (torch.rand(4) + 1, torch.rand(4) + 1)},
        {"R": 1.0, "C": 2.0, "time_step": 0.5},
    ],
    ids=["beta", "beta R", "beta C", "integers", "each neuron", "time_step"],
)
def test_lapicque_constants(given: dict[str, Any], charged: list[str]) -> None:
    scalars = {name: value for name, value in given.items() if name != "per_neuron"}
    for reset in RESETS:
        neuron = snntorch.Lapicque(**scalars, learn_threshold=True, reset_mechanism=reset)
        if "per_neuron" in given:
            neuron.R, neuron.C = given["per_neuron"]
        assert_same(neuron, inputs(4, 3, 4))
    assert charged


def test_lapicque_whose_constants_are_learned_runs_stocks_step(charged: list[str]) -> None:
    neuron = snntorch.Lapicque(beta=0.7, learn_beta=True)
    assert reversible_type(neuron).treatment == "stock step, replayed from its states"
    x, w = torch.randn(3, 4), torch.randn(3, 4)
    gradients = []
    for cls in (type(neuron), reversible_type(neuron)):
        one = snntorch.Lapicque(beta=0.7, learn_beta=True)
        one.__class__ = cls
        with tape.recording():
            spk, mem = one(x.clone().requires_grad_())
        ((spk + mem) * w).sum().backward()
        gradients.append(one.beta.grad)
    assert equal(*gradients)
    assert not charged


def test_alpha_with_a_learned_beta_runs_stocks_step(charged: list[str]) -> None:
    for reset in RESETS:
        assert_same(make("Alpha", True, learn_beta=True, reset_mechanism=reset), inputs(4, 3, 4))
    assert not charged


def test_settings_changed_later() -> None:
    neuron = make("Leaky", True)
    neuron.reset_mechanism = "zero"  # in snnTorch 1.0 this changes the reset without delay alone
    assert_same(neuron, inputs(4, 3, 4))
    neuron.reset_delay = False
    assert_same(neuron, inputs(4, 3, 4))
    neuron.spike_grad = CLOSURES["soft"]
    assert_same(neuron, inputs(4, 3, 4))
    neuron.load_state_dict(make("Leaky", True, reset_mechanism="none").state_dict())
    assert_same(neuron, inputs(4, 3, 4))


@pytest.mark.parametrize("where", ["subclass", "instance"])
@pytest.mark.parametrize("method", ["fire", "mem_reset", "_base_state_function"])
def test_overridden_methods_are_called(method: str, where: str) -> None:
    def changed(self: Any, value: Tensor) -> Tensor:
        return getattr(snntorch.Leaky, method)(self, value) * 0.5

    results = []
    for base in (snntorch.Leaky, RevLeaky):
        if where == "subclass":
            neuron = type("Own", (base,), {method: changed})(0.9, learn_beta=True)
        else:
            neuron = base(0.9, learn_beta=True)
            setattr(neuron, method, changed.__get__(neuron))
        torch.manual_seed(4)
        results.append(trajectory(neuron, inputs(4, 3, 4)))
    assert equal(*results)


# Numbers.


@pytest.mark.parametrize("kind", ["Leaky", "Lapicque", "Synaptic", "Alpha"])
def test_float64(kind: str, charged: list[str]) -> None:
    for reset, whole in itertools.product(RESETS, (False, True)):
        neuron = make(kind, True, reset_mechanism=reset)
        assert_same(neuron.double() if whole else neuron, inputs(4, 3, 4, dtype=torch.float64))
    neuron = make(kind, True, threshold=torch.rand(4, dtype=torch.float64), reset_mechanism="subtract")
    assert_same(neuron, inputs(3, 3, 4))
    assert charged


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


# Autograd.


def test_the_gradient_of_a_membrane_contains_what_comes_through_its_spikes() -> None:
    for kind, reset in itertools.product(STATES, RESETS):
        neuron = make(kind, True, reset_mechanism=reset)
        found = []
        for one in (neuron, converted(neuron)):
            torch.manual_seed(6)
            state: tuple[Tensor, ...] = ()
            states, loss = [], torch.zeros(())
            for x in inputs(3, 5, 4):
                out = one(x.requires_grad_(), *state)
                state = out[-STATES[kind] :]
                states += [s for s in state if s.requires_grad]
                loss = loss + (out[0] * torch.randn(5, 4)).sum() + (out[-1] * torch.randn(5, 4)).sum()
            for s in states:
                s.retain_grad()
            partial = torch.autograd.grad(loss, states, retain_graph=True, allow_unused=True)
            loss.backward()
            found.append([list(partial), [s.grad for s in states]])
        assert equal(*found), (kind, reset)


def test_several_backward_passes() -> None:
    neuron = make("Leaky", True, reset_mechanism="zero")
    found = []
    for one, context in ((neuron, nullcontext()), (converted(neuron), tape.recording())):
        torch.manual_seed(7)
        x = torch.randn(5, 4).requires_grad_()
        with context:
            spk, mem = one(x * 1, torch.randn(5, 4))
            spk, mem = one(x * 2, mem)
        spk.sum().backward(retain_graph=True)
        (mem * 2).sum().backward(retain_graph=True)
        (spk + mem).sum().backward()
        found.append([x.grad, *[p.grad for p in one.parameters()]])
        with pytest.raises(RuntimeError, match="second time"):
            mem.sum().backward()
    assert equal(*found)


def test_double_backward_is_refused() -> None:
    x = torch.randn(5, 4).requires_grad_()
    spk, mem = RevLeaky(0.9)(x, torch.randn(5, 4).requires_grad_())
    (grad,) = torch.autograd.grad((spk * mem).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_changes_in_place_before_the_backward() -> None:
    def run(neuron: nn.Module, change: str) -> Tensor:
        torch.manual_seed(8)
        x = torch.randn(5, 4).requires_grad_()
        spk, mem = neuron(x, torch.randn(5, 4))
        with torch.no_grad():
            target = mem if change == "mem" else getattr(neuron, change)
            target.mul_(0.5)
        (spk * torch.randn(5, 4)).sum().backward()
        assert x.grad is not None
        return x.grad

    for change in ("mem", "threshold"):
        expected = run(snntorch.Leaky(0.9), change)
        with tape.recording():
            assert equal(run(RevLeaky(0.9), change), expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(RevLeaky(0.9), change)


def test_spikes_and_membranes_may_be_masked_in_place() -> None:
    found = []
    for cls, context in ((snntorch.Leaky, nullcontext()), (RevLeaky, tape.recording())):
        torch.manual_seed(9)
        neuron, mask = cls(0.9, learn_beta=True), (torch.rand(5, 4) > 0.5).float()
        x, mem = torch.randn(5, 4).requires_grad_(), torch.randn(5, 4)
        with context:
            for _ in range(3):
                spk, mem = neuron(x + 0.5, mem)
                spk *= mask
                mem = mem + spk
        (spk + mem).square().sum().backward()
        found.append([x.grad, neuron.beta.grad, neuron.reset])
    assert equal(*found)


def test_without_a_gradient_the_stock_step_runs(charged: list[str]) -> None:
    neuron = make("Leaky", True)
    twin = converted(neuron)
    x = torch.randn(3, 4)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert equal(neuron(x), twin(x))
    assert not charged


# States.


def test_passing_a_hidden_state_fails_as_in_stock() -> None:
    for kind in STATES:
        neuron = make(kind, init_hidden=True)
        for one in (neuron, converted(neuron)):
            with pytest.raises(TypeError, match="init_hidden=True"):
                one(torch.randn(3, 4).requires_grad_(), mem=torch.zeros(3, 4))


@pytest.mark.parametrize("kind", STATES)
def test_another_shape_starts_from_zeros(kind: str) -> None:
    neuron = make(kind, True, init_hidden=True, output=True)
    assert_same(neuron, [*inputs(2, 3, 4), *inputs(2, 5, 4), *inputs(2, 3, 4)])


@pytest.mark.parametrize("kind", STATES)
def test_truncated_backpropagation(kind: str) -> None:
    """Losses of two steps at a time, states detached in place between them; then a fresh sequence."""
    torch.manual_seed(10)
    net = nn.Sequential(nn.Linear(4, 4), make(kind, True, init_hidden=True), nn.Linear(4, 2))
    other = srp.convert_to_reversible(copy.deepcopy(net))
    xs = inputs(6, 5, 4)
    found = []
    for one in (net, other):
        snntorch.SpikingNeuron.instances = [one[1]]
        optimizer = torch.optim.SGD(one.parameters(), 0.1)
        losses = []
        for _ in range(2):
            utils.reset(one)
            assert not one[1].mem.any()
            for first in range(0, 6, 2):
                loss = sum(one(x).square().mean() for x in xs[first : first + 2])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                type(one[1]).detach_hidden()
                if kind == "RSynaptic":
                    one[1].spk.detach_()  # snnTorch 1.0 forgets it
                losses.append(loss.detach())
        found.append([losses, [p.detach() for p in one.parameters()], attributes(one[1])])
    assert equal(*found)


def test_resets_of_states() -> None:
    for cls, method in ((RevLeaky, "init_leaky"), (RevLapicque, "init_lapicque")):
        neuron = cls(beta=0.9, init_hidden=True)
        neuron(torch.ones(3, 4).requires_grad_())
        assert neuron.mem.requires_grad
        assert not getattr(neuron, method)().any()
        assert not neuron.mem.requires_grad
        neuron(torch.ones(3, 4).requires_grad_())
        cls.reset_hidden()
        assert not neuron.mem.any()
    neuron = RevSynaptic(0.9, 0.8)
    assert all(not state.any() for state in neuron.init_synaptic())


def test_instances_keep_their_identity() -> None:
    neuron = make("Leaky", True)
    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(4, 4), neuron))
    assert net[1] is neuron
    assert any(one is neuron for one in snntorch.SpikingNeuron.instances)
    assert type(neuron) is RevLeaky
    srp.restore(net)
    assert type(neuron) is snntorch.Leaky


def straight(x: Tensor) -> Tensor:
    return surrogate.StraightThroughEstimator.apply(x)


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("quantized", [False, True])
def test_copies_and_files(kind: str, quantized: bool) -> None:
    neuron = make(kind, True, spike_grad=straight)
    net = nn.Sequential(nn.Linear(4, 4), neuron)
    if quantized:
        neuron.state_quant = torch.round
    keys = list(net.state_dict())
    srp.convert_to_reversible(net)
    assert list(net.state_dict()) == keys
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(stream, weights_only=False)
    x = torch.randn(3, 4)
    expected = net(x)
    for one in copies:
        assert type(one[1]) is type(neuron)
        assert one[1].state_function.__self__ is one[1]
        assert equal(one(x), expected)


# The converter.

OTHERS = {
    "SLSTM": lambda: snntorch.SLSTM(4, 4, init_hidden=True),
    "SConv2dLSTM": lambda: snntorch.SConv2dLSTM(2, 2, 3, init_hidden=True),
    "LeakyParallel": lambda: snntorch.LeakyParallel(4, 4, beta=0.9),
    "StateLeaky": lambda: snntorch.StateLeaky(beta=0.9, channels=4, learn_beta=True),
    "LinearLeaky": lambda: snntorch.LinearLeaky(beta=0.9, in_features=4, out_features=4),
    "AssociativeLeaky": lambda: snntorch.AssociativeLeaky(4, 2, 2, 4),
    "DeltaLeaky": lambda: snntorch.DeltaLeaky(0.5, beta=0.9, init_hidden=True),
}
ABSTRACT = {"SpikingNeuron", "LIF"}


def namespace() -> list[str]:
    register()
    return sorted(
        name
        for name, value in vars(snntorch).items()
        if isinstance(value, type)
        and issubclass(value, nn.Module)
        and not name.startswith(("Rev", "BatchNorm", "Graded"))
        and name not in ABSTRACT
    )


def test_every_type_of_the_namespace_is_answered_for() -> None:
    assert set(namespace()) == set(STATES) | set(OTHERS)


@pytest.mark.parametrize("name", [*STATES, *OTHERS])
def test_every_type_converted_equals_stock(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(2, 2, 3, padding=1) if name == "SConv2dLSTM" else nn.Linear(4, 4)
            self.neuron = OTHERS[name]() if name in OTHERS else make(name, True, init_hidden=True)
            self.last = snntorch.Leaky(0.8, init_hidden=True)

        def forward(self, xs: Tensor) -> Tensor:
            whole = name in ("LeakyParallel", "StateLeaky", "LinearLeaky", "AssociativeLeaky")
            outs = [self.neuron(self.inner(x)) for x in ([xs] if whole else xs)]
            return torch.stack([self.last(out[0] if isinstance(out, tuple) else out) for out in outs])

    net = Net()
    other = srp.convert_to_reversible(copy.deepcopy(net))
    xs = torch.randn(3, 2, 2, 5, 5) if name == "SConv2dLSTM" else torch.randn(3, 2, 4)
    found = []
    for one in (net, other):
        torch.manual_seed(11)
        out = one(xs)
        (out * torch.randn_like(out)).sum().backward()
        found.append([out.detach(), [p.grad for p in one.parameters()]])
    assert equal(*found)
    if name in STATES:
        assert other.neuron.treatment == "analytic step"
        assert other.neuron.arithmetic == "stock"
        assert isinstance(other.neuron, getattr(snntorch, name))
    else:
        assert type(other.neuron) is getattr(snntorch, name)
        with pytest.raises(StaysStock) as refusal:
            reversible_type(net.neuron)
        reasons = ("LSTM", "torch.nn.RNN", "whole sequence", "never reset")
        assert any(reason in str(refusal.value) for reason in reasons)


def test_an_unknown_subclass_stays_stock() -> None:
    class Own(snntorch.Leaky):
        pass

    assert reversible_type(Own(0.9)) is None


def test_register() -> None:
    register()
    assert snntorch.RevLeaky is RevLeaky
    assert snntorch.RevLapicque is RevLapicque
    assert snntorch.RevSynaptic is RevSynaptic


def test_without_snntorch_the_error_names_the_extra() -> None:
    program = "import sys; sys.modules['snntorch'] = None; import snn_reversible_plugin.snntorch"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError" in result.stderr
    assert "pip install snn-reversible-plugin[snntorch]" in result.stderr


# Networks.


class Tutorial5(nn.Module):
    """The fully connected network of snnTorch's tutorial 5, its loop over time in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 1000)
        self.lif1 = snntorch.Leaky(beta=0.95)
        self.fc2 = nn.Linear(1000, 10)
        self.lif2 = snntorch.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spk_rec, mem_rec = [], []
        for _ in range(25):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def test_tutorial_5() -> None:
    net = Tutorial5()
    other = srp.convert_to_reversible(copy.deepcopy(net))
    data, targets = torch.rand(16, 784), torch.randint(10, (16,))
    found = []
    for one in (net, other):
        optimizer = torch.optim.Adam(one.parameters(), lr=5e-4, betas=(0.9, 0.999))
        spk_rec, mem_rec = one(data)
        assert spk_rec.any()
        loss = sum(F.cross_entropy(mem, targets) for mem in mem_rec)
        loss.backward()
        optimizer.step()
        found.append([loss, [p.grad for p in one.parameters()], [p.detach() for p in one.parameters()]])
    assert equal(*found)


def tutorial_6() -> nn.Sequential:
    """The convolutional network of snnTorch's tutorial 6."""
    spike_grad = surrogate.fast_sigmoid(slope=25)
    return nn.Sequential(
        nn.Conv2d(1, 12, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True),
        nn.Conv2d(12, 64, 5),
        nn.MaxPool2d(2),
        snntorch.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
        snntorch.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True, output=True),
    )


def forward_pass(net: nn.Module, num_steps: int, data: Tensor) -> tuple[Tensor, Tensor]:
    mem_rec, spk_rec = [], []
    utils.reset(net)
    for _ in range(num_steps):
        spk_out, mem_out = net(data)
        spk_rec.append(spk_out)
        mem_rec.append(mem_out)
    return torch.stack(spk_rec), torch.stack(mem_rec)


def test_tutorial_6() -> None:
    net = tutorial_6()
    other = srp.convert_to_reversible(copy.deepcopy(net))
    data, targets = torch.rand(4, 1, 28, 28) * 3, torch.randint(10, (4,))
    loss_fn = functional.ce_rate_loss()
    found, held = [], []
    for one in (net, other):
        snntorch.SpikingNeuron.instances = [m for m in one.modules() if isinstance(m, snntorch.Leaky)]
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2, betas=(0.9, 0.999))
        held.append(count_step(lambda one=one: loss_fn(forward_pass(one, 8, data)[0], targets))[0])
        optimizer.zero_grad()
        spk_rec, _ = forward_pass(one, 8, data)
        loss = loss_fn(spk_rec, targets)
        loss.backward()
        optimizer.step()
        found.append([loss, [p.grad for p in one.parameters()], [p.detach() for p in one.parameters()]])
    assert equal(*found)
    assert 2 * held[1] <= held[0]


def test_a_step_loop_holds_the_membrane_and_a_bit() -> None:
    class Net(nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(2)])
            self.neurons = nn.ModuleList([snntorch.Leaky(0.9, **settings) for _ in range(2)])
            self.head = nn.Linear(256, 10)

        def forward(self, xs: Tensor) -> Tensor:
            mems = [neuron.reset_mem() for neuron in self.neurons]
            outs = []
            for x in xs:
                for i, (layer, neuron) in enumerate(zip(self.layers, self.neurons, strict=True)):
                    x, mems[i] = neuron(layer(x), mems[i])
                outs.append(self.head(x))
            return torch.stack(outs)

    xs = (torch.rand(40, 32, 256) < 0.2).float()
    zero = {"reset_mechanism": "zero"}
    learned = {"learn_beta": True, "learn_threshold": True}
    for settings in ({}, zero, learned, zero | learned, {"reset_delay": False}):
        net = srp.convert_to_reversible(Net(**settings))
        held, _peak = count_step(lambda net=net: net(xs).square().mean())
        assert held / (2 * 32 * 256 * 40) <= 4.5
