"""What Python takes of a training step: at shapes so small that a CPU's arithmetic is next to nothing."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snn_reversible_plugin as srp

from ..experiment import Entries, Options, Tick, Work
from ..measure import alternate, ratio
from ..networks import LeakyLoop, LIFLoop
from ..workloads import WORKLOADS

HOME = str(Path(srp.__file__).parent)
NOTHING = "stock, watched"  # by a mode and hooks that do nothing, which is what any tape begins with
AGAIN = "stock, products again"  # and nothing else: the least that a step takes which keeps none of them
METHODS = ("stock", NOTHING, AGAIN, "memory", "speed")  # by the defaults of a conversion: on the grid


class Tiny(NamedTuple):
    """A workload of the other experiments, at a small shape, with a smaller network where there is one."""

    workload: str
    shape: tuple[int, ...]
    quick: tuple[int, ...]
    make: Callable[[], nn.Module] | None = None


NETWORKS = {
    "SpikingJelly loop": Tiny("lif-loop", (100, 2, 8), (5, 2, 8), partial(LIFLoop, 8)),
    "snnTorch loop": Tiny("leaky-loop", (100, 2, 8), (5, 2, 8), partial(LeakyLoop, 8)),
    "snnTorch loop, 256 wide": Tiny("leaky-loop", (100, 32, 256), (5, 2, 16), partial(LeakyLoop, 256)),
    "SEW-ResNet18": Tiny("sew-resnet18", (4, 1, 3, 32, 32), (2, 1, 3, 32, 32)),
    "VGG": Tiny("vgg", (4, 1, 2, 32, 32), (2, 1, 2, 32, 32)),
}


def works(options: Options) -> Iterator[Work]:
    for name, tiny in NETWORKS.items():
        shape = tiny.quick if options.quick else tiny.shape
        yield Work(name, METHODS, {"network": name, "shape": list(shape), "repeats": options.rounds(30)})


def together(
    methods: Sequence[str], options: Options, tick: Tick, network: str, shape: list[int], repeats: int
) -> Entries:
    """In turns, without the collector of cycles in between, which takes its time where it likes."""
    tiny = NETWORKS[network]
    workload = WORKLOADS[tiny.workload]
    torch.manual_seed(0)
    stock = (tiny.make or workload.make)().to(options.device)
    x = torch.rand(shape, device=options.device)
    steps: dict[str, Callable[[], Any]] = {}
    for method in methods:
        model = copy.deepcopy(stock)
        forward = partial(workload.loss_of, model, x)
        if method == NOTHING:
            forward = partial(watched, forward)
        elif method not in ("stock", AGAIN):
            srp.convert_to_reversible(model, mode=method)
        steps[method] = lambda forward=forward: forward().backward()
        if method == AGAIN:
            steps[method] = partial(with_products_again, forward, products_of(model, forward))
    gc.collect()
    gc.disable()
    try:
        seconds = alternate(steps, repeats, x.device, lambda method: tick(f"{network}: {method}"))
    finally:
        gc.enable()
    return {
        method: {
            "method": method,
            "seconds": seconds[method],
            "time_ratio": ratio(seconds[method], seconds["stock"]),
            "calls": own_calls(step),
        }
        for method, step in steps.items()
    }


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def watched(forward: Callable[[], Tensor]) -> Tensor:
    """Run a forward whose operations and saved tensors come by Python, which leaves them as they are."""
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself), _Nothing():
        return forward()


Product = tuple[nn.Module, Tensor]


def products_of(model: nn.Module, forward: Callable[[], Tensor]) -> list[Product]:
    """The convolutions and linear layers that a neuron comes after, with what goes into each call."""
    found: list[Product] = []
    # What the last one gives is read by the loss, and by no neuron.
    layers = [one for one in model.modules() if isinstance(one, (nn.Linear, nn.modules.conv._ConvNd))][:-1]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: found.append((layer, args[0].detach())))
        for layer in layers
    ]
    forward()
    for hook in hooks:
        hook.remove()
    return found


def with_products_again(forward: Callable[[], Tensor], products: Sequence[Product]) -> None:
    """A training step, and these products once more."""
    forward().backward()
    with torch.no_grad():
        for layer, x in products:
            layer(x)


def own_calls(run: Callable[[], Any]) -> int:
    """How many calls of the package's own functions it takes, on this thread: on a CPU, all."""
    found = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(HOME)

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found
