"""snnTorch neurons that run on the dyadic grid, reversible in time.

The one idea: each state of a neuron is a timeline of its own; a synaptic current is one that never fires or
resets. Around their steps this does what stock's ``forward`` does with states, given or hidden.

Source: the ``forward`` methods in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.decays import NONE
from snn_reversible_plugin.modules.swap import LAST_RESET
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.leaky import Fired, Leaky, leaky
from snn_reversible_plugin.neurons.on_grid.neuron import (
    OffGrid,
    OnGrid,
    check_dtypes,
    constants_of,
    value_of,
)
from snn_reversible_plugin.neurons.on_grid.step import Stepped, step
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.snntorch import neurons
from snn_reversible_plugin.snntorch.steps import (
    Spec,
    is_ungraded,
    mechanism_of,
    surrogate_of,
)
from snn_reversible_plugin.snntorch.types import row_of


def spec_of(neuron: Any) -> Spec | None:
    """What the grid knows of a neuron's type."""
    return _spec_of(type(neuron))  # type: ignore[arg-type]


@functools.cache
def _spec_of(cls: type) -> Spec | None:
    row = row_of(cls)
    return row.equations if row.on_grid else None


def why_not(neuron: Any, spec: Spec) -> str | None:
    """Why a neuron, as it is set now, has no step on the grid; None if it has one."""
    found = _settings(neuron, spec)
    return found if isinstance(found, str) else None


def _settings(neuron: Any, spec: Spec) -> str | tuple[str, Surrogate]:
    """The reset and the surrogate, or why there is no step on the grid."""
    reset = mechanism_of(neuron, spec)
    if reset is None:
        return "its charge or its states are not those of the stock class"
    if spec is neurons.LAPICQUE and neuron.C.requires_grad:
        return "its constants are learned"
    surrogate = surrogate_of(neuron)
    if surrogate is None:
        return "its surrogate is not one of snnTorch's own deterministic ones"
    if neuron.inhibition:
        return "it inhibits its neighbours"
    if not is_ungraded(neuron):
        return "its spikes are graded"
    if not getattr(neuron, "reset_delay", True):
        return "its reset has no delay"
    if neuron.threshold.dtype is torch.float64:
        return "it is float64"
    return reset, surrogate


