"""What stock runs for one of the three neurons, and whether that is what is written out here.

The one idea: a release may compute in another order than the one that was read, so the written-out forward
and backward are held to stock's own, bit for bit on a sample, before they stand in for them: once for each
case, on the device where it matters.

Source: ``_ops/selection.py`` of SpikingJelly 2.0.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step, multi_step_vjp
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, OutputGradients, Rule
from snn_reversible_plugin.neurons.surrogates import Surrogate, by_autograd
from snn_reversible_plugin.neurons.witness import agree
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.spikingjelly.copies import Copy
from snn_reversible_plugin.spikingjelly.surrogates import as_autograd, fused

_OPERATORS = {"IF": "if_", "LIF": "lif", "PLIF": "plif"}


class Case(NamedTuple):
    """What decides the order of a neuron's operations.

    ``surrogate``: its name, where a kernel computes it; None: the surrogate is called as it is.
    """

    equations: str
    decay_input: bool
    soft: bool
    detach_reset: bool
    surrogate: str | None


def stock_runs(equations: str, copy: Copy, device: torch.device, fused: bool) -> str:
    """Which code of stock's runs on a device: ``"torch"``, ``"triton"``, or another name.

    ``fused``: it is one of the cases that an operator takes.
    """
    if may_look(device) or not copy.has_operators:
        return "torch"
    choice = os.environ.get(f"SJ_{equations}_CUDA_IMPLEMENTATION", "auto")
    if fused:
        return _chosen(copy.root, equations, device)
    return "torch" if choice == "auto" else f"what SJ_{equations}_CUDA_IMPLEMENTATION says"


@functools.cache
def _chosen(root: str, equations: str, device: torch.device) -> str:
    """Stock chooses once for each device."""
    package = f"{root.rpartition('.')[0]}._ops.{_OPERATORS[equations]}"
    try:
        name = importlib.import_module(package)._selection._get_cuda_selection(device).name
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return "unknown"  # stock says what it is, or what is missing
    return "an explicit backward" if name == "torch" else str(name)


@functools.cache
def agrees(copy: Copy, case: Case, device: torch.device | None = None) -> bool:
    """Whether a copy of SpikingJelly computes what is written out here; tried once for each case.

    Another release may do its arithmetic in another order; then stock's own code is replayed. ``device``:
    whose kernels are held to each other, which waits for it; None: the formulas are, on a CPU.
    """
    equations, decay_input, soft, detach_reset, name = case
    tau = 1.7 if equations == "LIF" else None
    rule = Rule(tau, decay_input, 0.9, None if soft else -0.3, detach_reset, copy.order(equations))
    function = getattr(copy.surrogate, name or "ATan")(alpha=1.3)
    dtype = torch.float64 if name is None else torch.float32

    def sample() -> tuple[Tensor, Tensor, OutputGradients, Tensor]:
        grid = torch.arange(60, dtype=dtype, device="cpu")
        x_seq, w = (
            torch.sin(grid).mul_(3).view(3, 20),
            torch.full((), 0.4, device="cpu", dtype=torch.float32 if copy.has_operators else dtype),
        )
        grads = torch.cos(grid).view(3, 20), torch.sin(grid[:20] + 1)
        x_seq, v, w, *given = (one.to(device or "cpu") for one in (x_seq, grid[:20].cos(), w, *grads))
        return x_seq, v, OutputGradients(*given), w

    def stocks() -> Sequence[Tensor]:
        x_seq, v, grads, w = sample()
        x_seq.requires_grad_()
        s, v_last = copy.run(equations, rule, function, x_seq, v, w)
        return s, v_last, *torch.autograd.grad((s, v_last), x_seq, grads[:2])

    def ours() -> Sequence[Tensor]:
        x_seq, v, grads, w = sample()
        known: Surrogate | None = Surrogate(by_autograd(function))
        if name is not None:
            known = fused(function) if copy.has_operators else as_autograd(function)
        assert known is not None
        q = w.sigmoid() if equations == "PLIF" else None
        own = Neuron(rule, known, q, launched=device is not None)
        with torch.no_grad():
            s, v_last, _ = multi_step(x_seq, v, own)
            g_x = multi_step_vjp(x_seq, v, grads, own).x
        assert g_x is not None
        return s, v_last, g_x

    return agree(ours, stocks)
