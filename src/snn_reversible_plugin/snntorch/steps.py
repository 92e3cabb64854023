"""The analytic step: what a stock neuron does around its equations, and the two functions in place of them.

The one idea: around the step this does what stock's ``forward`` does (states given or hidden, zeros where
the shape changed, the attributes that users read), and it decides, on every call, whether the two
functions of ``step.py`` are stock's arithmetic to the bit. Where they aren't, stock's own step runs, and
only its states are anchored: what autograd saves within one step is then replayed from the states
before it, and never through an earlier step.

Source: the ``forward`` methods in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import snntorch
import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid.decays import AFTER, NONE, SUBTRACT
from snn_reversible_plugin.neurons.leaky.call import Before, Charging, Firing, Kind, fired, kind_of
from snn_reversible_plugin.neurons.leaky.call import charged as charged_values
from snn_reversible_plugin.neurons.leaky.reference import (
    Charge,
    LapicqueCharge,
    LeakyCharge,
    SynapticCharge,
)
from snn_reversible_plugin.neurons.on_grid.neuron import value_of
from snn_reversible_plugin.neurons.stretch import Values, place_of_step, way_to
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.outputs import on_its_own
from snn_reversible_plugin.snntorch.last_reset import leave_reset
from snn_reversible_plugin.snntorch.surrogates import known_surrogate

_PLAIN = (Tensor, nn.Parameter)

# NOTE [Where the analytic step is stock's arithmetic]
#
# 1. Charging is analytic whatever the neuron fires on. Firing is, where the surrogate is one of
#    snnTorch's without randomness; any other callable may fire on anything and may close over parameters,
#    so it runs as ordinary operations, on the tape if there is one. So do graded spikes, inhibition
#    and the reset without delay.
# 2. States have one dtype, float32 or float64, that neither the current nor a parameter would promote.
#    A bfloat16 state becomes float32 at its first reset: that step is stock's, the later ones are not.
# 3. Nobody overrode the charge, in a subclass or on the instance. It is the one that `state_function`
#    names, which setting `reset_mechanism` does not change in snnTorch; the reset without delay is the
#    one that `reset_mechanism_val` names, which it does change.
# 4. Parameters that stand in the charge as more than a factor of a state are constants, and nothing
#    (`state_quant`) comes between charge and fire.
# 5. No tensor plays two roles around a recurrent layer: the layer's gradient would reach it after the
#    charge's, and in stock's graph it arrives before.


class Spec(NamedTuple):
    """A neuron type: what its charge is made of, and which reset each charge method stands for.

    ``states`` are in the order of the arguments of ``forward``; ``constant``: the ``parameters`` may not
    be learned; ``arrange`` puts currents, states and parameters in the charge's order. ``undelayed``: it
    has a ``reset_delay`` to turn off; ``always_delayed``: it has one that must be on; ``on_grid_only``:
    resets under which the gradients of stock's graph add up in an order that two functions can't give.
    """

    stock_type: type[nn.Module]
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    charge: type[Charge]
    arrange: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]
    resets: dict[str, str]
    constant: bool = False
    undelayed: bool = False
    always_delayed: bool = False
    recurrent: bool = False
    on_grid_only: tuple[str, ...] = ()


def analytic(neuron: Any, spec: Spec, current: Tensor, given: tuple[Tensor | None, ...]) -> Any:
    """Run one analytic step and return what stock's ``forward`` would; None where stock has to run."""
    mechanism = mechanism_of(neuron, spec) if tape.may_record() else None
    if mechanism in spec.on_grid_only:
        return None
    states = None if mechanism is None else states_before(neuron, spec, current, given)
    if mechanism is None or states is None:
        return None
    mem, threshold = states[-1], neuron.threshold
    parameters = [getattr(neuron, name) for name in spec.parameters]
    if not all(_fits(parameter, mem) for parameter in (threshold, *parameters)):
        return None
    surrogate = surrogate_of(neuron)
    delayed = not spec.undelayed or neuron.reset_delay
    reset = None
    if surrogate is None:
        _set_states(neuron, spec.states, states)  # methods of the user's own may look
        reset = neuron.mem_reset(mem)
        if reset.dtype is not torch.float32 or reset.shape != mem.shape or reset.requires_grad:
            return None
    currents = again = [current]
    if spec.recurrent:
        roles = {id(tensor) for tensor in (current, *states)}
        if len(roles) <= len(states) or not _fits_recurrent(neuron.recurrent, mem):
            return None
        currents = [neuron.recurrent(states[0]), current]
        if mechanism == AFTER:
            again = [neuron.recurrent(states[0]), current]

    spikes = None
    recomputes = surrogate is not None and delayed
    with tape.paused():
        place = None
        if recomputes and not neuron.inhibition and currents is again:
            held = states[spec.recurrent :]
            advance = _Advance(spec, mechanism, mem.dtype)
            fresh = all(_is_fresh(state, current) for state in held)
            place = place_of_step(advance, None if fresh else held, currents, [*parameters, threshold])
        if reset is None:
            with torch.no_grad():
                reset = fired(mem, threshold)
            if not delayed:
                tape.mark_spikes(reset)
        before = Before(mem, reset, way_to)
        streams = _Streams(currents, again, states, parameters)
        kind = kind_of(spec.charge, mechanism, recomputes)
        charged = _charged(_applied, spec, kind, before, threshold, streams)
        saved: list[Tensor] = [charged[-1]]
        if place is None:
            tape.mark_opaque(*charged)
        else:
            place.left(*charged, charged=True)
            saved = [way_to(charged[-1]), place.alive(mem)] if place.is_anchor else [way_to(charged[-1])]
        if surrogate is not None and not neuron.inhibition:
            spikes = Firing.apply(surrogate, charged[-1], threshold, saved)
            tape.mark_spikes(spikes)
        ungraded = is_ungraded(neuron)
    if (
        (place is None or place.is_anchor)
        and mechanism in (NONE, SUBTRACT)
        and not any(one.requires_grad for one in (threshold, *parameters))
    ):
        tape.returns(neuron, charged[-1])  # no charge keeps it, so a copy for the spikes costs nothing
    leave_reset(neuron, reset, place is not None)
    _set_states(neuron, spec.states[-len(charged) :], charged)
    if neuron.inhibition:
        spikes = neuron.fire_inhibition(mem.size(0), charged[-1])
    elif spikes is None:
        spikes = neuron.fire(charged[-1])
    elif not ungraded:
        spikes = spikes * neuron.graded_spikes_factor
    if spec.recurrent:
        neuron.spk = spikes
    if not delayed:
        neuron.mem = charged[-1] = _reset_now(neuron, spikes, charged[-1])
        tape.mark_state(neuron, neuron.mem)
    return (spikes, *charged) if neuron.output or not neuron.init_hidden else spikes


