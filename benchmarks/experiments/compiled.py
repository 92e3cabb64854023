"""Compiled training steps beside stock's, the compiler's own budgets, peers and the tape.

Each method takes turns with stock in eager mode, and is stored by itself, since each compiles for minutes.
Compilations start from empty caches, so that their times are those of a first call.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from snntorch import utils as snn_utils
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.compiler.entry import look_of
from snn_reversible_plugin.reports.measure import count_step

from ..experiment import Entry, Options, Tick, Work
from ..measure import Result, alternate, ratio, watch_spikes
from ..methods import CannotRun, Training, prepare
from ..networks import multi_step, tutorial_6_net
from ..workloads import LIF, WORKLOADS, Workload

STEPS = 50  # of tutorial 6


class Tutorial6(nn.Module):
    """Tutorial 6's network with its loop inside, which is where a compiler wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tutorial_6_net()

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.net(images)[0] for _ in range(STEPS)])


def _tutorial_6_loss(model: nn.Module, images: Tensor) -> Tensor:
    snn_utils.reset(model)
    return (model(images).mean(0) - 1).square().sum()


def _zoo(name: str, make: Callable[[], nn.Module]) -> Workload:
    full = WORKLOADS[name]
    return Workload(name, lambda: multi_step(make()), (4, 8, 3, 64, 64), None, full.loss_of, full.blocks)


NETWORKS = {
    workload.name: workload
    for workload in (
        WORKLOADS["vgg"],
        WORKLOADS["leaky-loop"],
        WORKLOADS["lif-loop"],
        Workload("tutorial-6", Tutorial6, (16, 1, 28, 28), None, _tutorial_6_loss),
    )
}
# The networks of the other tables, of a size that a compiler's runs allow: each takes it minutes.
DEEP = {
    workload.name: workload
    for workload in (
        _zoo("sew-resnet18", lambda: sew_resnet.sew_resnet18(cnf="ADD", **LIF)),
        *(WORKLOADS[name] for name in ("ms-resnet34", "spikformer", "rev-s-resnet37")),
        _zoo("sew-resnet34", lambda: sew_resnet.sew_resnet34(cnf="ADD", **LIF)),
        _zoo("spiking-resnet34", lambda: spiking_resnet.spiking_resnet34(**LIF)),
    )
}
SHAPES = {"leaky-loop": (100, 16, 512), "lif-loop": (100, 16, 512)}
LONG = ("leaky-loop", (1000, 16, 512), ("stock", "srp.compile, memory"))


def _budget(value: float) -> AbstractContextManager[None]:
    from torch._functorch import config

    return config.patch(activation_memory_budget=value)  # type: ignore[no-any-return]


Compiled = tuple[Callable[[nn.Module], Any], Callable[[], AbstractContextManager[None]]]
COMPILED: dict[str, Compiled] = {
    "compiled": (torch.compile, nullcontext),
    "compiled, budget 0.5": (torch.compile, partial(_budget, 0.5)),
    "compiled, budget 0.2": (torch.compile, partial(_budget, 0.2)),
    "srp.compile, speed": (partial(srp.compile, mode="speed"), nullcontext),
    "srp.compile, memory": (srp.compile, nullcontext),
}
# The other methods of the package's tables, by their names there.
EAGER = {"checkpoint": "checkpoint", "memopt": "memopt 1", "tape, speed": "speed", "tape, memory": "memory"}
METHODS = ("stock", *COMPILED, *EAGER)
# A loop takes a compiler longest: the one budget of its own that ours is to stay below.
OF_LOOPS = tuple(name for name in METHODS if name not in ("compiled, budget 0.5", "srp.compile, speed"))


