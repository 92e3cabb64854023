"""What the host does for a training step whose tensors are too small to take any time: mostly Python.

On a fast device this is what a step can't get below. Calls of the package's own functions are the same on
any machine; seconds are over stock's in the same rounds.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import snn_reversible_plugin as srp

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate
from ..networks import LeakyLoop, LIFLoop
from ..workloads import WORKLOADS

HOME = str(Path(srp.__file__).parent)
METHODS = ("stock", "memory", "speed", "auto")
SIZES: dict[str, tuple[Callable[[], nn.Module], str, list[int]]] = {
    "SpikingJelly, a loop": (partial(LIFLoop, 16), "lif-loop", [20, 2, 16]),
    "snnTorch, a loop": (partial(LeakyLoop, 16), "leaky-loop", [20, 2, 16]),
    "SEW-ResNet18": (WORKLOADS["sew-resnet18"].make, "sew-resnet18", [4, 1, 3, 32, 32]),
}


def works(options: Options) -> Iterator[Work]:
    rounds = options.rounds(15)
    for name, (_, workload, shape) in SIZES.items():
        yield Work(name, METHODS, {"network": name, "workload": workload, "shape": shape, "rounds": rounds})


def together(
    methods: Sequence[str],
    options: Options,
    tick: Tick,
    network: str,
    workload: str,
    shape: list[int],
    rounds: int,
) -> Entries:
    work = WORKLOADS[workload]
    torch.manual_seed(0)
    stock, x = SIZES[network][0]().to(options.device), work.batch(tuple(shape), options.device)
    models = {}
    for name in methods:
        models[name] = model = deepcopy(stock)
        if name != "stock":
            srp.convert_to_reversible(model, mode=name)
    steps = {name: partial(_step, work.loss_of, model, x) for name, model in models.items()}
    found: Entries = {}
    for name, step in steps.items():
        tick(f"{network}: {name}, calls")
        step()
        found[name] = {"calls": calls_of(step)}
    seconds = alternate(steps, rounds, x.device, lambda name: tick(f"{network}: {name}, time"))
    of_stock = statistics.median(seconds["stock"])
    for name, taken in seconds.items():
        median = statistics.median(taken)
        found[name] |= {"seconds": median, "time_ratio": median / of_stock}
    return found


def _step(loss_of: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    loss_of(model, x).backward()


def calls_of(step: Callable[[], object]) -> int:
    """Calls of functions of the package that a step makes in this thread."""
    found = 0

    def count(frame, event, _):  # type: ignore[no-untyped-def]
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(HOME)

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found
