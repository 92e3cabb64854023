"""Blocks that run at once: one input, the sum of their branches, and where they are alike one call for all.

The one idea: reversible blocks need not wait for one another. A group of them reads one stream and adds the
sum of its branches to the other, which is undone as a single block is; and k equal branches are one branch
with k times as many channels whose convolutions are grouped.

Source: after Xu et al., "ParaRevSNN: A Parallel Reversible Spiking Neural Network for Efficient Training
and Inference", 2025 (arXiv 2508.01223), whose abstract says that dependencies between blocks are cut so
that they run in parallel; the equations here are this package's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.blocks.inner_backward import sharded_modules
from snn_reversible_plugin.blocks.undo import SpikeObserver
from snn_reversible_plugin.modules.kinds import framework_of, is_multi_step, is_spiking, load_adapters
from snn_reversible_plugin.modules.registry import lean_types
from snn_reversible_plugin.modules.states import states_of

# NOTE [When branches are one call]
#
# 1. They are `nn.Sequential` of as many modules, each of the same type with the same settings: convolutions
#    (their channels are put side by side, their groups add up), batch norms (a channel goes its own way, so
#    statistics are put side by side, and running ones written back), and fresh multi-step neurons without
#    parameters that are known to work element by element: those that have a lean type.
# 2. Up to the first convolution or norm all branches have the same values: a neuron there fires once for
#    all, and its state is everybody's. The last sum is over the k parts of the channels.
# 3. Nobody may look on from inside: a hook on one of the modules, or FSDP, takes the group one by one. What
#    check mode observes is the joint spikes.
# 4. Batched and one by one differ by the order of a convolution's sums, so by rounding. The choice is made
#    from what the modules are, so that forward, rebuild and plain run make the same.

CHANNELS, DIMENSIONS = 2, 5  # of [T, N, C, H, W]


class Group(nn.Module):
    """Blocks that run at once. Made for one call; the blocks stay where they are.

    Attributes:
        f, g: the blocks' branches, as one.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.f, self.g = (AtOnce([getattr(block, name) for block in blocks]) for name in ("f", "g"))
        self._sharded = bool(sharded_modules(self))
        load_adapters()

    def forward(self, x: Tensor, branch: str) -> Tensor:
        branches: AtOnce = getattr(self, branch)
        if not self._sharded and not any(map(_is_watched, self.blocks)) and branches.is_one_call(x):
            return branches(x)  # type: ignore[no-any-return]
        total = self.blocks[0](x, branch=branch)
        for block in list(self.blocks)[1:]:
            total = total + block(x, branch=branch)
        return total  # type: ignore[no-any-return]


