"""snnTorch neurons against stock: outputs, gradients and attributes, bit for bit."""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch
import torch
from snntorch import surrogate
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.snntorch import choice


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
    neuron: nn.Module, xs: list[Tensor], every: bool = True, start: tuple[Tensor, ...] = ()
) -> list[Any]:
    """All that a user can see of a loop over time and its backward.

    Gradients enter at every output (or the last step's), and at the input current too, so that more
    than two terms meet at each tensor.
    """
    generator = torch.Generator().manual_seed(len(xs))

    def like(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return noise.to(tensor.dtype)

    leaves = [x.detach().clone().requires_grad_() for x in xs]
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


def neuron_states(neuron: nn.Module) -> int:
    return len(choice._spec(neuron).states)


def converted(neuron: nn.Module) -> nn.Module:
    twin = copy.deepcopy(neuron)
    twin.__class__ = choice._choose(neuron)
    return twin


NAMES = ["outputs require grad", "outputs", "input gradients", "state gradients", "parameters", "attributes"]


def assert_same(neuron: nn.Module, xs: list[Tensor], **kwargs: Any) -> nn.Module:
    """The converted neuron, after a run with a tape and one without that gave what stock gives."""
    twins = [converted(neuron) for _ in range(2)]
    expected = trajectory(neuron, xs, **kwargs)
    for twin, context in zip(twins, (nullcontext(), tape.recording()), strict=True):
        with context:
            actual = trajectory(twin, xs, **kwargs)
        for what, a, b in zip(NAMES, expected, actual, strict=True):
            assert equal(a, b), f"{what}, {context}"
    return twins[0]