def _set_states(neuron: Any, names: tuple[str, ...], states: list[Tensor]) -> None:
    for name, state in zip(names, states, strict=True):
        setattr(neuron, name, state)


_SYN = kind_of(LeakyCharge, NONE, True)


class _Streams(NamedTuple):
    """What a step charges with; ``again``: the currents of a second charge, where a reset makes one."""

    currents: list[Tensor]
    again: list[Tensor]
    states: list[Tensor]
    parameters: list[Tensor]


def _charged(
    run: Callable[..., list[Tensor]],
    spec: Spec,
    kind: Kind,
    before: Before,
    threshold: Tensor,
    streams: _Streams,
) -> list[Tensor]:
    """The states after the charge and the reset; ``run(kind, before, threshold, *x)`` is a charge."""
    currents, again, states, parameters = streams
    if kind.charge is SynapticCharge and kind.reset != AFTER:
        alpha, beta = parameters
        leaky = kind_of(LeakyCharge, kind.reset, kind.recompute)
        (syn,) = run(_SYN, before, threshold, *currents, states[-2], alpha)
        return [syn, *run(leaky, before, threshold, syn, states[-1], beta)]
    x = spec.arrange(currents, states, parameters)
    if kind.reset == AFTER:
        x = spec.arrange(again, states, parameters) + x
    return run(kind, before, threshold, *x)


def _applied(kind: Kind, before: Before, threshold: Tensor, *x: Tensor) -> list[Tensor]:
    result = Charging.apply(kind, before, threshold, *x)
    return [result] if isinstance(result, Tensor) else [on_its_own(state) for state in result]


def _in_values(kind: Kind, before: Before, threshold: Tensor, *x: Tensor) -> list[Tensor]:
    return charged_values(kind, before, threshold, x)


class _Advance(NamedTuple):
    """A step of a stretch; ``dtype``: of the states."""

    spec: Spec
    mechanism: str
    dtype: torch.dtype

    def charge(self, left: Values | None, currents: list[Tensor], others: list[Tensor]) -> Values:
        *parameters, threshold = others
        if left is None:
            zeros = torch.zeros_like(currents[-1], dtype=self.dtype)
            left = (zeros,) * (len(self.spec.states) - self.spec.recurrent)
        before = Before(left[-1], fired(left[-1], threshold), _as_it_is)
        streams = _Streams(currents, currents, list(left), parameters)
        kind = kind_of(self.spec.charge, self.mechanism, True)
        return tuple(_charged(_in_values, self.spec, kind, before, threshold, streams))

    def leave(self, values: Values, others: list[Tensor]) -> Values:
        return values


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _is_fresh(state: Tensor, current: Tensor) -> bool:
    """Whether a state is the zeros that a fresh neuron starts from, as far as a look costs nothing."""
    if state.requires_grad or not may_look(state.device) or state.stride() != current.stride():
        return False
    bits = torch.int32 if state.dtype is torch.float32 else torch.int64
    return not bool(state.detach().view(bits).any())


