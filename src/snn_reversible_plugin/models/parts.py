"""What the published models share: neurons by name, an input for every time step, layers over [T, N, ...].

The one idea: everything runs in SpikingJelly's multi-step mode, and the chains start their neurons fresh in
each call, so that a call is a whole simulation.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

try:
    from spikingjelly.activation_based import layer, neuron, surrogate
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "snn_reversible_plugin.models needs SpikingJelly: pip install snn-reversible-plugin[spikingjelly]"
    ) from error

Neuron = str | Callable[[], nn.Module]
NEURONS: dict[str, type[nn.Module]] = {
    "if": neuron.IFNode,
    "lif": neuron.LIFNode,
    "plif": neuron.ParametricLIFNode,
}


def neuron_maker(kind: Neuron) -> Callable[[], nn.Module]:
    """A function that makes one multi-step neuron: by name, or the user's own.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> type(neuron_maker("plif")()).__name__
        'ParametricLIFNode'
    """
    if callable(kind):
        return kind
    if kind not in NEURONS:
        raise ValueError(f"neuron must be one of {tuple(NEURONS)} or make a module, not {kind!r}")
    made = NEURONS[kind]
    return lambda: made(detach_reset=True, surrogate_function=surrogate.ATan(), step_mode="m")


def conv_norm(inputs: int, outputs: int, size: int) -> list[nn.Module]:
    """A convolution that keeps height and width, and batch norm, over time steps."""
    return [
        layer.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, step_mode="m"),
        layer.BatchNorm2d(outputs, step_mode="m"),
    ]


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