class AtOnce(nn.Module):
    """The sum of branches that are alike, as one branch with their channels side by side."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def rows(self) -> list[tuple[nn.Module, ...]]:
        """The modules that belong together: of each branch the first one, then the second ones, ..."""
        return list(zip(*(branch.children() for branch in self.branches), strict=True))

    def is_one_call(self, x: Tensor) -> bool:
        """Whether the branches are alike, and nobody looks on."""
        # Surrogates inside neurons may be shared: they have no state.
        first, modules = self.branches[0], [m for branch in self.branches for m in branch.children()]
        return (
            len(self.branches) > 1
            and x.dim() == DIMENSIONS
            and all(type(branch) is nn.Sequential for branch in self.branches)
            and all(len(branch) == len(first) for branch in self.branches)  # type: ignore[arg-type]
            and len({id(module) for module in modules}) == len(modules)
            and not any(map(_is_watched, modules))
            and all(map(_alike, self.rows()))
        )

    def forward(self, x: Tensor) -> Tensor:
        count, together = len(self.branches), False  # whether channels are side by side yet
        for row in self.rows():
            if is_spiking(row[0]):
                x = _fire(row, x, together)
                continue
            if isinstance(row[0], nn.Conv2d):
                x = _convolve(row, x, together)
            else:
                x = _normalize(row, x if together else _side_by_side(x, count))
            together = True
        if not together:
            return x * count
        return x.unflatten(CHANNELS, (count, x.shape[CHANNELS] // count)).sum(CHANNELS)


def _side_by_side(x: Tensor, count: int) -> Tensor:
    shape = (*x.shape[:CHANNELS], count, *x.shape[CHANNELS:])
    return x.unsqueeze(CHANNELS).expand(shape).flatten(CHANNELS, CHANNELS + 1)


def _joined(row: Sequence[Any], name: str) -> Tensor | None:
    parts = [getattr(module, name) for module in row]
    return None if parts[0] is None else torch.cat(parts)


def _convolve(row: Sequence[Any], x: Tensor, together: bool) -> Tensor:
    first, groups = row[0], 1
    if together or first.groups > 1:
        x, groups = x if together else _side_by_side(x, len(row)), len(row) * first.groups
    out = nn.functional.conv2d(
        x.flatten(0, 1), _joined(row, "weight"), _joined(row, "bias"),  # type: ignore[arg-type]
        first.stride, first.padding, first.dilation, groups,
    )  # fmt: skip
    return out.unflatten(0, x.shape[:2])


def _normalize(row: Sequence[Any], x: Tensor) -> Tensor:
    first, statistics = row[0], ("running_mean", "running_var")
    mean, variance = (_joined(row, name) for name in statistics)
    out = nn.functional.batch_norm(
        x.flatten(0, 1), mean, variance, _joined(row, "weight"), _joined(row, "bias"),
        first.training or mean is None, first.momentum, first.eps,
    )  # fmt: skip
    if first.training and mean is not None:
        with torch.no_grad():
            for name, joined in zip(statistics, (mean, variance), strict=True):
                for norm, part in zip(row, joined.chunk(len(row)), strict=True):  # type: ignore[union-attr]
                    getattr(norm, name).copy_(part)
            for norm in row:
                norm.num_batches_tracked.add_(1)
    return out.unflatten(0, x.shape[:2])


def _fire(row: Sequence[nn.Module], x: Tensor, together: bool) -> Tensor:
    """The first neuron runs for all; each gets its part of the states that it leaves."""
    tables = [states_of(neuron) or {} for neuron in row]
    spikes: Tensor = row[0](x)
    for key, left in list(tables[0].items()):
        # A tensor each: gradients of states that are one would be added up in another order.
        parts = [left] * len(row)
        if isinstance(left, Tensor):
            found = left.chunk(len(row), CHANNELS - 1) if together else parts
            parts = [part.clone(memory_format=torch.contiguous_format) for part in found]
        for table, part in zip(tables, parts, strict=True):
            table[key] = part
    return spikes


def _alike(row: Sequence[Any]) -> bool:
    """Whether modules are of one known kind, with the same settings."""
    first = row[0]
    if len({(type(module), module.training, repr(module)) for module in row}) != 1:
        return False
    if is_spiking(first):
        return _are_equal_neurons(row)
    # A framework's layers over time steps, and the package's own.
    if not is_multi_step(first) and not type(first).__module__.endswith(".models.parts"):
        return False
    if isinstance(first, nn.Conv2d):
        return first.padding_mode == "zeros"
    if isinstance(first, nn.BatchNorm2d):
        return first.momentum is not None
    return False


def _are_equal_neurons(row: Sequence[nn.Module]) -> bool:
    framework = framework_of(row[0])
    if framework is None or framework.with_constants or not is_multi_step(row[0]):
        return False
    if any(any(True for _ in neuron.parameters()) or _stores(neuron) for neuron in row):
        return False
    if not all(getattr(type(neuron), "lean", False) or lean_types([neuron]) for neuron in row):
        return False
    states = [states_of(neuron) or {} for neuron in row]
    fresh = not any(isinstance(value, Tensor) for table in states for value in table.values())
    return (
        fresh
        and len({(_settings(neuron), str(table)) for neuron, table in zip(row, states, strict=True)}) == 1
    )


def _stores(neuron: nn.Module) -> bool:
    """Whether it writes down the steps of a call."""
    return any("store" in key and value is True for key, value in vars(neuron).items())


def _settings(neuron: nn.Module) -> str:
    plain = (str, int, float, bool, type(None))
    return str(sorted((key, value) for key, value in vars(neuron).items() if isinstance(value, plain)))


def _is_watched(module: nn.Module) -> bool:
    hooks = [*module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    hooks += [*module._backward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(isinstance(hook, SpikeObserver) for hook in hooks)