class NeuronOnGrid(OnGrid):
    """In front of a neuron of the leaky family: its steps are reversible in time."""

    def grid_settings(self: Any) -> Any:
        """The reset, and the surrogate."""
        spec = spec_of(self)
        return "its equations are not written for the grid" if spec is None else _settings(self, spec)

    def states_on_grid(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Those that are passed, and those that the neuron holds."""
        spec = spec_of(self)
        names = () if spec is None else spec.states
        return (*args[1:], *kwargs.values(), *(getattr(self, name) for name in names))

    def step_on_grid(self: Any, settings: Any, input_: Tensor, *given: Any, **named: Any) -> Any:
        """One step of all states."""
        spec = spec_of(self)
        assert spec is not None
        states = _before(self, spec, input_, _given(self, spec, given, named))
        current = input_ + self.recurrent(states["spk"]) if spec.recurrent else input_
        beta = None if spec is neurons.LAPICQUE else self.beta
        if beta is None:
            beta, gain = _circuit(self)
            current = current * gain
        found = []
        if "syn" in states:
            current = _integrate(self, "syn", (NONE, None), current, states["syn"], self.alpha).state
            found.append(current)
        # A current of that kind rests on a timeline that never asks for a membrane.
        mem, spikes, fired = _integrate(
            self, "mem", settings, current, states["mem"], beta, trusted=bool(found)
        )
        found.append(mem)
        _keep(self, spec, found, fired)
        if spec.recurrent:
            self.spk = spikes
        return (spikes, *found) if self.output or not self.init_hidden else spikes

    @property
    def reset(self: Any) -> Tensor:
        """The spikes that the last step reset, as stock has them; as bits until somebody asks."""
        fired: Fired | None = LAST_RESET.of(self)
        if fired is not None:
            return fired.spikes()
        if "reset" not in self.__dict__:
            raise AttributeError("reset")
        return self.__dict__["reset"]  # type: ignore[no-any-return]

    @reset.setter
    def reset(self: Any, spikes: Tensor) -> None:
        LAST_RESET.clear(self)
        self.__dict__["reset"] = spikes


def _given(neuron: Any, spec: Spec, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The states that a call passed, None for those that it didn't."""
    for name in spec.states[len(given) :]:
        given += (named.pop(name, None),)
    if named or len(given) != len(spec.states):
        raise TypeError(f"{type(neuron).__name__} takes input_ and {', '.join(spec.states)}")
    if neuron.init_hidden and any(state is not None for state in given):
        raise TypeError("states should not be passed as arguments while `init_hidden=True`")
    return given


def _before(neuron: Any, spec: Spec, input_: Tensor, given: tuple[Any, ...]) -> dict[str, Tensor]:
    """The states before the step: passed, or the neuron's own, or zeros where the shape changed."""
    states = {}
    for name, state in zip(spec.states, given, strict=True):
        state = getattr(neuron, name) if state is None else state
        if state.shape != input_.shape:
            # As stock's: where these and the input are half precision, so is the state that they make.
            state = torch.zeros_like(input_)
        states[name] = state
    if any(tensor.dtype is not torch.float32 for tensor in (input_, *states.values())):
        check_dtypes(input_, *states.values())
        if torch.result_type(input_, states[spec.states[-1]]) is not torch.float32:
            raise OffGrid(f"A step on the grid takes float32 states, not {input_.dtype}.")
    return states


def _keep(neuron: Any, spec: Spec, states: list[Tensor], fired: Any) -> None:
    """Leave on the neuron what stock leaves there: its states, and the spikes that were reset."""
    if isinstance(fired, Fired):
        LAST_RESET.set(neuron, fired)
        neuron.__dict__.pop("reset", None)
    else:
        neuron.reset = fired
    for name, state in zip(spec.states[-len(states) :], states, strict=True):
        if name in neuron._buffers:  # what setattr comes to, at a tenth of its time
            neuron._buffers[name] = state
        else:
            setattr(neuron, name, state)


def _integrate(
    neuron: Any,
    name: str,
    settings: tuple[str, Surrogate | None],
    current: Tensor,
    u: Tensor,
    beta: Tensor,
    trusted: bool = False,
) -> Stepped:
    """One step of one of a neuron's states; the membrane fires."""
    threshold, bits = neuron.threshold, switches.bits_of(neuron)
    parameters = beta, threshold
    each = bool(beta.numel() > 1 or threshold.numel() > 1)
    versions = (
        value_of(beta), value_of(threshold), settings, bits, u.device,
        (u.shape, u.stride()) if each else None,
    )  # fmt: skip
    constants = constants_of(neuron, name, versions, _constants, neuron, name, settings, parameters, u)
    return step(constants, current, u, parameters, trusted)


def _constants(
    neuron: Any,
    name: str,
    settings: tuple[str, Surrogate | None],
    parameters: tuple[Tensor, Tensor],
    example: Tensor,
) -> Leaky:
    reset, surrogate = settings
    fire = None if surrogate is None else neuron.spike_grad
    whose = f"{switches.name_of(neuron)}.{name}"
    return leaky(whose, switches.bits_of(neuron), parameters, reset, surrogate, fire, example)


def _circuit(neuron: Any) -> tuple[Tensor, Tensor]:
    """The decay and the input's factor of an RC circuit; one object as long as its constants stay."""
    given = (neuron.R, neuron.C, neuron.time_step)
    versions = tuple(value_of(value) if isinstance(value, Tensor) else value for value in given)
    beta, gain, _ = constants_of(neuron, "circuit", versions, _circuit_of, given)
    return beta, gain


def _circuit_of(given: tuple[Any, ...]) -> tuple[Tensor, Tensor, Any]:
    r, c, dt = given
    with torch.no_grad():
        return torch.as_tensor(1 - dt / (r * c)), r * (1 / (r * c)) * dt, given
