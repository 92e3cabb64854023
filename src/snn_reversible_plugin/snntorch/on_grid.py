"""snnTorch neurons that run on the dyadic grid, reversible in time.

The one idea: each state of a neuron is a timeline of its own; a synaptic current is one that never fires or
resets. Around their steps this does what stock's ``forward`` does with states, given or hidden.

Source: the ``forward`` methods in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid.decays import AFTER, BEFORE, NONE, SUBTRACT
from snn_reversible_plugin.neurons.leaky.reference import AlphaCharge
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.alpha import membrane
from snn_reversible_plugin.neurons.on_grid.leaky import FireAndReset, Fired, Leaky, leaky
from snn_reversible_plugin.neurons.on_grid.neuron import (
    OffGrid,
    OnGrid,
    check_dtypes,
    constants_of,
    value_of,
)
from snn_reversible_plugin.neurons.on_grid.resets import ResetByGiven, Undelayed
from snn_reversible_plugin.neurons.on_grid.step import Parameters, Stepped, step
from snn_reversible_plugin.neurons.surrogates import of_users
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import NO_DISPATCH
from snn_reversible_plugin.snntorch import neurons
from snn_reversible_plugin.snntorch.last_reset import LastReset, leave_less
from snn_reversible_plugin.snntorch.steps import (
    Spec,
    fires_its_own_way,
    is_ungraded,
    mechanism_of,
)
from snn_reversible_plugin.snntorch.surrogates import known_surrogate
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
    return found if isinstance(found, str) else switches.why_too_coarse(neuron, neuron.threshold)


class Settings(NamedTuple):
    """What a step on the grid has to know of a neuron, next to its parameters.

    Attributes:
        how: its membrane fires and resets.
        given: its currents are reset by the membrane's spikes.
    """

    how: FireAndReset
    given: bool


def _settings(neuron: Any, spec: Spec) -> str | Settings:
    """What a step on the grid has to know of it, or why there is none."""
    reset = mechanism_of(neuron, spec)
    if reset is None:
        return _why_unknown(neuron, spec)
    if spec is neurons.LAPICQUE and neuron.C.requires_grad:
        return "its constants are learned"
    if fires_its_own_way(neuron):
        return "its fire or mem_reset is not the stock class's"
    surrogate = known_surrogate(neuron.spike_grad) or of_users(neuron.spike_grad)
    if isinstance(surrogate, str):
        return surrogate
    if neuron.threshold.dtype is torch.float64:
        return "it is float64"
    undelayed = spec.undelayed and not neuron.reset_delay
    if undelayed and (reason := _why_not_at_once(neuron, reset)):
        return reason
    kind = Undelayed if undelayed and reset != NONE else Leaky
    how = FireAndReset(kind, reset, surrogate, neuron.spike_grad)
    return Settings(how, spec is neurons.ALPHA and reset == AFTER)


def _why_not_at_once(neuron: Any, reset: str) -> str:
    if neuron.inhibition:
        return "its neighbours take part in its reset, which has no delay"
    at_once = neuron.reset_mechanism_val
    if not may_look(at_once.device):
        return "its reset without delay waits for the device, which says which it is"
    of_kind = {SUBTRACT: 0, BEFORE: 1, AFTER: 1, NONE: 2}[reset]
    return "" if value_of(at_once) == of_kind else "its two resets are of two kinds"


def _why_unknown(neuron: Any, spec: Spec) -> str:
    if neuron.state_quant:
        return "its states are quantized"
    if spec.constant and any(getattr(neuron, name).requires_grad for name in spec.parameters):
        return "its constants are learned"
    if spec.always_delayed and not neuron.reset_delay:
        return "its reset has no delay"
    if getattr(neuron.state_function, "__name__", "") not in spec.resets:
        return "its reset is not written for the grid"
    return "its charge or its states are not those of the stock class"


_NEVER = FireAndReset(Leaky, NONE, None, None)
_BY_GIVEN = FireAndReset(ResetByGiven, AFTER, None, None)


class NeuronOnGrid(OnGrid, LastReset):
    """In front of a neuron of the leaky family: its steps are reversible in time."""

    def grid_settings(self: Any) -> Any:
        """How it fires and resets."""
        spec = spec_of(self)
        return "its equations are not written for the grid" if spec is None else _settings(self, spec)

    def fix_grid(self: Any) -> None:
        """By its threshold; decays are those of its states."""
        spec = spec_of(self)
        if spec is neurons.LAPICQUE:
            decays = {"mem": _circuit_of((self.R, self.C, self.time_step))[0]}
        elif spec is neurons.ALPHA:
            decays = {"syn_exc": self.alpha, "syn_inh": self.beta}
        else:
            decays = {"mem": self.beta} | ({"syn": self.alpha} if hasattr(self, "syn") else {})
        switches.fix(self, (self.threshold,), decays)

    def states_on_grid(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Those that are passed, and those that the neuron holds."""
        spec = spec_of(self)
        names = () if spec is None else spec.states
        return (*args[1:], *kwargs.values(), *(getattr(self, name) for name in names))

    def step_on_grid(self: Any, settings: Settings, input_: Tensor, *given: Any, **named: Any) -> Any:
        """One step of all states."""
        spec = spec_of(self)
        assert spec is not None
        states = _before(self, spec, input_, _given(self, spec, given, named))
        _check_dtypes(spec, settings, input_, states)
        current = input_ + self.recurrent(states["spk"]) if spec.recurrent else input_
        if spec is neurons.ALPHA:
            found, spikes, fired = _alpha(self, settings, current, states)
        else:
            found, spikes, fired = _leaky(self, spec, settings, current, states)
        if self.inhibition:
            spikes = spikes * _winners(self, found[-1])
        elif not is_ungraded(self):
            spikes = spikes * self.graded_spikes_factor
        _keep(self, spec, found, fired)
        if spec.recurrent:
            self.spk = spikes
        return (spikes, *found) if self.output or not self.init_hidden else spikes


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
    return states


