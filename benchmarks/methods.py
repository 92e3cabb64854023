"""How a workload is trained: stock, as its users train it today, and with this package.

A method turns a stock model into the one to measure, or raises :class:`CannotRun` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from spikingjelly.activation_based import memopt
from torch import nn

import snn_reversible_plugin as srp

from .workloads import Workload

Method = Callable[[Workload, nn.Module, torch.Tensor], nn.Module]


class CannotRun(Exception):
    """The method does not apply to the workload; the text says why."""


def _stock(_workload: Workload, model: nn.Module, _x: torch.Tensor) -> nn.Module:
    return model


def _memopt_1(workload: Workload, model: nn.Module, x: torch.Tensor) -> nn.Module:
    if not workload.blocks:
        raise CannotRun("needs multi-step modules; this loop is the user's own")
    memopt.optimize_memory(
        model, workload.blocks, example_forward=lambda net: workload.loss_of(net, x), level=1
    )
    return model


def _ours(mode: str) -> Method:
    def method(_workload: Workload, model: nn.Module, _x: torch.Tensor) -> nn.Module:
        return srp.convert_to_reversible(model, mode=mode)

    return method


METHODS: dict[str, Method] = {
    "stock": _stock,
    "memopt 1": _memopt_1,
    "speed": _ours("speed"),
    "memory": _ours("memory"),
}


def prepare(name: str, workload: Workload, stock: nn.Module, x: torch.Tensor) -> nn.Module:
    """A model with the stock model's weights, made ready by the method.

    Made anew rather than copied: snnTorch resets the neurons that were constructed, not copies.
    """
    model = workload.make().to(x.device)
    model.load_state_dict(stock.state_dict())
    return METHODS[name](workload, model, x)
