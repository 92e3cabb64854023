"""Compiled training steps beside stock's, the compiler's own budgets, peers and the tape.

Each method is a process of its own, and stored at once, since it may compile for minutes: what its first
step takes, in CPU seconds, memory, gradients. Stock's compilation and ours start from empty caches; what
compiles the same kernels later, with a budget, finds them there. Then one process has every method of a
network take turns, from the caches. It is measured again only when that is asked for: most of it is other
people's compilations.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest import mock

import torch
from snntorch import utils as snn_utils
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import snn_reversible_plugin as srp
from snn_reversible_plugin.compiler.entry import look_of
from snn_reversible_plugin.reports.measure import count_step

from .. import networks, pictures
from ..apart import Died, apart
from ..experiment import Entries, Entry, Options, Tick, Work
from ..measure import Result, alternate, ratio, watch_spikes
from ..methods import METHODS as OF_STEPS
from ..methods import CannotRun, Training, prepare
from ..networks import multi_step, tutorial_6_net
from ..store import DRAFTS
from ..workloads import LIF, WORKLOADS, Workload

STEPS = 50  # of tutorial 6


class Tutorial6(nn.Module):
    """Tutorial 6's network with its loop inside, which is where a compiler wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tutorial_6_net()

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.net(images)[0] for _ in range(STEPS)])


class LIFLoop(networks.LIFLoop):
    """Its states are reset outside: SpikingJelly's table of what to reset is not for a compiler to see."""

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.steps(x_seq) / len(x_seq)


def _tutorial_6_loss(model: Tutorial6, images: Tensor) -> Tensor:
    snn_utils.reset(model.net)  # which looks at a network's own children alone
    return (model(images).mean(0) - 1).square().sum()


def _zoo(name: str, make: Callable[[], nn.Module]) -> Workload:
    full = WORKLOADS[name]
    return Workload(name, lambda: multi_step(make()), (4, 8, 3, 64, 64), None, full.loss_of, full.blocks)


