"""Neurons on the dyadic grid: what stands in front of a neuron's class, whatever its framework.

The one idea: a mixin whose ``forward`` takes a step on the grid where the neuron, as it is set at that
moment, has one, and leaves the call to the class behind it where it hasn't. A framework's adapter says
which, and hands the neuron's states and constants to :func:`~.neurons.on_grid.step.step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.neurons.on_grid import switches

C = TypeVar("C")


class OnGrid(SwappedClass):
    """In front of a neuron's class: its single steps are reversible in time.

    An attribute ``grid_bits`` of the neuron sets the grid's binary digits behind the point, 16 by default.
    Adapters give the two methods that raise here.
    """

    def grid_settings(self) -> Any:
        """What a step on the grid has to know of the neuron as it is set now; a text: why there is none."""
        raise NotImplementedError

    def step_on_grid(self, settings: Any, *args: Any, **kwargs: Any) -> Any:
        """One step, with what :meth:`grid_settings` returned and the arguments of ``forward``.

        Returns what stock's ``forward`` would; ``NotImplemented`` for arguments that are left to stock.
        """
        raise NotImplementedError

    @property
    def arithmetic(self) -> str:
        """Which guarantee holds, with the settings of now."""
        return "stock" if isinstance(self.grid_settings(), str) else "grid"

    @property
    def treatment(self) -> str:
        """What the backward does, for reports."""
        if self.arithmetic == "grid":
            return "reversed in time"
        return getattr(super(), "treatment", "stock step")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One time step, or stock's forward."""
        if tape.runs_eagerly():
            settings = self.grid_settings()
            if not isinstance(settings, str):
                result = self.step_on_grid(settings, *args, **kwargs)
                if result is not NotImplemented:
                    return result
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def check_input(neuron: Any, x: Tensor) -> None:
    """Refuse an input that no step on the grid takes.

    Raises:
        TypeError: it is neither float32 nor half precision.
    """
    if not x.is_floating_point() or x.dtype is torch.float64:
        raise TypeError(
            f"{switches.name_of(neuron)}: a step on the grid takes float32 or half precision, not "
            f'{x.dtype}; convert with arithmetic="stock" for others'
        )


_constants: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def constants_of(neuron: Any, of: str, settings: tuple[Any, ...], make: Callable[..., C], *given: Any) -> C:
    """``make(*given)``, made again when the settings changed; one for each neuron and use.

    Args:
        neuron: whose constants they are; they go with it.
        of: which: the name of a state.
        settings: all that the constants follow from, comparable: numbers, and a tensor's id and version,
            where the constants hold the tensor.
        make, given: what makes them.

    Example:
        >>> lif = torch.nn.Identity()
        >>> [constants_of(lif, "v", (tau,), print, "made for", tau) for tau in (2.0, 2.0, 4.0)]
        made for 2.0
        made for 4.0
        [None, None, None]
    """
    known = _constants.get(neuron)
    if known is None:
        known = _constants[neuron] = {}
    found = known.get(of)
    if found is None or found[0] != settings:
        found = known[of] = settings, make(*given)
    return found[1]
