"""SpikingJelly before 2.0 on the kernels, interpreted: to the bit what its own torch code computes.

The real releases run, set to cupy, which is stood in for by nothing: what would call it fails.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import snn_reversible_plugin as srp
from as_cuda import as_cuda
from between_casts import as_specified
from interpreted import libdevice
from old_spikingjelly import HOMES, make, release
from one_neuron import outcome
from snn_reversible_plugin.grid.step import triton_gradient_kernels
from snn_reversible_plugin.neurons.integrate_fire import on_device, on_triton
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Neuron,
    Order,
    OutputGradients,
    Rule,
    Wanted,
    sequence,
    sequence_vjp,
)
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd
from written_out import same

KINDS = {"IFNode": {}, "LIFNode": {"tau": 1.7}, "ParametricLIFNode": {"init_tau": 1.7}}
# A CPU's sigmoid has an exponential of its own, so no kernel is taken for it.
NAMES = ["ATan", "PiecewiseQuadratic", "SoftSign", "PiecewiseExp", "Erf"]


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    monkeypatch.setattr(triton_gradient_kernels, "libdevice", libdevice)
    with as_cuda():
        yield


@pytest.fixture
def launches(monkeypatch):
    """How often the kernels ran, there and back."""
    found = {"forward": 0, "backward_as_autograd": 0}
    for name in found:
        call = getattr(on_triton, name)

        def counted(*args, name=name, call=call, **kwargs):
            found[name] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(on_triton, name, counted)
    return found


def settings():
    for detach, decay in itertools.product((True, False), (True, False)):
        for reset in (0.0, None, -0.2):
            yield {"v_reset": reset, "detach_reset": detach, "decay_input": decay}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", HOMES)
def test_sequences_set_to_cupy(version, kind, launches, monkeypatch):
    old, names = release(version), itertools.cycle(NAMES)
    for module in (old.base, old.neuron):
        monkeypatch.setattr(module, "cupy", object(), raising=False)
    half = ([*KINDS].index(kind) + [*HOMES].index(version)) % 2
    for number, given in enumerate(settings()):
        if number % 2 != half or (kind == "IFNode" and not given.pop("decay_input")):
            continue
        if number % 3 == 0 and version == "0.0.0.0.14":
            given["store_v_seq"] = True
        function = getattr(old.surrogate, next(names))()
        stock, ours = (
            make(old, kind, v_threshold=0.7, surrogate_function=function, **given, **KINDS[kind])
            for _ in range(2)
        )
        srp.convert_to_reversible(ours, arithmetic="stock")
        ours.backend = "cupy"
        x = torch.randn(1 if number in (4, 5) else 3, 2, 3) * 1.5 + 0.4
        v, calls = (torch.randn(2, 3) * 0.5, 2) if number % 4 >= 2 else (None, 1)
        outcome(stock, x, v, calls, multi=True)  # TorchScript adds up in another order at first
        before = dict(launches)
        expected, found = (outcome(node, x, v, calls, multi=True) for node in (stock, ours))
        assert all(map(same, expected, found)), (given, type(function).__name__)
        assert all(launches[name] > before[name] for name in launches), (given, type(function).__name__)
        assert ours.treatment == "analytic"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", HOMES)
def test_fused_sequences(version, kind, launches, monkeypatch):
    """In float16: the interpreter cuts off what becomes bfloat16; a GPU rounds (`ahead_of_time.py`)."""
    monkeypatch.setattr(on_triton, "SIZE", 8)
    monkeypatch.setattr(on_triton, "FEWEST", 2)
    monkeypatch.setattr(on_triton, "MOST_BYTES", 0)  # so that a program goes over several blocks
    old, names = release(version), itertools.cycle(NAMES)
    half = ([*KINDS].index(kind) + [*HOMES].index(version)) % 2
    for number, given in enumerate(settings()):
        if number % 2 != half or (kind == "IFNode" and not given.pop("decay_input")):
            continue
        if number % 3 == 0 and version == "0.0.0.0.14":
            given["store_v_seq"] = True
        function = getattr(old.surrogate, next(names))()
        stock, ours = (
            make(old, kind, v_threshold=0.7, surrogate_function=function, **given, **KINDS[kind])
            for _ in range(2)
        )
        srp.convert_to_reversible(ours, arithmetic="fused")
        x = (torch.randn(1 if number in (4, 5) else 3, 2, 11) * 1.5 + 0.4).half()
        how = {"v": torch.randn(2, 11) * 0.5, "calls": 2} if number % 4 >= 2 else {"calls": 1}
        outcome(stock, x, run=as_specified, **how)  # TorchScript adds up in another order at first
        before, expected = dict(launches), outcome(stock, x, run=as_specified, **how)
        found = outcome(ours, x, multi=True, **how)
        assert [*map(same, expected, found)] == [True] * len(found), (given, type(function).__name__)
        assert all(launches[name] > before[name] for name in launches), (given, type(function).__name__)
        assert (ours.treatment, ours.arithmetic) == ("analytic", "fused")


@pytest.mark.parametrize("version", HOMES)
def test_fused_sequences_that_are_not_launched_are_formulas(version, launches):
    old = release(version)
    stock, ours = make(old, "LIFNode"), srp.convert_to_reversible(make(old, "LIFNode"), arithmetic="fused")
    x = torch.randn(2, 2, 3, 2, 2).transpose(1, 2).half()
    outcome(stock, x, run=as_specified)
    assert all(map(same, outcome(stock, x, run=as_specified), outcome(ours, x, multi=True)))
    assert not any(launches.values()) and ours.arithmetic == "fused"


def test_plain_layouts_are_launched_and_others_are_formulas(launches):
    old = release("0.0.0.0.14")
    stock, ours = make(old, "LIFNode"), srp.convert_to_reversible(make(old, "LIFNode"), arithmetic="stock")
    x = torch.randn(2, 2, 3, 2, 2).transpose(1, 2)
    outcome(stock, x, multi=True)
    assert all(map(same, *(outcome(node, x, multi=True) for node in (stock, ours))))
    assert not any(launches.values())
    outcome(ours, x.contiguous(), multi=True)
    assert all(launches.values())


def test_steps_set_to_cupy_run_on_the_grids_kernels(monkeypatch):
    old = release("0.0.0.0.14")
    monkeypatch.setattr(old.base, "cupy", object(), raising=False)
    node = srp.convert_to_reversible(make(old, "LIFNode", multi=False))
    node._backend = "cupy"
    x = torch.randn(3, 5, requires_grad=True)
    sum(node(step) for step in x).sum().backward()
    assert node.arithmetic == "grid" and not node.off_grid_reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", HOMES)
def test_steps_set_to_cupy(version, kind, monkeypatch):
    """Stock's setter refuses cupy for steps, and 0.0.0.0.12 has one class for them and no backend."""
    old, names = release(version), itertools.cycle(NAMES)
    for module in (old.base, old.neuron):
        monkeypatch.setattr(module, "cupy", object(), raising=False)
    for number, given in enumerate(settings()):
        if kind == "IFNode" and not given.pop("decay_input"):
            continue
        function = getattr(old.surrogate, next(names))()
        stock, ours = (
            make(
                old, kind, multi=False, v_threshold=0.7, surrogate_function=function, **given, **KINDS[kind]
            )
            for _ in range(2)
        )
        srp.convert_to_reversible(ours, arithmetic="stock")
        if version == "0.0.0.0.14":
            ours._backend = "cupy"
        x = torch.randn(3, 2, 3) * 1.5 + 0.4
        v, calls = (torch.randn(2, 3) * 0.5, 2) if number % 2 else (None, 1)
        outcome(stock, x, v, calls)  # TorchScript adds up in another order at first
        expected, found = (outcome(node, x, v, calls) for node in (stock, ours))
        assert found[0].any() and all(map(same, expected, found)), (given, type(function).__name__)
        assert ours.treatment == "analytic"
        assert getattr(ours, "backend", "cupy") == "cupy"  # still what the user has set


