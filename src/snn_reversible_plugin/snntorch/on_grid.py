"""snnTorch neurons that run on the dyadic grid, reversible in time.

The one idea: a mixin in front of a neuron's class whose ``forward`` takes one step on the grid. Each state
of a neuron is a timeline of its own: a synaptic current is one that never fires or resets.

Source: design section 6; the ``forward`` methods in ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import snntorch
import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid.decays import NONE
from snn_reversible_plugin.modules.swap import LAST_RESET, SwappedClass
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.neurons.on_grid.leaky import Fired, plan_of, reference, step
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


class OnGrid(SwappedClass):
    """In front of a neuron of the leaky family: its steps are reversible in time.

    An attribute ``grid_bits`` of the neuron sets the grid's binary digits behind the point, 16 by default.
    """

    @property
    def arithmetic(self) -> str:
        """Which guarantee holds, with the settings of now."""
        spec = spec_of(self)
        return "grid" if spec is not None and why_not(self, spec) is None else "stock"

    @property
    def treatment(self) -> str:
        """What the backward does, for reports."""
        if self.arithmetic == "grid":
            return "reversed in time"
        return getattr(super(), "treatment", "stock step")

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

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """One time step."""
        spec = spec_of(self)
        if spec is not None and tape.runs_eagerly():
            found = _settings(self, spec)
            if not isinstance(found, str):
                return _forward(self, spec, *found, *args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _forward(
    neuron: Any, spec: Spec, reset: str, surrogate: Surrogate, input_: Tensor, *given: Any, **named: Any
) -> Any:
    for name in spec.states[len(given) :]:
        given += (named.pop(name, None),)
    if named or len(given) != len(spec.states):
        raise TypeError(f"{type(neuron).__name__} takes input_ and {', '.join(spec.states)}")
    if neuron.init_hidden and any(state is not None for state in given):
        raise TypeError("states should not be passed as arguments while `init_hidden=True`")
    states = dict(zip(spec.states, _starting(neuron, spec, input_, given), strict=True))
    current = input_ + neuron.recurrent(states["spk"]) if spec.recurrent else input_
    beta = None if spec is neurons.LAPICQUE else neuron.beta
    if beta is None:
        beta, gain = _lapicque(neuron)
        current = current * gain
    found = []
    synaptic = "syn" in spec.states
    if synaptic:
        current, _, _ = _integrate(neuron, "syn", NONE, surrogate, current, states["syn"], neuron.alpha)
        found.append(current)
    mem, spikes, fired = _integrate(
        neuron, "mem", reset, surrogate, current, states["mem"], beta, trusted=synaptic
    )
    if isinstance(fired, Fired):
        LAST_RESET.set(neuron, fired)
        neuron.__dict__.pop("reset", None)
    else:
        neuron.reset = fired
    found.append(mem)
    for name, state in zip(spec.states[-len(found) :], found, strict=True):
        if name in neuron._buffers:  # what setattr comes to, at a tenth of its time
            neuron._buffers[name] = state
        else:
            setattr(neuron, name, state)
    if spec.recurrent:
        neuron.spk = spikes
    return (spikes, *found) if neuron.output or not neuron.init_hidden else spikes


def _starting(neuron: Any, spec: Spec, input_: Tensor, given: tuple[Any, ...]) -> list[Tensor]:
    """The states before the step: passed, or the neuron's own, or zeros where the shape changed."""
    if not input_.is_floating_point() or input_.dtype is torch.float64:
        raise TypeError(
            f"{switches.name_of(neuron)}: a step on the grid takes float32 or half precision, not "
            f'{input_.dtype}; convert with arithmetic="stock" for others'
        )
    states = []
    for name, state in zip(spec.states, given, strict=True):
        state = getattr(neuron, name) if state is None else state
        if state.shape != input_.shape:
            state = torch.zeros_like(input_, dtype=torch.float32)
        states.append(state)
    return states


def _integrate(
    neuron: Any,
    name: str,
    reset: str,
    surrogate: Surrogate,
    current: Tensor,
    u: Tensor,
    beta: Tensor,
    trusted: bool = False,
) -> tuple[Tensor, Any, Any]:
    """One step of one of a neuron's states; the membrane fires."""
    threshold, fires = neuron.threshold, name == "mem"
    if switches.by_autograd():
        spike_grad = neuron.spike_grad if fires else None
        return reference(current, u, beta, threshold, reset, spike_grad, switches.bits_of(neuron))
    plan = plan_of(neuron, name, beta, reset, surrogate, u)
    return step(plan, current, u, beta, threshold, fires=fires, trusted=trusted)


_constants: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _lapicque(neuron: snntorch.Lapicque) -> tuple[Tensor, Tensor]:
    """The decay and the input's factor of an RC circuit; one object as long as its constants stay."""
    given = (neuron.R, neuron.C, neuron.time_step)
    versions = tuple((id(value), getattr(value, "_version", None)) for value in given)
    known = _constants.get(neuron)
    if known is None or known[0] != versions:
        r, c, dt = given
        with torch.no_grad():
            known = _constants[neuron] = versions, torch.as_tensor(1 - dt / (r * c)), r * (1 / (r * c)) * dt
    return known[1], known[2]