NETWORKS = {
    workload.name: workload
    for workload in (
        WORKLOADS["vgg"],
        WORKLOADS["leaky-loop"],
        replace(WORKLOADS["lif-loop"], make=LIFLoop),
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


Compiled = tuple[Callable[[nn.Module], Any], Callable[[], AbstractContextManager[None]], str]
# How a model is compiled, under what, and whose caches it starts from: the first of each empties them.
COMPILED: dict[str, Compiled] = {
    "compiled": (torch.compile, nullcontext, "compiled"),
    "srp.compile, memory": (srp.compile, nullcontext, "srp"),
    "srp.compile, speed": (partial(srp.compile, mode="speed"), nullcontext, "srp"),
    "compiled, budget 0.2": (torch.compile, partial(_budget, 0.2), "compiled"),
    "compiled, budget 0.5": (torch.compile, partial(_budget, 0.5), "compiled"),
}
FROM_EMPTY_CACHES = ("compiled", "srp.compile, memory")
# The other methods of the package's tables, by their names there.
EAGER = {"tape, memory": "memory", "tape, speed": "speed", "memopt": "memopt 1", "checkpoint": "checkpoint"}
METHODS = ("stock", *COMPILED, *EAGER)
PEERS = ("compiled, budget 0.2", "compiled, budget 0.5", "memopt", "checkpoint")
# A loop takes a compiler longest: the one budget of its own that ours is to stay below.
OF_LOOPS = tuple(name for name in METHODS if name not in ("compiled, budget 0.5", "srp.compile, speed"))


class _Style(NamedTuple):
    label: str
    color: str
    marker: str


STYLES: dict[str, pictures.Style] = {
    **{name: OF_STEPS[own] for name, own in {"stock": "stock", **EAGER}.items()},
    "compiled": _Style("torch.compile", "black", "s"),
    "compiled, budget 0.5": _Style("torch.compile, budget 0.5", "dimgray", "v"),
    "compiled, budget 0.2": _Style("torch.compile, budget 0.2", "darkgray", "v"),
    "srp.compile, speed": _Style("this package: srp.compile, speed", "orange", "P"),
    "srp.compile, memory": _Style("this package: srp.compile, memory", "orangered", "P"),
}


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
    settings = {"network": network, "shape": list(shape), "repeats": options.rounds(3, least=0)}
    return Work(name, methods, settings)


def measure(method: str, options: Options, tick: Tick, network: str, shape: list[int]) -> Entry:
    """One method on one network, times aside."""
    folder = caches_of(method, network, shape)
    if method in FROM_EMPTY_CACHES:
        shutil.rmtree(folder, ignore_errors=True)
    arguments = method, options.device, network, tuple(shape)
    if options.quick:
        return _first_step(tick, *arguments)
    try:
        found: Entry = apart(_first_step, *arguments, tick=tick, environment=_ENVIRONMENT)
    except Died as how:
        if method not in PEERS:
            raise
        return {"method": method, "why_not": str(how).splitlines()[-1]}  # a peer that fails is a result
    return found


def timed(
    methods: tuple[str, ...], options: Options, tick: Tick, network: str, shape: list[int], repeats: int
) -> Entries:
    """Seconds of a step of each in turn, and medians of the ratios of a round."""
    arguments = methods, options.device, network, tuple(shape), repeats
    if options.quick:
        return _in_turn(tick, *arguments)
    found: Entries = apart(_in_turn, *arguments, tick=tick, environment=_ENVIRONMENT)
    return found


# One compiling process: then the CPU seconds of this one and of those that it waited for are all there are.
_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


def caches_of(method: str, network: str, shape: Iterable[int]) -> Path:
    """Where the compiler keeps what it compiled for a method."""
    family = COMPILED[method][2] if method in COMPILED else "eager"
    return DRAFTS / "caches" / f"{network}-{'x'.join(map(str, shape))}" / family


def _first_step(tick: Tick, method: str, device: str, network: str, shape: tuple[int, ...]) -> Entry:
    """Its compilation, its memory, and how far its gradients are from stock's."""
    workload, weights, x = _given(network, shape, device)
    if method in COMPILED:
        tick("the compiler is loaded")
        _load_compiler()
    tick("first step")
    start = _cpu_seconds()
    try:
        ready = _Ready(method, network, weights, x)
    except CannotRun as reason:
        return {"method": method, "why_not": str(reason)}
    entry = {"method": method, "loss": ready.first_loss}
    if method in FROM_EMPTY_CACHES:
        entry["first"] = _cpu_seconds() - start
    if method != "stock":
        tick("stock's gradients")
        entry |= _differences(prepare("stock", workload, weights, x), ready.training, x)
    tick("memory")
    _step(ready.training, x)  # a final membrane is promised from the second step on
    ready.training.model.zero_grad()
    entry["held"], entry["peak"] = count_step(partial(_loss, ready.training, x))
    if (look := look_of(ready.called)) is not None:
        entry["on_tape"] = look.on_tape
        entry["stored"] = sum(region.bytes for region in look.backend.packing.regions)
    if method == "stock":
        spikes = watch_spikes(ready.training, x, Result(network, ""))
        entry["neuron_steps"] = sum(one.numel() for one in spikes)
    return entry


def _in_turn(
    tick: Tick, methods: tuple[str, ...], device: str, network: str, shape: tuple[int, ...], repeats: int
) -> Entries:
    _, weights, x = _given(network, shape, device)
    ready = {}
    for method in methods:
        tick(f"{network}: {method}, first step")
        ready[method] = _Ready(method, network, weights, x)
    runs = {method: partial(_step, one.training, x) for method, one in ready.items()}
    seconds = alternate(runs, repeats, x.device, lambda method: tick(f"{network}: {method}, time"))
    found: Entries = {
        method: {
            "seconds": own,
            "time_ratio": ratio(own, seconds["stock"]),
            "compiled_ratio": ratio(own, seconds["compiled"]) if "compiled" in seconds else None,
            "repeats": repeats,
        }
        for method, own in seconds.items()
    }
    if "compiled" in methods:
        tick(f"{network}: products")
        found["compiled"]["products_share"] = _products_share(ready["compiled"].training, x, repeats)
    return found


# Convolutions and matrix products, by the names of what computes them.
PRODUCTS = ("aten::mkldnn_convolution", "aten::_slow_conv2d_forward", "aten::cudnn_convolution", "aten::mm")
PRODUCTS += ("aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear", "mkldnn::_linear_pointwise")
PRODUCTS += ("mkldnn::_convolution_pointwise", "aten::_scaled_dot_product_flash_attention_for_cpu")


def _products_share(training: Training, x: Tensor, repeats: int) -> float:
    """What its forward's products take of a step: a rebuild runs them again. The median of rounds."""
    shares = []
    for _ in range(max(repeats, 1)):
        training.model.zero_grad()
        start = perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            loss = _loss(training, x)
        forward = perf_counter() - start
        start = perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = perf_counter() - start
        own = sum(one.self_cpu_time_total for one in seen.key_averages() if one.key in PRODUCTS) * 1e-6
        shares.append(own / (forward + backward))
    return median(shares)


def _given(network: str, shape: tuple[int, ...], device: str) -> tuple[Workload, nn.Module, Tensor]:
    torch.set_num_threads(1)
    workload = (NETWORKS | DEEP)[network]
    torch.manual_seed(0)
    return workload, workload.make().to(device), torch.rand(shape, device=device)


class _Ready:
    """A method's training after its first step, and what is called in it where that was compiled."""

    def __init__(self, method: str, network: str, weights: nn.Module, x: Tensor) -> None:
        workload = (NETWORKS | DEEP)[network]
        self.called: Any = None
        around: AbstractContextManager[None] = nullcontext()
        if method in COMPILED:
            compiler, around_it, _ = COMPILED[method]
            model = prepare("stock", workload, weights, x).model
            called = self.called = compiler(model)
            self.training = Training(model, lambda x: workload.loss_of(called, x))
            around = around_it()
        else:
            self.training = prepare(EAGER.get(method, method), workload, weights, x)
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(caches_of(method, network, x.shape))}
        with around, mock.patch.dict(os.environ, caches), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a loop is too long to be compiled is stored
            loss = _loss(self.training, x)
            loss.backward()  # type: ignore[no-untyped-call]
        self.first_loss = loss.item()


def _loss(training: Training, x: Tensor) -> Tensor:
    assert training.loss_of is not None
    return training.loss_of(x)


def _step(training: Training, x: Tensor) -> None:
    training.model.zero_grad()
    training.run(x)


def _load_compiler() -> None:
    """Compile something small: what is loaded and built once is nobody's."""
    from torch._inductor import utils

    fresh = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # before torch 2.8
    with fresh():
        net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        torch.compile(net)(torch.rand(2, 2, 8, 8)).sum().backward()
    torch._dynamo.reset()


def _cpu_seconds() -> float:
    """Of this process and those that it waited for: C++ compilers."""
    return sum(os.times()[:4])


def _differences(stock: Training, ours: Training, x: Tensor) -> Entry:
    """Of gradients from stock's in eager mode: the largest, and the largest gradient beside it."""
    stock.run(x)
    pairs = [
        (a.grad, b.grad)
        for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    ]
    return {
        "gradient_difference": max(float((a - b).abs().max()) for a, b in pairs),
        "gradient_scale": max(float(a.abs().max()) for a, _ in pairs),
    }


def draw(name: str, entries: Entries, folder: Path, device: str) -> list[Path]:
    """Memory against time, of what was timed."""
    timed = {key: entry for key, entry in entries.items() if "time_ratio" in entry}
    if not timed:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [pictures.draw_points(timed, pictures.path_of(folder, name, device), STYLES)]
