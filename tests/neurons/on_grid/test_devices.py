"""On a device nothing waits: no forward looks at a value, and the one look comes in the backward.

Two stand-ins, as there is no device here: tensors on ``meta``, at which nobody can look, so that each try
raises; and the CPU, when the package is told that to look at its values would be to wait.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import convert
from snn_reversible_plugin.grid.step import reference
from snn_reversible_plugin.neurons.surrogates import in_one_pass
from snn_reversible_plugin.ops import devices, forms
from snntorch_against_stock import RESETS, STATES, equal, make, one_thread_fixture  # noqa: F401


class Loop(nn.Module):
    def __init__(self, make_neuron: Any) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(5, 4), make_neuron()
        self.fc2, self.lif2 = nn.Linear(4, 4), make_neuron()
        self.recurrent = hasattr(self.lif1, "recurrent")

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        seen, first, second = [], (), ()
        self.lif1.reset_mem(), self.lif2.reset_mem()
        for x in x_seq:
            out = self.lif1(self.fc1(x), *first)
            first = out if self.recurrent else out[1:]
            out = self.lif2(self.fc2(out[0]), *second)
            second = out if self.recurrent else out[1:]
            seen += out
        return seen


class Stepped(Loop):
    def forward(self, x_seq: Tensor) -> list[Tensor]:
        functional.reset_net(self)
        return [self.lif2(self.fc2(self.lif1(self.fc1(x)))) for x in x_seq]


def networks() -> Iterator[tuple[str, nn.Module]]:
    for kind, reset in itertools.product(STATES, RESETS):
        if kind == "Alpha" and reset == "subtract":
            continue
        settings: dict[str, Any] = {"reset_mechanism": reset}
        if kind == "Leaky":
            settings |= {"threshold": torch.rand(4) + 0.5, "graded_spikes_factor": 0.5}
        learned = kind not in ("Lapicque", "Alpha", "RLeaky")
        yield f"{kind} {reset}", Loop(lambda k=kind, s=settings, n=learned: make(k, n, **s))
    for node, v_reset in itertools.product(
        (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode), (None, -0.3)
    ):
        yield node.__name__, Stepped(lambda n=node, v=v_reset: n(v_reset=v))


@pytest.mark.filterwarnings("error:.*goes on in stock's arithmetic")
def test_nobody_looks_at_values_but_once_in_the_backward() -> None:
    for name, net in networks():
        srp.convert_to_reversible(net, arithmetic="grid").to("meta")
        outputs = net(torch.empty(2, 2, 5, device="meta", requires_grad=True))
        assert not net.lif1.off_grid_reason, name
        # What the look raises on meta is that nobody can look.
        with pytest.raises((RuntimeError, NotImplementedError)) as error:
            torch.stack([out.sum() for out in outputs if out.requires_grad]).sum().backward()
        assert "_look_at(self.reached)" in "".join(traceback.format_tb(error.value.__traceback__)), name


@contextmanager
def no_looking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU as a device: its values are not looked at, and the form for any device computes."""
    chosen = forms._first

    def first(operation: str, device: str) -> Any:
        return reference if operation == forms.GRID_STEP else chosen(operation, device)

    with monkeypatch.context() as patch:
        patch.setattr(devices, "HOSTS", frozenset())
        patch.setattr(forms, "_first", first)
        forget()
        yield
    forget()


def forget() -> None:
    in_one_pass.cache_clear()
    forms.form_of.cache_clear()


def train(net: nn.Module, x_seq: Tensor) -> list[Any]:
    outputs = net(x_seq)
    torch.stack([out.square().sum() for out in outputs if out.requires_grad]).sum().backward()
    gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    return [[out.detach() for out in outputs], gradients]


@pytest.mark.filterwarnings("error:.*goes on in stock's arithmetic")
def test_what_is_computed_without_looking_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, net in networks():
        srp.convert_to_reversible(net)
        twin, x_seq = copy.deepcopy(net), torch.randn(4, 3, 5) * 2 + 0.3
        expected = train(twin, x_seq)
        with no_looking(monkeypatch):
            actual = train(net, x_seq)
            assert convert.is_on_grid(net.lif1), name
        assert equal(actual, expected), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.fc1.weight.fill_(1e4), r"lif1 \(Leaky\)\.mem reaches .*Lower the weights"),
        (lambda net: net.fc1.weight.fill_(float("nan")), r"lif1.*holds NaN.*torch\.isnan"),
        (lambda net: net.lif1.threshold.fill_(float("nan")), r"lif1.*holds NaN"),
        (lambda net: net.lif1.beta.fill_(0.2), r"lif1.*lost more .*convert again"),
        (lambda net: net.lif1.beta.fill_(0.0), r"lif1.*lost more .*convert again"),
    ],
    ids=["range", "NaN", "NaN threshold", "small decay", "no decay"],
)
def test_what_the_look_finds_is_named(change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Loop(lambda: snntorch.Leaky(0.6, learn_beta=True, learn_threshold=True))
    srp.convert_to_reversible(net)
    x_seq = torch.randn(6, 3, 5)
    with no_looking(monkeypatch):
        train(net, x_seq)
        with torch.no_grad():
            net.lif1.beta.fill_(0.35)  # there is room for half of what it was
        train(net, x_seq)
        with torch.no_grad():
            change(net)
        outputs = net(x_seq)
        with pytest.raises(OverflowError, match=message):
            torch.stack([out.square().sum() for out in outputs]).sum().backward()
