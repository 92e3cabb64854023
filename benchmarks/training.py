"""The one training loop of all experiments that learn something."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .experiment import Tick

Batches = Iterable[tuple[Tensor, Tensor]]  # x_seq [T, N, ...], digits [N]
Scores = Callable[[nn.Module, Tensor], Tensor]  # [N, classes] of a batch
Backward = Callable[[nn.Module, Tensor, Tensor], float]  # the batch's gradients; gives its loss


def train(
    model: nn.Module,
    epochs: Iterable[Batches],
    backward: Backward,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    tick: Tick,
) -> list[float]:
    """The loss of each update, in as many digits as a float32 has."""
    model.train()
    device = next(model.parameters()).device
    losses: list[float] = []
    for batches in epochs:
        for x_seq, digit in batches:
            optimizer.zero_grad()
            loss = backward(model, x_seq.to(device), digit.to(device))
            optimizer.step()
            schedule.step()
            losses.append(float(f"{loss:.9g}"))
            tick(f"update {len(losses)}, loss {loss:.3f}")
    return losses


def through_time(scores_of: Scores) -> Backward:
    """Ordinary back-propagation of the cross entropy."""

    def backward(model: nn.Module, x_seq: Tensor, digit: Tensor) -> float:
        loss = nn.functional.cross_entropy(scores_of(model, x_seq), digit)
        loss.backward()
        return loss.item()

    return backward


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, scores_of: Scores) -> float:
    """The part of the recordings whose digit the model tells."""
    model.eval()
    device = next(model.parameters()).device
    right = seen = 0
    for x_seq, digit in batches:
        right += int((scores_of(model, x_seq.to(device)).argmax(1).cpu() == digit).sum())
        seen += len(digit)
    return right / seen
