"""The published reversible spiking networks, written from their papers on exact blocks and columns.

Source: Zhang and Zhang, "Memory-Efficient Reversible Spiking Neural Networks", AAAI 2024
(arXiv 2312.07922), whose neurons are SpikingJelly's, or snnTorch's where one of those is named; Hu et al.,
"High-Performance Temporal Reversible Spiking Neural Networks", ICML 2024 (arXiv 2405.16466).
"""

from snn_reversible_plugin.models.former import RevSFormer, rev_s_former
from snn_reversible_plugin.models.resnet import (
    RevSResNet,
    rev_s_resnet21,
    rev_s_resnet24,
    rev_s_resnet37,
    rev_s_resnet109,
)
from snn_reversible_plugin.models.t_rev_snn import TRevSNN, t_rev_snn

__all__ = [
    "RevSFormer",
    "RevSResNet",
    "TRevSNN",
    "rev_s_former",
    "rev_s_resnet21",
    "rev_s_resnet24",
    "rev_s_resnet37",
    "rev_s_resnet109",
    "t_rev_snn",
]
