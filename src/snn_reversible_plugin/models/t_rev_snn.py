"""T-RevSNN: a spiking network whose neurons have a membrane between its levels alone.

The one idea: inside a level spikes are those of one time step, so a level has no state but its own; each
time step has a sub-network of its own, and the levels' states go from one to the next through a learned
alpha. So training is reversible over time (:mod:`...blocks.columns`), whatever the number of time steps.

Source: Hu et al., "High-Performance Temporal Reversible Spiking Neural Networks with O(L) Training Memory
and O(1) Inference Cost", ICML 2024 (arXiv 2405.16466); weights standardized and scaled after Brock et al.,
"Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks import RevSColumns

HIDDEN = 4  # times as many channels inside a block
HEADS = 4
EPS = 1e-6
THRESHOLD = 0.5


class _Fire(torch.autograd.Function):
    """Spikes where x is 0.5 or more; the gradient passes where x is from 0 to 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        passes = (x >= 0).logical_and_(x <= 1)
        tape.mark_spikes(passes)
        ctx.save_for_backward(passes)
        return (x >= THRESHOLD).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (passes,) = ctx.saved_tensors
        return g * passes


class Fire(nn.Module):
    """A neuron without a membrane: it rounds its input, cut to [0, 1].

    Example:
        >>> import torch
        >>> Fire()(torch.tensor([-1.0, 0.4, 0.5, 3.0]))
        tensor([0., 0., 1., 1.])
    """

    returns_spikes = True  # so that a check of the rebuild counts them

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return (x >= THRESHOLD).to(x.dtype)
        with tape.paused():
            spikes = _Fire.apply(x)  # type: ignore[no-untyped-call]
        tape.mark_spikes(spikes)
        return spikes  # type: ignore[no-any-return]


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and, times a learned gain, variance 1 / fan-in.

    Args:
        as ``torch.nn.Conv2d``, of which it takes the first five.

    Example:
        >>> import torch
        >>> conv = StandardizedConv2d(4, 8, 3, padding=1)
        >>> conv(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(inputs, outputs, size, stride, padding)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Beside an input that is larger, holding the weight costs less than making it again.
        with tape.paused() if self.weight.numel() <= x.numel() else nullcontext():
            weight = self._standardized()
        return self._conv_forward(x, weight, self.bias)

    def _standardized(self) -> Tensor:
        filters = self.weight.reshape(1, len(self.weight), -1)
        scale = (self.gain * filters.shape[-1] ** -0.5).view(-1)
        weight = nn.functional.batch_norm(filters, None, None, scale, training=True, momentum=0.0, eps=EPS)
        return weight.view_as(self.weight)


def depthwise(channels: int, size: int) -> nn.Conv2d:
    """A convolution of each channel by itself that keeps height and width."""
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)


class Block(nn.Module):
    """``x + gamma * depthwise(pointwise(fire(pointwise(depthwise(fire(x))))))``.

    Args:
        channels: of x.
        size: of the depthwise kernels.
        second: the second half, that a stage shares among its blocks and time steps; such a block has no
            gamma. None: one of its own.
    """

    def __init__(self, channels: int, size: int, second: nn.Module | None = None) -> None:
        super().__init__()
        hidden = HIDDEN * channels
        self.first = nn.Sequential(
            Fire(), depthwise(channels, size), StandardizedConv2d(channels, hidden, 1), Fire()
        )
        self.second = second_half(channels, size) if second is None else second
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1)) if second is None else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(self.first(x))
        return x + (branch if self.gamma is None else branch * self.gamma)  # type: ignore[no-any-return]


def second_half(channels: int, size: int) -> nn.Module:
    """From a block's hidden channels back."""
    return nn.Sequential(StandardizedConv2d(HIDDEN * channels, channels, 1), depthwise(channels, size))


