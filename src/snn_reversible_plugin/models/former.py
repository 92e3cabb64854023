"""RevSFormer: a spiking transformer of two streams, spiking self-attention as F and a spiking MLP as G.

The one idea: the encoder is one chain of reversible blocks, so what it holds does not grow with depth. The
patch embedding enters both streams; the head reads both.

Source: Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), section on RevSFormer; spiking self-attention and
patch splitting from Zhou et al., "Spikformer", ICLR 2023 (arXiv 2209.15425). The branches begin with a
neuron and end with batch norm, so that the streams carry currents.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from snn_reversible_plugin.blocks import RevSBlock, RevSSequence
from snn_reversible_plugin.models.parts import (
    BatchNorm1d,
    Conv1d,
    MaxPool2d,
    Neuron,
    conv_norm,
    neuron_maker,
    over_time,
)
from snn_reversible_plugin.modules.states import fresh_states

SCALE = 0.125  # of the attention, as in Spikformer: counts of coincident spikes, brought to the threshold


class RevSFormer(nn.Module):
    """A reversible spiking transformer. See :func:`rev_s_former`, which has its arguments.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.models import RevSFormer
        >>> RevSFormer(1, 48, T=2, patch=8)(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        dim: int,
        *,
        T: int | None = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        heads: int = 12,
        patch: int = 4,
        mlp_ratio: int = 4,
        neuron: Neuron = "lif",
        bits: int | None = 16,
    ) -> None:
        super().__init__()
        if dim % 8 or dim % heads:
            raise ValueError(f"RevSFormer: dim must be a multiple of 8 and of heads={heads}, not {dim}")
        if patch not in (1, 2, 4, 8, 16):
            raise ValueError(f"RevSFormer: patch must be 1, 2, 4, 8 or 16, not {patch}")
        if depth < 1:
            raise ValueError(f"RevSFormer: depth must be at least 1, not {depth}")
        fire = neuron_maker(neuron)
        self.T, self.in_channels = T, in_channels
        self.embed = PatchSplitting(in_channels, dim, patch, fire)
        self.encoder = RevSSequence(
            [
                RevSBlock(SpikingAttention(dim, heads, fire), _mlp(dim, mlp_ratio * dim, fire), bits=bits)
                for _ in range(depth)
            ],
            states="reset",
        )
        self.fire = fire()
        self.head = nn.Linear(2 * dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = over_time(x, self.T, self.in_channels, "RevSFormer")
        with fresh_states(self):
            return self._from_steps(x)

    def _from_steps(self, x: Tensor) -> Tensor:
        # A function without a handler: each layer is the last to use its input (`modules/last_use.py`).
        x = self.encoder(self.embed(x).repeat(1, 1, 2, 1))
        x = self.fire(x)
        return self.head(x.mean(3)).mean(0)  # type: ignore[no-any-return]


class PatchSplitting(nn.Module):
    """An image into tokens: four convolutions, as many of them followed by pooling as ``patch`` asks.

    Shape:
        ``[T, N, C, H, W]`` to ``[T, N, dim, H W / patch^2]``.
    """

    def __init__(self, inputs: int, dim: int, patch: int, fire: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        pooled = 4 - (patch.bit_length() - 1)
        for index, outputs in enumerate((dim // 8, dim // 4, dim // 2, dim)):
            layers += [*conv_norm(inputs, outputs, 3), fire()]
            if index >= pooled:
                layers.append(MaxPool2d(3, stride=2, padding=1))
            inputs = outputs
        self.patches = nn.Sequential(*layers)
        self.position = nn.Sequential(*conv_norm(dim, dim, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        return (x + self.position(x)).flatten(3)  # type: ignore[no-any-return]


class SpikingAttention(nn.Module):
    """Spiking self-attention: queries, keys and values are spikes, and there is no softmax.

    Shape:
        ``[T, N, dim, L]``, channels before tokens, to the same.
    """

    def __init__(self, dim: int, heads: int, fire: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.fire = fire()
        self.q = nn.Sequential(*_linear_norm(dim, dim, bias=False), fire())
        self.k = nn.Sequential(*_linear_norm(dim, dim, bias=False), fire())
        self.v = nn.Sequential(*_linear_norm(dim, dim, bias=False), fire())
        self.attend = fire()
        self.project = nn.Sequential(*_linear_norm(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fire(x)
        q, k, v = (part(x).unflatten(2, (self.heads, -1)) for part in (self.q, self.k, self.v))
        mixed = (v @ k.mT) @ q  # linear in the number of tokens: [.., d, L] [.., L, d] [.., d, L]
        return self.project(self.attend((mixed * SCALE).flatten(2, 3)))  # type: ignore[no-any-return]


def _linear_norm(inputs: int, outputs: int, bias: bool = True) -> list[nn.Module]:
    """A linear layer over the channels of [T, N, C, L], and batch norm."""
    return [
        Conv1d(inputs, outputs, 1, bias=bias),
        BatchNorm1d(outputs),
    ]


def _mlp(dim: int, hidden: int, fire: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(fire(), *_linear_norm(dim, hidden), fire(), *_linear_norm(hidden, dim))


def rev_s_former(
    depth: int,
    dim: int,
    *,
    T: int | None = 4,
    num_classes: int = 10,
    in_channels: int = 3,
    heads: int | None = None,
    patch: int = 4,
    mlp_ratio: int = 4,
    neuron: Neuron = "lif",
    bits: int | None = 16,
) -> RevSFormer:
    """RevSFormer-depth-dim: 2-384 has 5,766,586 parameters, 4-384 has 9,323,962, with 10 classes.

    RevSFormer-2-256, for event data of 128 x 128, is
    ``rev_s_former(2, 256, T=None, in_channels=2, patch=16)``.

    Args:
        depth: reversible blocks.
        dim: channels of each of the two streams.
        T: time steps for an input without them; None if inputs always have them.
        num_classes: outputs.
        in_channels: 3 for images, 2 for events.
        heads: of the attention; by default 12 where ``dim`` is a multiple of 12, else 16.
        patch: pixels on the side of a token: 1, 2, 4, 8 or 16.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        neuron: as for :class:`RevSResNet`.
        bits: of the grid that the streams live on; None for floating point, which drifts.

    Shape:
        Input ``[T, N, C, H, W]`` or ``[N, C, H, W]``; output ``[N, num_classes]``, the mean over time.

    Raises:
        ValueError: sizes that don't fit together, an unknown neuron, an input of another shape.

    Example:
        >>> import torch
        >>> model = rev_s_former(1, 24, T=2, patch=4)
        >>> model(torch.randn(3, 3, 16, 16)).shape
        torch.Size([3, 10])
    """
    return RevSFormer(
        depth, dim, T=T, num_classes=num_classes, in_channels=in_channels,
        heads=heads or (12 if dim % 12 == 0 else 16), patch=patch, mlp_ratio=mlp_ratio, neuron=neuron,
        bits=bits,
    )  # fmt: skip
