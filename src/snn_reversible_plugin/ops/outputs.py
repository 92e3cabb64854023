"""Outputs of an autograd function that the user holds, as what stock's operations give.

torch 2.14 stops with an internal assertion where ``retain_grad()`` was called on any output of a node but
the first, and that tensor is then written to in place. In stock a membrane is the only output of an
operation; here a step's spikes and membrane come from one function.
"""

from __future__ import annotations

from torch import Tensor


def on_its_own(output: Tensor) -> Tensor:
    """The same tensor, as the first output of a node of its own, whose backward hands on the gradient.

    A view (it stands for a state that is promised) is returned as it is.

    Example:
        >>> import torch
        >>> x = torch.rand(3, requires_grad=True)
        >>> longest = torch.aminmax(x)[1]
        >>> longest.output_nr, on_its_own(longest) is longest, longest.output_nr
        (1, True, 0)
    """
    return output if not output.output_nr or output._is_view() else output.transpose_(0, 0)
