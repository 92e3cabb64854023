"""What a published family is here: a network in its idiom, for the release that it was written for.

The one idea: nothing is mended for this package's sake. A network is written as its authors' scripts are,
imports that release's neurons, and is trained as that script trains.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

HOMES = {"0.0.0.0.12": "clock_driven", "0.0.0.0.14": "activation_based", "2.0": "activation_based"}
MODULES = ("base", "neuron", "surrogate", "functional", "layer")


def spikingjelly(version: str) -> SimpleNamespace:
    """A release's modules: the installed one for 2.0, else one that ``make venv`` has put aside.

    Raises:
        FileNotFoundError: the release is not there.
    """
    root = f"spikingjelly.{HOMES[version]}"
    if version != "2.0":
        place = (
            Path(os.environ.get("SRP_OLD_RELEASES", Path(sys.prefix) / "old")) / f"spikingjelly-{version}"
        )
        if not (place / "spikingjelly").exists():
            raise FileNotFoundError(f"SpikingJelly {version} is not at {place}: make venv puts it there")
        parent = f"published_{version.replace('.', '_')}"
        if parent not in sys.modules:
            package = ModuleType(parent)
            package.__path__ = [str(place)]
            sys.modules[parent] = package
        root = f"{parent}.{root}"
    return SimpleNamespace(**{name: importlib.import_module(f"{root}.{name}") for name in MODULES})


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    """A loss of whatever the network gives, called with the whole input."""
    found = model(x)
    outputs = found if isinstance(found, (tuple, list)) else (found,)
    return sum((output.float() ** 2).mean() for output in outputs)  # type: ignore[return-value]


def fire(model: nn.Module) -> nn.Module:
    """Untrained deep networks are silent: with larger norms every layer spikes."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.constant_(module.weight, 2.0)
            nn.init.constant_(module.bias, 0.3)
    return model


@dataclass(frozen=True)
class Family:
    """A published family.

    Args:
        name: as its paper calls it.
        make: called with the release's modules and a width, gives the network.
        version: of SpikingJelly, None where the family has its neurons itself or from snnTorch.
        small: width and shape of the input, for tests.
        large: the same where stock holds 100 MB and more.
        loss: how its script comes from a batch to a loss; an online one has gone backward through all
            parts of it but the last.
        own_procedure: it has a reversible or online way of its own to save memory.
        amp: its scripts run under autocast; its own function may know nothing of that.
        scripted: TorchScript compiles parts of its own, as 0.0.0.0.14 does of its neurons.
        one_call: from a batch to what a single call of the network takes.
        kwargs: what it takes besides.
        classes: inputs are whole numbers below it, such as tokens.
    """

    name: str
    make: Callable[[SimpleNamespace | None, int], nn.Module]
    version: str | None
    small: tuple[int, tuple[int, ...]]
    large: tuple[int, tuple[int, ...]]
    loss: Callable[[nn.Module, Tensor], Tensor] = mean_square
    own_procedure: bool = False
    amp: bool = True
    scripted: bool = False
    one_call: Callable[[Tensor], Tensor] = lambda x: x
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    classes: int | None = None

    def network(self, width: int | None = None) -> nn.Module:
        """A network of this width, the small one's by default."""
        release = None if self.version is None else spikingjelly(self.version)
        return fire(self.make(release, self.small[0] if width is None else width))

    def batch(self, shape: tuple[int, ...] | None = None) -> Tensor:
        """An input of this shape, the small network's by default."""
        shape = self.small[1] if shape is None else shape
        return torch.rand(shape) if self.classes is None else torch.randint(self.classes, shape)
