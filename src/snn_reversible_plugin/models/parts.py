"""What the published models share: neurons by name, an input for every time step, layers over [T, N, ...].

The one idea: every layer takes a whole simulation ``[T, N, ...]``. Layers without a state see it as one
batch of T x N; neurons are SpikingJelly's in multi-step mode, or snnTorch's, stepped here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import framework_of, is_spiking

Neuron = str | Callable[[], nn.Module]
SPIKINGJELLY = {"if": "IFNode", "lif": "LIFNode", "plif": "ParametricLIFNode"}
SNNTORCH: dict[str, tuple[str, dict[str, float]]] = {
    "leaky": ("Leaky", {"beta": 0.5}),  # the decay of an LIF neuron with tau = 2
    "lapicque": ("Lapicque", {"beta": 0.5, "R": 1.0}),
    "synaptic": ("Synaptic", {"alpha": 0.5, "beta": 0.5}),
}


def neuron_maker(kind: Neuron) -> Callable[[], nn.Module]:
    """A function that makes one neuron over time steps: by name, or the user's own.

    Args:
        kind: SpikingJelly's ``"if"``, ``"lif"``, ``"plif"`` (ATan surrogate, reset detached), snnTorch's
            ``"leaky"``, ``"lapicque"``, ``"synaptic"`` (decays 0.5, ATan surrogate), or the frameworks' own
            class names for them (``"LIFNode"``, ``"Leaky"``); or a function that makes a neuron: a
            multi-step one, or one of snnTorch's with ``init_hidden=True``, which is stepped here.

    Raises:
        ValueError: an unknown name.
        ImportError: the name's framework is not installed.

    Example:
        >>> type(neuron_maker("plif")()).__name__
        'ParametricLIFNode'
        >>> neuron_maker("Leaky")()
        EachStep(
          (neuron): Leaky()
        )
    """
    if callable(kind):
        return lambda: _over_steps(kind())
    names = {name.lower(): name for name in SPIKINGJELLY} | {v.lower(): k for k, v in SPIKINGJELLY.items()}
    names |= {name: name for name in SNNTORCH}
    name = names.get(kind.lower()) if isinstance(kind, str) else None
    if name is None:
        raise ValueError(
            f"neuron must be one of {(*SPIKINGJELLY, *SNNTORCH)} or a function that makes one, not {kind!r}"
        )
    if name in SPIKINGJELLY:
        base = _framework("spikingjelly", "spikingjelly.activation_based")
        made = getattr(base("neuron"), SPIKINGJELLY[name])
        atan = base("surrogate").ATan
        return lambda: made(detach_reset=True, surrogate_function=atan(), step_mode="m")  # type: ignore[no-any-return]
    base = _framework("snntorch", "snntorch")
    found, settings = SNNTORCH[name]
    made, surrogate = getattr(importlib.import_module("snntorch"), found), base("surrogate")
    return lambda: EachStep(made(**settings, init_hidden=True, spike_grad=surrogate.atan()))


def _framework(extra: str, package: str) -> Callable[[str], Any]:
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"this neuron needs {extra}: pip install 'snn-reversible-plugin[{extra}]'"
        ) from error
    return lambda name: importlib.import_module(f"{package}.{name}")


def _over_steps(neuron: nn.Module) -> nn.Module:
    framework = framework_of(neuron) if is_spiking(neuron) else None
    return neuron if framework is None or framework.has_step_modes else EachStep(neuron)


class EachStep(nn.Module):
    """A snnTorch neuron over ``[T, ...]``, one time step after the other.

    Args:
        neuron: of snnTorch, that keeps its state itself (``init_hidden=True``).

    Raises:
        ValueError: the neuron wants its state from outside.

    Example:
        >>> import snntorch, torch
        >>> EachStep(snntorch.Leaky(beta=0.9, init_hidden=True))(torch.ones(4, 2, 3)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        if not getattr(neuron, "init_hidden", False) or getattr(neuron, "output", False):
            raise ValueError(
                f"{type(neuron).__name__}: a neuron stepped here has to keep its state and to return "
                "spikes alone: make it with init_hidden=True and without output=True."
            )
        self.neuron = neuron

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.neuron(x) for x in x_seq])


class _OverTime:
    """A layer without state over ``[T, N, ...]``, as one batch of T x N."""

    def forward(self, x_seq: Tensor) -> Tensor:
        out = super().forward(x_seq.flatten(0, 1))  # type: ignore[misc]
        return out.unflatten(0, x_seq.shape[:2])  # type: ignore[no-any-return]


class Conv2d(_OverTime, nn.Conv2d):
    """``torch.nn.Conv2d`` over time steps."""


class Conv1d(_OverTime, nn.Conv1d):
    """``torch.nn.Conv1d`` over time steps."""


class BatchNorm2d(_OverTime, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` over time steps."""


class BatchNorm1d(_OverTime, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` over time steps."""


class AvgPool2d(_OverTime, nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` over time steps."""


class MaxPool2d(_OverTime, nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` over time steps."""


class AdaptiveAvgPool2d(_OverTime, nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` over time steps."""


def conv_norm(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    """A convolution that keeps height and width, and batch norm, over time steps."""
    return [Conv2d(inputs, outputs, size, padding=size // 2, bias=False), BatchNorm2d(outputs)]


def over_time(x: Tensor, steps: int | None, channels: int, name: str) -> Tensor:
    """An image ``[N, C, H, W]`` for ``steps`` time steps; events ``[T, N, C, H, W]`` as they are.

    Raises:
        ValueError: another number of dimensions or channels, or an image and no ``steps``.
    """
    if x.dim() not in (4, 5) or x.shape[-3] != channels:
        raise ValueError(
            f"{name} takes [N, {channels}, H, W] or [T, N, {channels}, H, W], not {tuple(x.shape)}"
        )
    if x.dim() == 5:
        return x
    if steps is None:
        raise ValueError(f"{name}: give an input with time steps [T, N, C, H, W], or make it with T=...")
    return x.unsqueeze(0).expand(steps, *x.shape)
