"""A random program, as the text that a user could have written.

The one idea: a program is source code. It is run by ``exec``, printed as it is where it fails, and made
shorter by leaving out lines for as long as it fails. It defines ``make() -> nn.Module`` and
``train(net) -> list`` of what a user would see, and may use what :data:`HEADER` imports and defines.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

HEADER = """\
import contextlib, copy, random, threading
import numpy, snntorch, torch
import snn_reversible_plugin as srp
import torch.nn.functional as F
from snntorch import surrogate as grads
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.checkpoint import checkpoint

def reset(net):
    for module in net.modules():
        if hasattr(module, "reset_mem"): module.reset_mem()
    functional.reset_net(net)

def membranes(net):
    return [module.v for module in net.modules() if isinstance(getattr(module, "v", None), torch.Tensor)]

def detach(net):
    functional.detach_net(net)
    for module in net.modules():
        for name, value in module._buffers.items():
            if value is not None and value.grad_fn is not None: module._buffers[name] = value.detach()

class Loop(nn.Module):  # snnTorch's usual one, and one whose membrane stays
    def __init__(self, goes_on, **how):
        super().__init__()
        self.lif = snntorch.Leaky(beta=0.9, init_hidden=goes_on, **how)

    def forward(self, x):
        if self.lif.init_hidden: return torch.stack([self.lif(y) for y in x])
        mem, spikes = self.lif.reset_mem(), []
        for y in x:
            spike, mem = self.lif(y, mem)
            spikes.append(spike)
        return torch.stack(spikes)

converted = False

def plainly(net):  # a chain of reversible blocks runs as any module where nothing is converted
    for module in net.modules():
        if isinstance(module, srp.RevSSequence): module.reversible = converted

def recorded(net):
    return contextlib.nullcontext()

def again(net):  # what is on the grid, and left it, is put there again
    for module in net.modules():
        if hasattr(module, "fix_grid"): module.fix_grid()

def in_thread(function):
    found = []
    def run():
        torch.set_num_threads(1)  # of a new thread, whatever this one's is: sums don't depend on it then
        found.append(function())
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]
"""

SMALL_SLICE = 1 << 10  # bytes: mode minimal cuts small layers, too


@dataclass
class Settings:
    """How a program's network is converted."""

    mode: str
    arithmetic: str


@dataclass
class Program:
    """A program under construction, and what is in it."""

    seed: int
    settings: Settings
    features: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @property
    def source(self) -> str:
        return "\n".join(self.lines) + "\n"

    def write(self, *lines: str, indent: int = 0) -> None:
        self.lines += [" " * 4 * indent + line for line in lines]

    def pick(self, options: Sequence[T], what: str = "") -> T:
        """One of the options, counted under its own text."""
        chosen = self.random.choice(options)
        if what:
            self.features.add(f"{what}: {chosen}")
        return chosen

    def maybe(self, probability: float, what: str) -> bool:
        """Whether to do something, counted where it is done."""
        done = self.random.random() < probability
        if done:
            self.features.add(what)
        return done


def script(source: str, settings: Settings, seed: int) -> str:
    """A program as a file that runs by itself and prints what differs."""
    on_grid = settings.arithmetic != "stock"
    small = "from snn_reversible_plugin.tape.sliced import cut", f"cut.STEP['cpu'] = {SMALL_SLICE}"
    how = f"mode={settings.mode!r}, arithmetic={settings.arithmetic!r}"
    lines = [
        f"# seed {seed}",
        HEADER,
        *(small if settings.mode == "minimal" else ()),
        source,
        "found = []",
        "for converted in (False, True):",
        "    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)",
        "    net = make()",
    ]
    if on_grid:
        lines += [
            f"    srp.convert_to_reversible(net, {how})",
            "    around = contextlib.nullcontext() if converted else srp.convert.differentiated(net)",
        ]
    else:
        lines += [
            "    if converted:",
            f"        srp.convert_to_reversible(net, {how})",
            "    around = contextlib.nullcontext()",
        ]
    lines += [
        "    recorded = srp.reversible if converted else lambda net: contextlib.nullcontext()",
        f"    again = (lambda net: srp.convert_to_reversible(net, {how})) if converted else again",
        "    with around:",
        "        torch.manual_seed(1)",
        "        seen = train(net)",
        "    found.append([*seen, *net.state_dict().values(), *(p.grad for p in net.parameters())])",
        "for number, (expected, got) in enumerate(zip(*found, strict=True)):",
        "    if isinstance(expected, torch.Tensor) and not torch.equal(expected, got):",
        "        print(number, (expected - got).abs().max())",
    ]
    return "\n".join(lines) + "\n"