class ByReciprocal(TorchDispatchMode):
    """Dividing by a number as torch does on CUDA."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and isinstance(args[1], float):
            one, by = (torch.tensor(number, dtype=torch.float32) for number in (1.0, args[1]))
            return args[0] * float(one / by)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decay_input", [True, False])
def test_torch_divides_by_a_number_as_the_device_does(decay_input, monkeypatch):
    order = Order(v_reset_first=True, v_seq_last=True, scales=True, selects=True, cats=True, numbers=True)
    rule = Rule(1.7, decay_input, 0.7, -0.2, False, order)
    neuron = Neuron(rule, as_autograd(release("0.0.0.0.12").surrogate.ATan()), launched=True)
    x, v, grads = torch.randn(3, 40), torch.randn(40), OutputGradients(*torch.randn(2, 3, 40))
    grads, found, wanted = grads._replace(v=grads.v[0]), [], Wanted(x=True, v=True, q=False)
    with ByReciprocal():
        by_product = *sequence(x, v, neuron)[:2], sequence_vjp(x, v, grads, neuron, wanted)
    by_division = *sequence(x, v, neuron)[:2], sequence_vjp(x, v, grads, neuron, wanted)
    for divides in (False, True):
        monkeypatch.setattr(on_triton, "divides", lambda _, divides=divides: divides)
        there = on_device.multi_step(x, v, neuron, False)[:2]
        found.append((*there, on_device.multi_step_vjp(x, v, grads, neuron, wanted, False, None)))
    for ours, theirs in zip(found, (by_product, by_division), strict=True):
        assert same(ours[0], theirs[0]) and same(ours[1], theirs[1]) and same(ours[2].x, theirs[2].x)
        assert all(map(same, ours[2].v, theirs[2].v))
    assert not same(by_product[2].x, by_division[2].x)


@pytest.mark.parametrize("order", [Order(), Order(scales=True, selects=True, cats=True, numbers=True)])
@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_spikes_may_take_the_place_of_currents(order, v_reset):
    rule = Rule(1.7, True, 0.7, v_reset, False, order)
    neuron = Neuron(rule, as_autograd(release("0.0.0.0.12").surrogate.ATan()), launched=True)
    x, v = torch.randn(3, 40), torch.randn(40)
    expected = on_device.multi_step(x, v, neuron, True)
    memory = x.data_ptr()
    found = on_device.multi_step(x, v, neuron, True, over=True)
    assert found[0].data_ptr() == memory
    assert all(map(same, expected, found))
