"""A snnTorch neuron beside its stock twin: the same loop over time, and all that a user can see of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.registry import reversible_type
from snn_reversible_plugin.neurons.leaky import call as step

RESETS = ("subtract", "zero", "none")


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


@pytest.fixture(autouse=True, name="one_thread")
def one_thread_fixture() -> Iterator[None]:
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


@pytest.fixture(name="charged")
def charged_fixture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
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
