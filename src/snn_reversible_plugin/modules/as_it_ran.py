"""Running something as it ran, or as if it had not run.

The one idea: whatever a run reads besides its input and its parameters is written down before, and put
back: random numbers here, tables in :mod:`.states`, autocast in :mod:`...ops.autocast`. Source:
``torch.utils.checkpoint``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from snn_reversible_plugin.modules.states import OF_TORCH, Contents, Snapshot, cut_inside, tables_of
from snn_reversible_plugin.ops.interrupts import surely


class RandomNumbers:
    """The states of the random number generators at the time it is made: the CPU's, and some devices'.

    Example:
        >>> first = RandomNumbers()
        >>> drawn = torch.rand(2)
        >>> with first.again():
        ...     torch.equal(torch.rand(2), drawn)
        True
        >>> first.unused()
        False
    """

    __slots__ = ("_devices", "_states")

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._devices = sorted(
            {device for device in devices if device.type not in ("cpu", "meta")}, key=str
        )
        self._states = self._read()

    def unused(self) -> bool:
        """Whether no generator has moved on since."""
        return all(map(torch.equal, self._states, self._read()))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Context manager: the same numbers are drawn; afterwards generators go on from where they were."""
        now = self._read()
        try:
            self._set(self._states)
            yield
        finally:
            surely(partial(self._set, now))

    def _read(self) -> list[Tensor]:
        of_devices = (torch.get_device_module(device).get_rng_state(device) for device in self._devices)
        return [torch.get_rng_state(), *of_devices]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)


# Parameters of models that run as if they had not, and whether somebody reads their gradients. Not by
# thread: a device's backward has its own.
tried: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()


@contextmanager
def unchanged(model: nn.Module, *, reads_gradients: bool = False) -> Iterator[None]:
    """Context manager: on leaving, the model is as it was on entering.

    Inside, states that carry a graph are cut from it: it may have been freed by a backward. Put back are
    buffers, attributes, lists and dictionaries among them, neuron states, gradients, and the random
    number generators. Parameters are taken to be only read; an optimizer that steps in the backward frees
    their gradients and steps nothing. ``reads_gradients``: nor does it free them.
    """
    before = Snapshot(model.modules(), buffers=True)
    contents = Contents(model.modules(), tensors=True)
    for module in model.modules():
        for table in tables_of(module):
            for key in [key for key in table if key not in OF_TORCH]:
                cut_inside(table, key)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    outer = {parameter: tried.get(parameter) for parameter, _ in gradients}

    def put_back() -> None:
        before.put_back()
        contents.put_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient
            tried.pop(parameter, None)
            if (reads := outer[parameter]) is not None:
                tried[parameter] = reads

    try:
        for parameter, _ in gradients:
            parameter.grad = None
            tried[parameter] = reads_gradients
        with RandomNumbers(parameter.device for parameter, _ in gradients).again():
            yield
    finally:
        surely(put_back)