def mechanism_of(neuron: Any, spec: Spec) -> str | None:
    """The reset of a neuron whose charge, as it is set now, the analytic step covers; else None."""
    charge = neuron.state_function
    name = getattr(charge, "__name__", "")
    owner: Any = getattr(charge, "__self__", None)
    if (
        neuron.state_quant
        or name not in spec.resets
        or owner is not neuron
        or charge.__func__ is not getattr(spec.stock_type, name)
        or "_base_state_function" in neuron.__dict__
        or not _inherits(type(neuron), spec.stock_type, "_base_state_function")
        or (spec.constant and any(getattr(neuron, p).requires_grad for p in spec.parameters))
        or (spec.always_delayed and not neuron.reset_delay)
    ):
        return None
    return spec.resets[name]


def _compare(cls: type, stock_type: type, *names: str) -> bool:
    return all(getattr(cls, name) is getattr(stock_type, name) for name in names)


_inherits: Callable[..., bool] = functools.cache(_compare)


def states_before(
    neuron: Any, spec: Spec, current: Tensor, given: tuple[Tensor | None, ...]
) -> list[Tensor] | None:
    """The states that stock would start from; None where they would change their dtype."""
    if type(current) not in _PLAIN or not current.dim():
        return None
    states = []
    for name, state in zip(spec.states, given, strict=True):
        if state is None:
            state = getattr(neuron, name)
        elif neuron.init_hidden:
            return None
        if type(state) not in _PLAIN:
            return None
        if state.shape != current.shape:
            state = torch.zeros_like(current, device=state.device)
        states.append(state)
    dtype = states[-1].dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return None
    if current.dtype is not dtype and (
        spec.charge is LapicqueCharge or torch.promote_types(current.dtype, dtype) is not dtype
    ):
        return None
    # Spikes are float32 in any network.
    of_dtype = states[1:] if spec.recurrent else states
    return states if all(state.dtype is dtype for state in of_dtype) else None


def _fits(parameter: Tensor, state: Tensor) -> bool:
    """Whether an operation with a parameter leaves a state its dtype and shape."""
    if not parameter.dim():
        return not parameter.is_complex()
    shape, dtype = state.shape, state.dtype
    return (
        (parameter.dtype is dtype or torch.promote_types(parameter.dtype, dtype) is dtype)
        and parameter.dim() <= len(shape)
        and all(
            size in (1, whole)
            for size, whole in zip(reversed(parameter.shape), reversed(shape), strict=False)
        )
    )


def _fits_recurrent(layer: Any, state: Tensor) -> bool:
    """Whether the recurrent current has the state's shape."""
    if isinstance(layer, nn.Conv2d):
        return all(size % 2 for size in layer.kernel_size)
    one_to_one = type(layer).__name__ == "RecurrentOneToOne"
    return isinstance(layer, nn.Linear) or (one_to_one and _fits(layer.V, state))


def surrogate_of(neuron: nn.Module) -> Surrogate | None:
    """Its surrogate; None where firing has to be left to the neuron's own methods."""
    return None if fires_its_own_way(neuron) else known_surrogate(neuron.spike_grad)


def fires_its_own_way(neuron: nn.Module) -> bool:
    """Whether its methods that fire are not stock's."""
    overridden = "fire" in neuron.__dict__ or "mem_reset" in neuron.__dict__
    return overridden or not _inherits(type(neuron), snntorch.SpikingNeuron, "fire", "mem_reset")


def is_ungraded(neuron: Any) -> bool:
    """Whether the factor of a neuron's spikes is known to be 1, without waiting for a device."""
    factor: Tensor = neuron.graded_spikes_factor
    constant = may_look(factor.device) and not factor.requires_grad and not factor.dim()
    return constant and value_of(factor) == 1


def _reset_now(neuron: Any, spikes: Tensor, mem: Tensor) -> Tensor:
    """The reset without delay, of the spikes that the reset with delay did not cover."""
    remaining = spikes / neuron.graded_spikes_factor - neuron.reset
    if neuron.reset_mechanism_val == 0:
        return mem - remaining * neuron.threshold
    if neuron.reset_mechanism_val == 1:
        return mem - remaining * mem
    return mem


def anchored(neuron: nn.Module, spec: Spec, result: Any) -> Any:
    """After a stock step: what later steps save is replayed from these states, not through them."""
    if tape.current() is not None:
        tape.mark_opaque(*(getattr(neuron, name) for name in spec.states if name != "spk"))
    return result
