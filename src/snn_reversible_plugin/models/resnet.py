"""RevSResNet: residual networks of two streams, held between a stem, transitions and a head.

The one idea: all depth is in chains of reversible blocks, and a stage's held memory does not depend on how
many it has. F and G are each (neuron, 3x3 convolution, batch norm) twice, as in MS-ResNet.

Source: Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), section on RevSResNet and its table of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from snn_reversible_plugin.blocks import RevSBlock, RevSSequence
from snn_reversible_plugin.models.parts import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Neuron,
    conv_norm,
    neuron_maker,
    over_time,
)
from snn_reversible_plugin.modules.flat import run_flat
from snn_reversible_plugin.modules.states import fresh_states

WIDTHS = (64, 128, 256, 448)


class RevSResNet(nn.Module):
    """A reversible spiking residual network.

    Args:
        depths: blocks in each stage.
        widths: channels of one of the two streams in each stage.
        T: time steps for an input without them; None if inputs always have them.
        num_classes: outputs.
        in_channels: 3 for images, 2 for events.
        neuron: ``"if"``, ``"lif"``, ``"plif"`` (SpikingJelly's, ATan surrogate, reset detached),
            ``"leaky"``, ``"lapicque"``, ``"synaptic"`` (snnTorch's, decays 0.5, ATan surrogate), the
            frameworks' class names for them, or a function that makes a neuron: a multi-step one, or one of
            snnTorch's with ``init_hidden=True``.
        bits: of the grid that the streams live on; None for floating point, which drifts.

    Shape:
        Input ``[T, N, C, H, W]`` or ``[N, C, H, W]``; output ``[N, num_classes]``, the mean over time.
        A call is a whole simulation: neurons start fresh, and hold no state afterwards.

    Raises:
        ValueError: unequal numbers of depths and widths, an unknown neuron, an input of another shape.

    Example:
        >>> import torch
        >>> model = RevSResNet((1, 1), (4, 6), T=2, num_classes=5)
        >>> model(torch.randn(3, 3, 8, 8)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        T: int | None = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        neuron: Neuron = "if",
        bits: int | None = 16,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not depths:
            raise ValueError(
                f"RevSResNet: {len(depths)} depths for {len(widths)} widths: give one of each a stage"
            )
        fire = neuron_maker(neuron)
        self.T, self.in_channels = T, in_channels
        self.stem = nn.Sequential(*conv_norm(in_channels, 2 * widths[0], 3))
        stages: list[nn.Module] = []
        before = widths[0]
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if index:
                stages.append(_transition(2 * before, 2 * width, fire))
            blocks = [
                RevSBlock(_branch(width, fire), _branch(width, fire), bits=bits) for _ in range(depth)
            ]
            stages.append(RevSSequence(blocks, states="reset"))
            before = width
        self.stages = nn.Sequential(*stages)
        self.fire = fire()
        self.pool = AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = over_time(x, self.T, self.in_channels, type(self).__name__)
        with fresh_states(self):
            return self._from_steps(x)

    def _from_steps(self, x: Tensor) -> Tensor:
        # A function without a handler: each layer is the last to use its input (`modules/last_use.py`).
        # Called as a whole, the stages would hold their input until the end.
        x = run_flat(self.stages, [self.stem(x)])
        x = self.fire(x)
        return self.fc(self.pool(x).flatten(2)).mean(0)  # type: ignore[no-any-return]


def _branch(width: int, fire: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(fire(), *conv_norm(width, width, 3), fire(), *conv_norm(width, width, 3))


def _transition(inputs: int, outputs: int, fire: Callable[[], nn.Module]) -> nn.Module:
    pool = AvgPool2d(3, stride=2, padding=1)
    return nn.Sequential(fire(), pool, *conv_norm(inputs, outputs, 1))


def rev_s_resnet21(**settings: Any) -> RevSResNet:
    """RevSResNet21 for images of about 32 x 32: 11,048,420 parameters with 100 classes.

    Args:
        settings: as :class:`RevSResNet` takes them: ``T``, ``num_classes``, ``in_channels``, ``neuron``,
            ``bits``.

    Example:
        >>> model = rev_s_resnet21(num_classes=100)
        >>> sum(p.numel() for p in model.parameters())
        11048420
    """
    return RevSResNet((1, 1, 1, 1), WIDTHS, **settings)


def rev_s_resnet37(**settings: Any) -> RevSResNet:
    """RevSResNet37: 23,590,884 parameters with 100 classes. Settings as in :func:`rev_s_resnet21`.

    Example:
        >>> model = rev_s_resnet37(num_classes=100)
        >>> sum(p.numel() for p in model.parameters())
        23590884
    """
    return RevSResNet((1, 2, 3, 2), WIDTHS, **settings)


def rev_s_resnet24(**settings: Any) -> RevSResNet:
    """RevSResNet24 for events: 260,362 parameters with 2 input channels and 10 classes, the defaults.

    Settings as in :func:`rev_s_resnet21`; inputs have their time steps unless ``T`` is given.

    Example:
        >>> import torch
        >>> model = rev_s_resnet24()
        >>> model(torch.rand(3, 2, 2, 16, 16)).shape  # [T, N, C, H, W]
        torch.Size([2, 10])
    """
    defaults: dict[str, Any] = {"T": None, "in_channels": 2}
    return RevSResNet((1, 2, 2), (16, 32, 48), **{**defaults, **settings})


def rev_s_resnet109(**settings: Any) -> RevSResNet:
    """RevSResNet109: 70,075,876 parameters with 100 classes. Settings as in :func:`rev_s_resnet21`.

    The paper has no table of it. Its authors' code has: blocks 2, 4, 16, 4 of the same widths.

    Example:
        >>> import torch
        >>> with torch.device("meta"):  # its shapes alone: no memory
        ...     model = rev_s_resnet109(num_classes=100)
        >>> sum(p.numel() for p in model.parameters())
        70075876
    """
    return RevSResNet((2, 4, 16, 4), WIDTHS, **settings)
