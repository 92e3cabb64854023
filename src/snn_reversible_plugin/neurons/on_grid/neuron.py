"""Neurons on the dyadic grid: what stands in front of a neuron's class, whatever its framework.

The one idea: a mixin whose ``forward`` takes a step on the grid where the neuron, as it is set at that
moment, has one, and leaves the call to the class behind it where it hasn't. A framework's adapter says
which, and hands the neuron's states and constants to :func:`~.neurons.on_grid.step.step`.

Source: this package's own.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.swap import STRICT, SwappedClass
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.ops import devices
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import is_plain

# NOTE [Leaving the grid, and coming back]
#
# 1. Whatever trains in stock trains here. Settings, inputs and states that a step on the grid can't take
#    (a decay of 0, an infinite threshold, float64) leave the call to stock's arithmetic, and so does a
#    state that would leave the grid's range: nothing was written to the neuron yet, so the step is done
#    again as stock does it. The timeline ends before it, and its newest state is whole.
# 2. The step after goes on in stock's arithmetic, because its state is one that stock's left: that tensor
#    is remembered, weakly. A sequence that starts from another (a reset, zeros of the user's) is on the
#    grid again. Say a membrane charges to 300 at step 7: steps 0 to 6 are undone from the membrane after
#    step 6, steps 7 to the end hold theirs, and the next sequence starts on the grid.
#    Such a sequence is in neither arithmetic alone. What holds of it is what holds on the grid, the exact
#    gradient of the forward that ran; the reason is said beside it.
# 3. Where the user asked for the grid by name (`arithmetic="grid"`), a state that leaves it is an error.
# 4. The user is told once a neuron, and the reason stands in every report.

C = TypeVar("C")


class OffGrid(Exception):
    """A call that a step on the grid can't take; the text says why."""