def works(options: Options) -> Iterator[Work]:
    """A network of layers that are many time steps wide, and loops over time."""
    for name, workload in NETWORKS.items():
        shape = (2, 1, 2, 32, 32) if options.quick else SHAPES.get(name, workload.full)
        if name == "vgg" or not options.quick:
            yield _work(name, name, shape, METHODS if name == "vgg" else OF_LOOPS, options)
    if not options.quick:
        name, shape, methods = LONG
        yield _work(f"{name}, T={shape[0]}", name, shape, methods, options)


def deep(options: Options) -> Iterator[Work]:
    """The other tables' networks."""
    for name, workload in DEEP.items():
        if name == "sew-resnet18" or not options.quick:
            yield _work(name, name, (2, 1, 3, 32, 32) if options.quick else workload.full, METHODS, options)


def _work(
    name: str, network: str, shape: tuple[int, ...], methods: tuple[str, ...], options: Options
) -> Work:
    settings = {"network": network, "shape": list(shape), "repeats": options.rounds(5)}
    return Work(name, methods, settings)


def measure(
    method: str, options: Options, tick: Tick, network: str, shape: list[int], repeats: int
) -> Entry:
    """One method on one network, taking turns with stock."""
    workload = (NETWORKS | DEEP)[network]
    torch._dynamo.reset()
    torch.manual_seed(0)
    weights, x = workload.make().to(options.device), torch.rand(shape, device=options.device)
    stock = prepare("stock", workload, weights, x)
    around = COMPILED[method][1] if method in COMPILED else nullcontext
    with around(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a loop is too long to be compiled is stored
        try:
            training, called = _ready(method, workload, weights, x)
        except CannotRun as reason:
            return {"method": method, "why_not": str(reason)}
        tick("first step")
        start = time.perf_counter()
        with _empty_caches() if method in COMPILED else nullcontext():
            loss = _loss(training, x)
            loss.backward()  # type: ignore[no-untyped-call]
        entry = {"method": method, "first": time.perf_counter() - start, "loss": loss.item()}
        stock.run(x)
        entry |= _differences(stock.model, training.model)
        runs = {"stock": partial(_step, stock, x), method: partial(_step, training, x)}
        seconds = alternate(runs, repeats, x.device, lambda name: tick(f"time of {name}"))
        entry |= {"seconds": seconds[method], "time_ratio": ratio(seconds[method], seconds["stock"])}
        stock.model.zero_grad(), training.model.zero_grad()
        entry["held"], entry["peak"] = count_step(partial(_loss, training, x))
    if (look := look_of(called)) is not None:
        entry["on_tape"] = look.on_tape
        entry["stored"] = sum(region.bytes for region in look.backend.packing.regions)
    if method == "stock":
        entry["neuron_steps"] = sum(
            spikes.numel() for spikes in watch_spikes(stock, x, Result(network, ""))
        )
    return entry


def _ready(method: str, workload: Workload, weights: nn.Module, x: Tensor) -> tuple[Training, Any]:
    """A method's training, and what is called in it where that was compiled."""
    if method not in COMPILED:
        return prepare(EAGER.get(method, method), workload, weights, x), None
    model = prepare("stock", workload, weights, x).model
    called = COMPILED[method][0](model)
    return Training(model, lambda x: workload.loss_of(called, x)), called


def _loss(training: Training, x: Tensor) -> Tensor:
    assert training.loss_of is not None
    return training.loss_of(x)


def _step(training: Training, x: Tensor) -> None:
    training.model.zero_grad()
    training.run(x)


def _empty_caches() -> AbstractContextManager[Any]:
    """Inductor's caches: a compilation inside starts from nothing."""
    from torch._inductor import utils

    fresh = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # before torch 2.8
    return fresh()  # type: ignore[no-any-return]


def _differences(stock: nn.Module, ours: nn.Module) -> Entry:
    """Of gradients from stock's in eager mode: the largest, and the largest gradient beside it."""
    pairs = [
        (a.grad, b.grad)
        for a, b in zip(stock.parameters(), ours.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    return {
        "gradient_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "gradient_scale": max(float(a.abs().max()) for a, _ in pairs),
    }
