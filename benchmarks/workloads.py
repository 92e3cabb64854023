"""What is trained: each workload builds a stock model and its batch, and runs one forward to a loss.

Each model comes from its framework's own zoo or tutorials, except for those spelled out in ``networks.py``.
A workload with reversible blocks counts as stock when they run plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from snntorch import utils as snn_utils
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.layer.attention import SpikingSelfAttention
from spikingjelly.activation_based.model import ms_resnet, sew_resnet, spikformer, spiking_resnet
from torch import nn

from snn_reversible_plugin import models

from . import recordings
from .networks import (
    LeakyLoop,
    LIFLoop,
    VGGBlock,
    ms_resnet34,
    multi_step,
    reversible_chain,
    tutorial_6_net,
    yardstick_vgg,
)
from .peers.checkpointed import checkpoint_with_states, segments

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
LIF = {
    "spiking_neuron": neuron.LIFNode,
    "surrogate_function": surrogate.ATan(),
    "detach_reset": True,
}


@dataclass(frozen=True)
class Workload:
    """One training step to measure.

    Args:
        name: what to ask for on the command line; results are stored under it.
        make: builds the stock model.
        full, quick: shapes of the batch in the two profiles; None leaves it out of the quick one.
        loss_of: resets the states, runs the forward and returns the loss.
        blocks: the module types that a user of memopt or of checkpoints would name.
        checkpointed: the same loss for a user's own loop, checkpointed by hand.
        batch_dim: which dimension of the shape is the batch.
        grows: the dimension that grows in that search; None for no search, which long loops make slow.
        inputs: makes the batch, of a shape on a device; random numbers by default.
        compiled: whether it is compiled too, which takes minutes.
        series, at: the curve of growth that this is a point of, and where.
    """

    name: str
    make: Callable[[], nn.Module]
    full: tuple[int, ...]
    quick: tuple[int, ...] | None
    loss_of: Loss
    blocks: tuple[type[nn.Module], ...] = ()
    checkpointed: Loss | None = None
    batch_dim: int = 1
    grows: int | None = None
    inputs: Callable[..., torch.Tensor] = torch.rand
    compiled: bool = False
    series: str | None = None
    at: int | None = None

    def batch(self, shape: tuple[int, ...], device: str | torch.device) -> torch.Tensor:
        """What the model is given."""
        return self.inputs(shape, device=device)

    def shape(self, quick: bool) -> tuple[int, ...] | None:
        return self.quick if quick else self.full


def rate_loss(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    functional.reset_net(model)
    return model(x_seq).mean(0).square().sum()


def logits_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """For models that average over time themselves."""
    functional.reset_net(model)
    return model(x).square().sum()


def _leaky_loss(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    return model(x_seq).square().sum()


def _leaky_checkpointed(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    total, mems = torch.zeros((), device=x_seq.device), (model.lif1.init_leaky(), model.lif2.init_leaky())
    for part in segments(x_seq):
        of_part, mems = checkpoint_with_states(model, model.steps, part, *mems)
        total = total + of_part
    return (total / len(x_seq)).square().sum()


def _lif_loop_checkpointed(model: nn.Module, x_seq: torch.Tensor) -> torch.Tensor:
    functional.reset_net(model)
    parts = [checkpoint_with_states(model, model.steps, part) for part in segments(x_seq)]
    return (torch.stack(parts).sum(0) / len(x_seq)).square().sum()


TUTORIAL_6_STEPS = 50


def _tutorial_6_spikes(model: nn.Module, image: torch.Tensor, steps: int) -> torch.Tensor:
    return torch.stack([model(image)[0] for _ in range(steps)])


def _tutorial_6_loss(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    snn_utils.reset(model)
    return _tutorial_6_error(_tutorial_6_spikes(model, image, TUTORIAL_6_STEPS))


def _tutorial_6_error(spikes: torch.Tensor) -> torch.Tensor:
    """To a target that silent outputs miss: they must have a gradient too."""
    return (spikes.mean(0) - 1).square().sum()


def _tutorial_6_checkpointed(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    snn_utils.reset(model)
    spikes = [
        checkpoint_with_states(model, partial(_tutorial_6_spikes, model), image, len(part))
        for part in segments(torch.arange(TUTORIAL_6_STEPS))
    ]
    return _tutorial_6_error(torch.cat(spikes))


def _vgg(name: str, full: tuple[int, ...], quick: tuple[int, ...] | None, **growth: object) -> Workload:
    return Workload(name, yardstick_vgg, full, quick, rate_loss, (VGGBlock,), **growth)  # type: ignore[arg-type]


def _zoo(
    name: str, make: Callable[[], nn.Module], *shapes: tuple[int, ...] | None, **more: object
) -> Workload:
    blocks = (sew_resnet.BasicBlock, sew_resnet.Bottleneck, spiking_resnet.BasicBlock)
    return Workload(name, lambda: multi_step(make()), *shapes, rate_loss, blocks, **more)  # type: ignore[arg-type]


SPIKFORMER_PARTS = (spikformer.SpikformerConv2dBNLIF, SpikingSelfAttention, spikformer.SpikformerMLP)

NETWORKS = (
    _vgg("vgg", (8, 16, 2, 32, 32), (4, 4, 2, 32, 32), grows=1, compiled=True),
    _vgg("vgg-t32", (32, 16, 2, 32, 32), None),
    _zoo(
        "sew-resnet18", lambda: sew_resnet.sew_resnet18(cnf="ADD", **LIF),
        (8, 16, 3, 96, 96), (2, 1, 3, 32, 32), compiled=True,
    ),
    _zoo(
        "sew-resnet34", lambda: sew_resnet.sew_resnet34(cnf="ADD", **LIF),
        (8, 8, 3, 64, 64), None, grows=1,
    ),
    _zoo("sew-resnet50", lambda: sew_resnet.sew_resnet50(cnf="ADD", **LIF), (8, 8, 3, 64, 64), None),
    _zoo(
        "spiking-resnet34", lambda: spiking_resnet.spiking_resnet34(**LIF),
        (8, 16, 3, 96, 96), None, grows=1,
    ),
    Workload(
        "spikformer", spikformer.spikformer_cifar10, (4, 8, 3, 32, 32), (2, 1, 3, 32, 32),
        logits_loss, SPIKFORMER_PARTS, compiled=True,
    ),
    Workload(
        "rev-s-former-4-384", lambda: models.rev_s_former(4, 384), (4, 8, 3, 32, 32), (2, 1, 3, 32, 32),
        logits_loss,
    ),
    Workload(
        "ms-resnet34", ms_resnet34, (4, 8, 3, 32, 32), (2, 1, 3, 16, 16), logits_loss,
        (ms_resnet._MSBlock,), grows=1, compiled=True,
    ),
    Workload(
        "rev-s-resnet37", lambda: models.rev_s_resnet37(num_classes=100), (4, 8, 3, 32, 32),
        (2, 1, 3, 16, 16), logits_loss, grows=1,
    ),
    Workload(
        "leaky-loop", LeakyLoop, (100, 128, 512), (16, 16, 512), _leaky_loss,
        checkpointed=_leaky_checkpointed, grows=0,
    ),
    Workload(
        "lif-loop", LIFLoop, (100, 128, 512), (16, 16, 512), logits_loss,
        checkpointed=_lif_loop_checkpointed, grows=0,
    ),
    Workload(
        "tutorial-6", tutorial_6_net, (128, 1, 28, 28), (8, 1, 28, 28), _tutorial_6_loss,
        checkpointed=_tutorial_6_checkpointed, batch_dim=0, grows=0,
    ),
    *(
        Workload(
            f"spoken-digits-t{steps}", partial(LeakyLoop, 256, inputs=700, outputs=20, beta=0.95),
            (steps, 64, 700), (25, 4, 700) if steps == 250 else None, _leaky_loss,
            checkpointed=_leaky_checkpointed, inputs=recordings.spoken_digits,
            grows=1 if steps == 250 else None,
        )
        for steps in (250, 1000)
    ),
    Workload(
        "sequential-digits", partial(LeakyLoop, 128, inputs=1, beta=0.97), (784, 64, 1), (36, 4, 1),
        _leaky_loss, checkpointed=_leaky_checkpointed, inputs=recordings.sequential_digits,
    ),
    _zoo(
        "detection-416", lambda: sew_resnet.sew_resnet18(cnf="ADD", **LIF),
        (10, 1, 3, 416, 416), (2, 1, 3, 64, 64),
    ),
)  # fmt: skip

DEPTHS, QUICK_DEPTHS = (8, 27, 54, 100, 200), (8, 27)
LENGTHS, QUICK_LENGTHS = (8, 64, 256, 1024), (8, 64)
BATCHES, QUICK_BATCHES = (1, 2, 4, 8, 32), (1,)

GROWTH = (
    *(
        Workload(
            f"chain-{depth}", reversible_chain(depth), (4, 2, 2, 16, 16),
            (2, 1, 2, 8, 8) if depth in QUICK_DEPTHS else None, rate_loss, series="blocks", at=depth,
        )
        for depth in DEPTHS
    ),
    *(
        Workload(
            f"{name}-t{steps}", partial(make, 256), (steps, 32, 256),
            (steps, 4, 256) if steps in QUICK_LENGTHS else None, loss_of, checkpointed=checkpointed,
            series=f"time steps of {name}", at=steps,
        )
        for name, make, loss_of, checkpointed in (
            ("leaky-loop", LeakyLoop, _leaky_loss, _leaky_checkpointed),
            ("lif-loop", LIFLoop, logits_loss, _lif_loop_checkpointed),
        )
        for steps in LENGTHS
    ),
    *(
        _vgg(
            f"vgg-n{batch}", (8, batch, 2, 32, 32),
            (4, batch, 2, 32, 32) if batch in QUICK_BATCHES else None, series="batch of vgg", at=batch,
        )
        for batch in BATCHES
    ),
)  # fmt: skip

WORKLOADS = {workload.name: workload for workload in (*NETWORKS, *GROWTH)}
