"""Compiled networks: held, peak, time and compile time; ``python -m benchmarks.compiled [network ...]``.

In one run a network: stock in eager mode, stock compiled, compiled with a memory budget, the tape's modes
and those of ``srp.compile``. Times are CPU seconds of the process, so that other work on the machine counts
little; memory is the allocator's own count.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spikformer
from torch import nn

import snn_reversible_plugin as srp
from benchmarks.networks import LeakyLoop, multi_step, yardstick_vgg
from snn_reversible_plugin.reports.measure import count_step

Make = Callable[[], tuple[nn.Module, torch.Tensor]]


def events(*shape: int) -> torch.Tensor:
    return (torch.rand(shape) > 0.8).float()


def vgg() -> tuple[nn.Module, torch.Tensor]:
    return yardstick_vgg(), events(8, 16, 2, 32, 32)


def sew_resnet18() -> tuple[nn.Module, torch.Tensor]:
    options: dict[str, Any] = {"tau": 2.0, "detach_reset": True, "surrogate_function": surrogate.ATan()}
    net = sew_resnet.sew_resnet18(spiking_neuron=neuron.LIFNode, cnf="ADD", num_classes=10, **options)
    return multi_step(net), torch.rand(4, 8, 3, 64, 64)


def former() -> tuple[nn.Module, torch.Tensor]:
    net = spikformer.Spikformer(
        T=4,
        img_size_h=32,
        img_size_w=32,
        in_channels=3,
        num_classes=10,
        embed_dims=128,
        num_heads=4,
        depths=2,
    )
    return multi_step(net), torch.rand(4, 8, 3, 32, 32)


def snntorch_loop() -> tuple[nn.Module, torch.Tensor]:
    return LeakyLoop(512), torch.rand(100, 16, 512)


NETWORKS: dict[str, Make] = {
    "vgg": vgg,
    "sew_resnet18": sew_resnet18,
    "spikformer": former,
    "snntorch_loop": snntorch_loop,
}


def budget(value: float) -> AbstractContextManager[None]:
    return functorch_config.patch(activation_memory_budget=value)  # type: ignore[no-any-return]


METHODS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[], AbstractContextManager[None]]]] = {
    "stock": (lambda net: net, nullcontext),
    "compiled": (torch.compile, nullcontext),
    "compiled, budget 0.5": (torch.compile, lambda: budget(0.5)),
    "compiled, budget 0.2": (torch.compile, lambda: budget(0.2)),
    "tape, memory": (srp.convert_to_reversible, nullcontext),
    "tape, speed": (lambda net: srp.convert_to_reversible(net, mode="speed"), nullcontext),
    "srp.compile, memory": (srp.compile, nullcontext),
    "srp.compile, speed": (lambda net: srp.compile(net, mode="speed"), nullcontext),
}


def measure(make: Make, method: str, repeats: int = 5) -> dict[str, float]:
    """One method on one network."""
    wrap, patched = METHODS[method]
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x = make()
    called = wrap(net)

    def loss() -> torch.Tensor:
        functional.reset_net(net)
        return called(x).square().mean()

    with patched():
        start = time.perf_counter()
        loss().backward()
        first = time.perf_counter() - start
        seconds = []
        for _ in range(repeats):
            started = time.process_time()
            loss().backward()
            seconds.append(time.process_time() - started)
        held, peak = count_step(loss)
    return {"first": first, "seconds": statistics.median(seconds), "held": held, "peak": peak}


def rows(name: str) -> Iterator[str]:
    """A line a method."""
    stock: dict[str, float] | None = None
    for method in METHODS:
        found = measure(NETWORKS[name], method)
        stock = stock or found
        yield (
            f"| {name} | {method} | {found['seconds'] / stock['seconds']:.2f}x "
            f"| {found['held'] / 1e6:.2f} | {found['peak'] / 1e6:.2f} | {found['first']:.1f} |"
        )


def main() -> None:
    torch.set_num_threads(1)
    print("| network | method | time, to stock | held, MB | peak, MB | first step, s |")
    print("|---|---|---:|---:|---:|---:|")
    for name in sys.argv[1:] or NETWORKS:
        for row in rows(name):
            print(row, flush=True)


if __name__ == "__main__":
    main()