class OnGrid(SwappedClass):
    """In front of a neuron's class: its single steps are reversible in time.

    An attribute ``grid_bits`` of the neuron sets the grid's binary digits behind the point; by default they
    follow its threshold. Adapters give the methods that raise here.
    """

    def grid_settings(self) -> Any:
        """What a step on the grid has to know of the neuron as it is set now; a text: why there is none."""
        raise NotImplementedError

    def step_on_grid(self, settings: Any, *args: Any, **kwargs: Any) -> Any:
        """One step, with what :meth:`grid_settings` returned and the arguments of ``forward``.

        Returns what stock's ``forward`` would; ``NotImplemented`` for arguments that are left to stock.
        """
        raise NotImplementedError

    def fix_grid(self) -> None:
        """Fix what a conversion fixes: :func:`~.neurons.on_grid.switches.fix`."""
        raise NotImplementedError

    def states_on_grid(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The states that a call with these arguments starts from; without any, those the neuron holds."""
        raise NotImplementedError

    @property
    def bits_in_use(self) -> int:
        """The grid's binary digits behind the point."""
        return switches.bits_of(self)

    @property
    def is_set_for_grid(self) -> bool:
        """Whether the neuron, as it is set now, has steps on the grid."""
        return not isinstance(self.grid_settings(), str)

    @property
    def off_grid_reason(self) -> str:
        """Why the neuron as it is set now, or its last call, is off the grid; empty where it isn't."""
        settings = self.grid_settings()
        return settings if isinstance(settings, str) else _reasons[self].why if self in _reasons else ""

    @property
    def arithmetic(self) -> str:
        """Which guarantee holds, with the settings of now and the last call."""
        left_to_stock = self in _reasons and _reasons[self].from_the_start
        on_grid = self.is_set_for_grid and not left_to_stock
        return "grid" if on_grid else getattr(super(), "arithmetic", "stock")

    @property
    def treatment(self) -> str:
        """What the backward does, for reports."""
        if self.arithmetic == "grid":
            return "reversed in time"
        return getattr(super(), "treatment", "stock step")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One time step, or stock's forward."""
        settings = self.grid_settings() if tape.runs_eagerly() else ""
        if isinstance(settings, str):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if _left.data and self._goes_on_off_grid(args, kwargs):  # type: ignore[attr-defined]
            return self._off_grid(args, kwargs)
        # A compiler that gave up on this frame would go on with those below, which are numba's and numpy's.
        compiler = tape.set_compiler(None)
        try:
            result = self.step_on_grid(settings, *args, **kwargs)
        except OffGrid as why:
            self._warn(why)
        except OverflowError as why:
            if STRICT.of(self):  # type: ignore[arg-type]
                raise
            self._warn(why)
        else:
            if result is not NotImplemented:
                if _reasons.data:  # type: ignore[attr-defined]
                    _reasons.pop(self, None)
                return result
        finally:
            tape.set_compiler(compiler)
        return self._off_grid(args, kwargs)

    def _off_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().forward(*args, **kwargs)  # type: ignore[misc]
        tensors = [state for state in self.states_on_grid() if isinstance(state, Tensor) and state.dim()]
        _left[self] = tuple(map(weakref.ref, tensors))
        return result

    def _goes_on_off_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        left = [state for ref in _left.get(self, ()) if (state := ref()) is not None]
        return bool(left) and any(
            state is one for state in self.states_on_grid(*args, **kwargs) for one in left
        )

    def _warn(self, why: Exception) -> None:
        if self not in _warned:
            _warned.add(self)
            warnings.warn(
                f"{switches.name_of(self)}: it goes on in stock's arithmetic, and holds its membranes, "
                f"until its states are reset. {why}",
                stacklevel=4,
            )
        _reasons[self] = _Reason(str(why), isinstance(why, OffGrid))


class _Reason(NamedTuple):
    """Why a call was off the grid; ``from_the_start``: no step of its kind can be on it."""

    why: str
    from_the_start: bool


_left: weakref.WeakKeyDictionary[Any, tuple[weakref.ref[Tensor], ...]] = weakref.WeakKeyDictionary()
_reasons: weakref.WeakKeyDictionary[Any, _Reason] = weakref.WeakKeyDictionary()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


def check_dtypes(x: Tensor, *states: Tensor) -> None:
    """Refuse an input and states of which stock would make states that are not float32, or no tensors.

    Raises:
        OffGrid: naming the dtype, or the class.
    """
    for tensor in (x, *states):
        if not is_plain(tensor):
            raise OffGrid(f"A step on the grid takes plain tensors, not {type(tensor).__name__}.")
        if not tensor.is_floating_point() or tensor.dtype is torch.float64:
            raise OffGrid(
                f"A step on the grid takes floating-point numbers up to float32, not {tensor.dtype}."
            )


def check_spikes(fire: Any, u: Tensor, spikes: Tensor) -> None:
    """Hold spikes to what a user's own function gives, where that doesn't wait for a device.

    Raises:
        OffGrid: it gives others.
    """
    if may_look(u.device):
        with torch.no_grad():
            theirs = fire(u)
        if not torch.equal(theirs, spikes):
            raise OffGrid("Its surrogate gave other spikes than a comparison with the threshold.")


def value_of(parameter: Tensor) -> Any:
    """What tells whether a parameter is what it was: on a CPU its values, because a write through ``.data``
    moves no version; on a device, which is not waited for, its version and address."""
    if not may_look(parameter.device):
        return id(parameter), parameter._version, parameter.data_ptr()
    with (
        torch._C._DisableTorchDispatch()
    ):  # a look is nothing to record, and below Python a tenth of the time
        if parameter.numel() == 1:
            return parameter.item()
        return parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()


_constants: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def constants_of(neuron: Any, of: str, settings: tuple[Any, ...], make: Callable[..., C], *given: Any) -> C:
    """``make(*given)``, made again when the settings changed; one for each neuron and use.

    Args:
        neuron: whose constants they are; they go with it.
        of: which: the name of a state.
        settings: all that the constants follow from, comparable: numbers, and :func:`value_of` tensors.
        make, given: what makes them.

    Raises:
        OffGrid: there are none, because a decay can't be undone, say.

    Example:
        >>> lif = torch.nn.Identity()
        >>> [constants_of(lif, "v", (tau,), print, "made for", tau) for tau in (2.0, 2.0, 4.0)]
        made for 2.0
        made for 4.0
        [None, None, None]
    """
    if devices.is_capturing():
        # A replay computes them again, of what parameters are by then, only if they are part of the graph.
        recording = tape.current()
        settings = (*settings, None if recording is None else weakref.ref(recording))
    known = _constants.get(neuron)
    if known is None:
        known = _constants[neuron] = {}
    found = known.get(of)
    if found is None or found[0] != settings:
        try:
            with tape.paused():  # they outlive the recording, so what is made of them may not lean on it
                found = known[of] = settings, make(*given)
        except ValueError as error:
            raise OffGrid(str(error)) from error
    return found[1]
