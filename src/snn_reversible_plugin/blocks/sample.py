"""A block and the branches found in it, run on a sample: a second look, where the graph is the proof.

The one idea: the block's first layer with a known number of channels gives the shape, and where none of the
usual shapes runs there is no sample, and the graph has to do. What is run are copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import framework_of

_CHANNELS = ("in_channels", "num_features", "in_features")


def differs_on_a_sample(block: nn.Module, branches: Sequence[nn.Module]) -> bool:
    """Whether a block computes something else than the sums with its branches, in either mode.

    Of a tuple it is the first that counts.
    A branch of another shape than the block's input differs too, where adding it would broadcast it.

    Example:
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x - self.fc(x)
        >>> block = Block()
        >>> differs_on_a_sample(block, [block.fc])
        True
    """
    device = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        return False  # nothing here is worth waiting for a device
    return any(_differs(block, branches, training) for training in (True, False))


def _differs(block: nn.Module, branches: Sequence[nn.Module], training: bool) -> bool:
    for shape in _shapes(block):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            x = torch.randn(shape) * 2
            try:
                expected = _copied([block], training)[0](x.clone())
            except Exception:  # another shape then, or none
                continue
            torch.manual_seed(0)
            torch.randn(shape)
            for branch in _copied([block, *branches], training)[1:]:
                added = branch(x)
                if added.shape != x.shape:
                    return True
                x = x + added
        if isinstance(expected, tuple):
            expected = expected[0]
        return not (isinstance(expected, Tensor) and torch.equal(expected, x))
    return False


def _copied(modules: list[nn.Module], training: bool) -> list[nn.Module]:
    copies = copy.deepcopy(modules)
    for module in copies[0].modules():
        module.training = training
        framework = framework_of(module)
        if framework is not None and framework.states_of(module) is not None:
            framework.reset(module)
    return copies


def _shapes(block: nn.Module) -> Iterator[tuple[int, ...]]:
    found = (getattr(module, name, None) for module in block.modules() for name in _CHANNELS)
    channels = next((one for one in found if isinstance(one, int)), None)
    if channels is not None:
        yield from ((2, 2, channels, 8, 8), (2, channels, 8, 8), (2, 2, channels, 16), (2, channels, 16))
        yield from ((2, 2, 4, channels), (2, 4, channels), (2, channels))