def _check_dtypes(spec: Spec, settings: Settings, input_: Tensor, states: dict[str, Tensor]) -> None:
    """Refuse what stock would make states of that are not float32.

    Where the membrane is reset by an operation with its spikes, which are float32 in any network, so is the
    membrane, whatever it was; an operation in place leaves it its dtype.
    """
    for tensor in (input_, *states.values()):  # at each step: without a generator's calls
        if tensor.dtype is not torch.float32 or type(tensor).__torch_dispatch__ is not NO_DISPATCH:
            break
    else:
        return
    check_dtypes(input_, *states.values())
    reset = settings.how.reset
    promoted = reset != NONE and not (reset == AFTER and "syn" in states)
    for name, state in states.items():
        computed = name == "spk" or (name == "mem" and (promoted or spec is neurons.ALPHA))
        if not computed and torch.result_type(input_, state) is not torch.float32:
            raise OffGrid(f"Its {name} would be {torch.result_type(input_, state)}, as stock's is.")


def _keep(neuron: Any, spec: Spec, states: list[Tensor], fired: Any) -> None:
    """Leave on the neuron what stock leaves there: its states, and the spikes that were reset."""
    if isinstance(fired, Fired):
        leave_less(neuron, fired)
    else:
        neuron.reset = fired
    for name, state in zip(spec.states[-len(states) :], states, strict=True):
        if name in neuron._buffers:  # what setattr comes to, at a tenth of its time
            neuron._buffers[name] = state
        else:
            setattr(neuron, name, state)


def _leaky(
    neuron: Any, spec: Spec, settings: Settings, current: Tensor, states: dict[str, Tensor]
) -> tuple[list[Tensor], Tensor, Any]:
    """The states after a step, its spikes, and those of the membrane before."""
    beta = None if spec is neurons.LAPICQUE else neuron.beta
    if beta is None:
        beta, gain = _circuit(neuron)
        current = current * gain
    found, synaptic = [], None
    if "syn" in states:
        # Held, the step whole with its timeline, until the membrane's step refers to it.
        synaptic = _integrate(neuron, "syn", _NEVER, current, states["syn"], (neuron.alpha,))
        current = synaptic.state
        found.append(current)
    # A current of that kind rests on a timeline that never asks for a membrane.
    mem, spikes, fired, _ = _integrate(
        neuron, "mem", settings.how, current, states["mem"], (beta,), trusted=synaptic is not None
    )
    assert spikes is not None
    return [*found, mem], spikes, fired


def _alpha(
    neuron: Any, settings: Settings, current: Tensor, states: dict[str, Tensor]
) -> tuple[list[Tensor], Tensor, Any]:
    """The same of an alpha neuron: its membrane is no state of its own, its spikes reset both currents."""
    surrogate, threshold, alpha, beta = settings.how.surrogate, neuron.threshold, neuron.alpha, neuron.beta
    assert surrogate is not None
    with torch.no_grad(), tape.paused():
        fired = surrogate.fired(states["mem"] - threshold).float()
    tape.mark_spikes(fired)
    how, given = (_BY_GIVEN, (fired,)) if settings.given else (_NEVER, ())
    exc = _integrate(neuron, "syn_exc", how, current, states["syn_exc"], (alpha, *given))
    inh = _integrate(neuron, "syn_inh", how, -current, states["syn_inh"], (beta, *given))
    tau, _ = constants_of(neuron, "tau", (value_of(alpha), value_of(beta)), _tau_of, alpha, beta)
    mem, spikes = membrane(tau, exc, inh, surrogate, neuron.spike_grad, threshold)
    return [exc.state, inh.state, mem], spikes, fired


def _tau_of(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Any]:
    with torch.no_grad(), tape.paused():
        return AlphaCharge.tau(alpha, beta), (alpha, beta)


def _winners(neuron: Any, mem: Tensor) -> Tensor:
    """1 for the largest membrane of each sample, as stock's ``fire_inhibition`` finds it."""
    with torch.no_grad(), tape.paused():
        above = mem - neuron.threshold
        winners = torch.zeros_like(above)
        winners[torch.arange(mem.size(0), device=mem.device), torch.argmax(above, dim=1)] = 1
    tape.mark_spikes(winners)
    return winners


def _integrate(
    neuron: Any,
    name: str,
    how: FireAndReset,
    current: Tensor,
    u: Tensor,
    parameters: Parameters,
    trusted: bool = False,
) -> Stepped:
    """A step of one of its states; ``parameters``: its decay, and the spikes that reset it if any."""
    beta, threshold, bits = parameters[0], neuron.threshold, switches.bits_of(neuron)
    each = bool(beta.numel() > 1 or threshold.numel() > 1)
    versions = (
        value_of(beta), value_of(threshold), how, bits, u.device, (u.shape, u.stride()) if each else None,
    )  # fmt: skip
    constants = constants_of(neuron, name, versions, _constants, neuron, name, how, (beta, threshold), u)
    # In half precision the gradients of the charge and of the spikes are rounded once, as their sum.
    return step(constants, current, u, (beta, threshold.float(), *parameters[1:]), trusted=trusted)


def _constants(
    neuron: Any, name: str, how: FireAndReset, parameters: tuple[Tensor, Tensor], example: Tensor
) -> Leaky:
    whose = f"{switches.name_of(neuron)}.{name}"
    smallest = switches.smallest_decay(neuron, name)
    return leaky(how, whose, switches.bits_of(neuron), parameters, example, smallest)


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
