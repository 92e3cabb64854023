"""The published reversible spiking networks, written from their paper on exact reversible blocks.

Source: Zhang and Zhang, "Memory-Efficient Reversible Spiking Neural Networks", AAAI 2024
(arXiv 2312.07922). The neurons are SpikingJelly's, or snnTorch's where one of those is named.
"""

from snn_reversible_plugin.models.former import RevSFormer, rev_s_former
from snn_reversible_plugin.models.resnet import (
    RevSResNet,
    rev_s_resnet21,
    rev_s_resnet24,
    rev_s_resnet37,
    rev_s_resnet109,
)

__all__ = [
    "RevSFormer",
    "RevSResNet",
    "rev_s_former",
    "rev_s_resnet21",
    "rev_s_resnet24",
    "rev_s_resnet37",
    "rev_s_resnet109",
]
