"""Neurons that somebody wrote, of every release of SpikingJelly, against what conversion makes of them."""

import copy
from types import SimpleNamespace

import torch
from spikingjelly.activation_based import base, neuron, surrogate

import snn_reversible_plugin as srp
from old_spikingjelly import release
from one_neuron import outcome

RELEASES = ["0.0.0.0.12", "0.0.0.0.14", "2.0"]


def modules(version):
    """A release's modules."""
    if version == "2.0":
        return SimpleNamespace(version=version, neuron=neuron, surrogate=surrogate, base=base)
    return release(version)


def made(cls, sj, *, multi=False, **settings):
    settings.setdefault("surrogate_function", sj.surrogate.ATan())
    node = cls(**settings)
    if hasattr(node, "step_mode"):
        node.step_mode = "m" if multi else "s"
    return node


def same(a, b):
    if a is None or b is None:
        return a is b
    values = torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    return values and (a.dtype, a.stride()) == (b.dtype, b.stride())


def assert_like_stock(node, *given, change=None, **how):
    """With a copy that is converted; ``change`` is done to both after a first time."""
    node.reset()
    converted = srp.convert_to_reversible(copy.deepcopy(node), arithmetic="stock")
    for again in range(3):
        expected, found = outcome(node, *given, **how), outcome(converted, *given, **how)
        if again:  # TorchScript adds up in another order when it runs a function first
            assert [*map(same, expected, found)] == [True] * len(expected)
            assert found[0].any()
        if change is not None and not again:
            change(node)
            change(converted)
    return converted


X = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)) * 1.5 + 0.6
V = X[0] / 4