def resampled(inputs: int, outputs: int, size: int, stride: int = 1, grow: int = 1) -> nn.Module:
    """Spikes, a convolution, batch norm; and each pixel ``grow`` times in height and width."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    layers: list[nn.Module] = [Fire(), conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.Upsample(scale_factor=grow)] if grow > 1 else []))


class Level(nn.Module):
    """What a level computes of the states below and, unless there is none, above: a sum, two blocks."""

    def __init__(self, down: nn.Module, up: nn.Module | None, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.blocks = nn.Sequential(*blocks)

    def forward(self, below: Tensor, above: Tensor | None = None) -> Tensor:
        x = self.down(below)
        if above is not None:
            assert self.up is not None
            x = self.up(above) + x
        return self.blocks(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    """Logits from the mean over height and width, of spikes with ``fire``, and then through two layers."""

    def __init__(self, channels: int, num_classes: int, fire: bool) -> None:
        super().__init__()
        self.fire = Fire() if fire else nn.Identity()
        layers = [StandardizedConv2d(channels, num_classes, 1)]
        if fire:
            layers.append(StandardizedConv2d(num_classes, num_classes, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, state: Tensor) -> Tensor:
        return self.layers(self.fire(state).mean((-1, -2), keepdim=True)).flatten(1)  # type: ignore[no-any-return]


class TRevSNN(nn.Module):
    """A temporal reversible spiking network: see :func:`t_rev_snn`, which makes the published ones.

    Args:
        widths: channels of the four levels.
        steps: time steps, which is sub-networks.
        num_classes: outputs.
        events: inputs are events with time steps, otherwise images that every time step sees.
        auxiliary: heads after a quarter, a half and three quarters of the time steps too.
        size: of depthwise kernels.
        alpha: what the learned factors start from.
        bits, mode: as in :class:`RevSColumns`.

    Shape:
        Input ``[N, 3, H, W]``, or events ``[steps, N, 2, H, W]``. Output ``[N, num_classes]``; in training
        with ``auxiliary`` a tuple of such, of which the last is the answer.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.models import TRevSNN
        >>> net = TRevSNN((8, 8, 16, 16), num_classes=10).eval()
        >>> net(torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        steps: int = 4,
        num_classes: int = 1000,
        events: bool = False,
        auxiliary: bool = True,
        size: int = 5,
        alpha: float = 0.5,
        bits: int | None = 16,
        mode: str = "speed",
    ) -> None:
        super().__init__()
        if len(widths) != 4:
            raise ValueError(f"TRevSNN has four levels, and widths names {len(widths)}: give four numbers")
        if auxiliary and steps % HEADS:
            raise ValueError(f"with auxiliary heads, steps must be a multiple of {HEADS}, not {steps}")
        self.steps, self.events = steps, events
        self.stem: nn.Module = nn.Identity()
        if not events:
            self.stem = nn.Sequential(
                StandardizedConv2d(3, widths[0], 7, stride=2, padding=3),
                StandardizedConv2d(widths[0], widths[0], 3, stride=2, padding=1),
            )
        shared = [second_half(width, size) for width in widths]
        subnets = [
            [_level(k, widths, size, step == 0, events, shared[k]) for k in range(4)]
            for step in range(steps)
        ]
        alphas = [
            [nn.Parameter(torch.full((width, 1, 1), float(alpha))) for width in widths]
            for _ in range(steps)
        ]
        tops_at = range(steps // HEADS - 1, steps, steps // HEADS) if auxiliary else (steps - 1,)
        self.columns = RevSColumns(subnets, alphas, tops_at=tops_at, bits=bits, mode=mode)
        self.heads = nn.ModuleList(
            Head(widths[-1], num_classes, fire=step == steps - 1) for step in self.columns.tops_at
        )
        self.apply(_start)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        expected = f"[{self.steps}, N, 2, H, W]" if self.events else "[N, 3, H, W]"
        if x.dim() != (5 if self.events else 4) or (self.events and len(x) != self.steps):
            raise ValueError(f"this TRevSNN takes {expected}, not {tuple(x.shape)}")
        _, tops = self.columns(list(x) if self.events else self.stem(x))
        if self.events:
            tops = (*tops[:-1], tops[-1] / self.steps)
        if self.training:
            logits = tuple(head(top) for head, top in zip(self.heads, tops, strict=True))
            return logits if len(logits) > 1 else logits[0]
        return self.heads[-1](tops[-1])  # type: ignore[no-any-return]


def _level(
    k: int, widths: Sequence[int], size: int, is_first: bool, events: bool, second: nn.Module
) -> Level:
    width = widths[k]
    if k == 0:
        down: nn.Module = StandardizedConv2d(2, width, 3, padding=1) if events else nn.Identity()
    else:
        down = resampled(widths[k - 1], width, *((1, 1) if k == 3 else (3, 2)))
    up = None
    if not is_first and k < 3:
        up = resampled(widths[k + 1], width, 1, grow=1 if k == 2 else 2)
    return Level(down, up, [Block(width, size), Block(width, size, second)])


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": {"widths": (64, 128, 256, 384)},
    "small": {"widths": (96, 192, 384, 512)},
    "tiny_dvs": {"widths": (32, 64, 128, 256), "steps": 8, "events": True, "auxiliary": False},
}


def t_rev_snn(size: str, *, num_classes: int | None = None, **settings: Any) -> TRevSNN:
    """A published T-RevSNN.

    Args:
        size: ``"tiny"`` (17,376,912 parameters) and ``"small"`` (32,331,312) for images and 1,000 classes,
            of 4 time steps with auxiliary heads; ``"tiny_dvs"`` (10,412,364) for events, 10 classes, of 8.
        num_classes: another number of them.
        settings: as :class:`TRevSNN` takes them: ``steps``, ``auxiliary``, ``bits``, ``mode``, ``alpha``.

    Raises:
        ValueError: another size; numbers of time steps that the heads don't divide.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = t_rev_snn("small")
        >>> sum(p.numel() for p in model.parameters())
        32331312
    """
    if size not in _SETTINGS:
        raise ValueError(f"size must be one of {tuple(_SETTINGS)}, not {size!r}")
    found = {"num_classes": 10 if size == "tiny_dvs" else 1000, **_SETTINGS[size], **settings}
    if num_classes is not None:
        found["num_classes"] = num_classes
    return TRevSNN(found.pop("widths"), **found)
