"""What happens past the operations of torch: the finding, the error, and the checksum that tells."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from snn_reversible_plugin.ops.layouts import numbers_in, shape_of


@dataclass(frozen=True)
class Unseen:
    """An idiom that the tape can't see: in which module, what it does, and what to do instead."""

    module: str
    operation: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.module}: {self.operation}. {self.remedy}"


class WrittenUnseen(RuntimeError):
    """A value that the backward needs is not what the forward saw. ``finding`` says it in parts."""

    def __init__(self, finding: Unseen) -> None:
        super().__init__(str(finding))
        self.finding = finding


def of_value(tensor: torch.Tensor) -> str:
    """A tensor, for messages."""
    return f"a tensor of shape {shape_of(tensor)} ({tensor.dtype})"


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """A position-dependent integer checksum of the bits, on the tensor's device.

    Which of the many NaN an operation gives is nobody's promise, and may hang on the place in a vector.
    """
    tensor = numbers_in(tensor.detach())
    if tensor.is_floating_point():
        tensor = tensor.masked_fill(tensor.isnan(), torch.nan)
    words = tensor.contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
    weights = torch.arange(1, words.numel() + 1, device=words.device) % 65521
    return (words + 1).mul_(weights).sum()
