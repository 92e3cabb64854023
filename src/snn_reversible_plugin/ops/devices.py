"""Devices that the host may look at, and devices that it would wait for.

The one idea: whoever asks a tensor on a GPU for a number stops until all that was launched before is done,
and can't be captured in a graph. So whoever would look asks here first. Source: this package's own.
"""

from __future__ import annotations

import torch

HOSTS = frozenset({"cpu"})


def may_look(device: torch.device) -> bool:
    """Whether looking at a value on a device waits for nothing.

    Example:
        >>> import torch
        >>> may_look(torch.device("cpu")), may_look(torch.device("cuda"))
        (True, False)
    """
    return device.type in HOSTS


def is_capturing() -> bool:
    """Whether what is launched here goes into a CUDA graph, to be run again and again, and nobody may wait.

    Example:
        >>> is_capturing()
        False
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
