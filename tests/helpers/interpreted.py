"""What Triton's interpreter lacks: functions of the device's library."""

from types import SimpleNamespace

import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def _exp(x: tl.tensor) -> tl.tensor:
    """Torch's own, as a GPU's library has the function that torch is compiled with there."""
    data = torch.from_numpy(x.handle.data).contiguous()
    # A vector's end is computed by other instructions: there is none here.
    room = torch.zeros(-(-data.numel() // 64) * 64)
    room[: data.numel()] = data.view(-1)
    found = room.exp()[: data.numel()].view(data.shape)
    return tl.tensor(TensorHandle(found.numpy(), x.handle.dtype), x.type)


libdevice = SimpleNamespace(exp=_exp)
