"""A counter of flipped spikes for whole models: did the rebuilt network fire as the forward did?

The one idea: check mode for everything in a model that is rebuilt, chains of blocks and temporal columns,
switched on for the time of a training step. On the grid the count is zero; in plain floating point
(``bits=None``), the published methods, it shows how far the rebuild has drifted. Source: docs/exactness.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from snn_reversible_plugin.blocks import RevSColumns, RevSSequence
from snn_reversible_plugin.blocks.undo import Rebuild
from snn_reversible_plugin.ops.interrupts import surely

_REBUILT = (RevSSequence, RevSColumns)


class FlipCount:
    """What :func:`counting_flips` found in the last backward, by chain and in all; a table in print.

    Example:
        >>> import torch
        >>> import snn_reversible_plugin as srp
        >>> from snn_reversible_plugin.models import rev_s_resnet24
        >>> model = rev_s_resnet24()
        >>> with srp.counting_flips(model) as found:
        ...     model(torch.rand(2, 1, 2, 12, 12)).sum().backward()
        >>> found.flipped_spikes, found.spikes > 0
        (0, True)
    """

    def __init__(self, chains: dict[str, RevSSequence | RevSColumns]) -> None:
        self._chains = chains

    @property
    def chains(self) -> dict[str, Rebuild]:
        """The :class:`~.undo.Rebuild` of every chain, or columns, that a backward has gone through."""
        found = {name: chain.last_rebuild for name, chain in self._chains.items()}
        return {name: rebuild for name, rebuild in found.items() if rebuild is not None}

    @property
    def spikes(self) -> int:
        """Outputs of neurons that were compared, neurons times time steps."""
        return sum(rebuild.spikes for rebuild in self.chains.values())

    @property
    def flipped_spikes(self) -> int:
        """Those that differ between forward and rebuild."""
        return sum(rebuild.flipped_spikes for rebuild in self.chains.values())

    def __str__(self) -> str:
        if not self.chains:
            return "no chain has been rebuilt yet: call backward first"
        return "\n".join(f"{name}: {rebuild}" for name, rebuild in self.chains.items())


@contextmanager
def counting_flips(model: nn.Module) -> Iterator[FlipCount]:
    """Context manager: count the spikes that differ between forward and rebuild in a model's chains.

    Chains are :class:`RevSSequence` and :class:`RevSColumns`. Slow; holds, from the forward to the
    backward, one bit a spike, each chain's input, and the states of columns after their first time step.
    The forward has to run inside; the count is there after its backward, wherever that runs.

    Raises:
        ValueError: the model has neither.
        RuntimeError: from the backward, where a stream or state on the grid was rebuilt wrongly.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.models import RevSResNet
        >>> model = RevSResNet((1, 1), (4, 6), T=2)
        >>> with counting_flips(model) as flips:
        ...     model(torch.randn(1, 3, 8, 8)).sum().backward()
        >>> print(flips)
        stages.0: 0 of 2,048 spikes flipped; the rebuilt input is equal bit for bit
        stages.2: 0 of 768 spikes flipped; the rebuilt input is equal bit for bit
    """
    named = model.named_modules()
    chains = {name or "model": module for name, module in named if isinstance(module, _REBUILT)}
    if not chains:
        kinds = " or ".join(kind.__name__ for kind in _REBUILT)
        raise ValueError(f"{type(model).__name__} has no {kinds}, so that nothing is rebuilt")
    before = {name: chain.check for name, chain in chains.items()}

    def put_back() -> None:
        for name, chain in chains.items():
            chain.check = before[name]

    try:
        for chain in chains.values():
            chain.check, chain.last_rebuild = True, None
        yield FlipCount(chains)
    finally:
        surely(put_back)
