"""Leaky, Lapicque, Synaptic, Alpha and their recurrent siblings, each with a step that holds little.

The one idea: a reversible neuron does what its stock class does around the step (states given or
hidden, zeros where the shape changed, the attributes that users read), and runs the step itself as
:class:`~snn_reversible_plugin.snntorch.step.Step` wherever that is stock's arithmetic to the bit.
Everywhere else stock's own step runs, and only the states are anchored: what autograd saves within one
step is then replayed from the states before it, and never from an earlier step.

Source: the classes of the same names in ``snntorch/_neurons``, version 1.0 (Eshraghian et al.,
Proceedings of the IEEE 111, 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import snntorch
import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.snntorch.charges import (
    AlphaCharge,
    Charge,
    LapicqueCharge,
    LeakyCharge,
    SynapticCharge,
)
from snn_reversible_plugin.snntorch.step import (
    AFTER,
    BEFORE,
    NONE,
    SUBTRACT,
    Charging,
    Firing,
    Plan,
    fired,
)
from snn_reversible_plugin.snntorch.surrogates import Derivative, derivative_of

_PLAIN = (Tensor, nn.Parameter)

# NOTE [Where the analytic step is stock's arithmetic]
#
# 1. The surrogate is one of snnTorch's, without randomness: a user's callable may fire on anything, and
#    may close over parameters, whose gradients nobody outside of autograd could see.
# 2. Nothing else stands between charge and spike: no `state_quant`, no inhibition. Graded spikes are an
#    ordinary multiplication after the step.
# 3. States have one dtype, float32 or float64, that neither the current nor a parameter would promote.
#    A bfloat16 state becomes float32 at its first reset: that step is stock's, the later ones are not.
# 4. Nobody overrode the methods whose work the step does, in a subclass or on the instance. The charge
#    is the one that `state_function` names, which `reset_mechanism = ...` does not change in snnTorch;
#    the undelayed reset is the one that `reset_mechanism_val` names, which it does change.
# 5. Parameters that stand in the charge as more than a factor of a state are constants.

_OVERRIDES = ("fire", "mem_reset", "_base_state_function")
_UNDELAYED = {0: SUBTRACT, 1: BEFORE, 2: NONE}


class Spec(NamedTuple):
    """A neuron type: what its charge is made of, and which reset each charge method stands for.

    ``states`` are in the order of the arguments of ``forward``; ``constant``: the ``parameters`` may not
    be learned; ``arrange`` puts currents, states and parameters in the charge's order.
    """

    stock_type: type[nn.Module]
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    charge: type[Charge]
    arrange: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]
    resets: dict[str, str]
    constant: bool = False
    undelayed: bool = False
    recurrent: bool = False


def _leaky(currents: list[Tensor], states: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    return [*currents, states[-1], *parameters]


def _lapicque(currents: list[Tensor], states: list[Tensor], rc: list[Tensor]) -> list[Tensor]:
    return [*states, *currents, *rc]


def _synaptic(currents: list[Tensor], states: list[Tensor], decays: list[Tensor]) -> list[Tensor]:
    (syn, mem), (alpha, beta) = states[-2:], decays
    return [mem, beta, *currents, syn, alpha]


def _alpha(currents: list[Tensor], states: list[Tensor], decays: list[Tensor]) -> list[Tensor]:
    (current,), (exc, inh, _) = currents, states
    return [current, inh, current, exc, *decays]


_RESETS = {"_base_sub": SUBTRACT, "_base_zero": AFTER, "_base_int": NONE}

LEAKY = Spec(
    snntorch.Leaky,
    ("mem",),
    ("beta",),
    LeakyCharge,
    _leaky,
    _RESETS | {"_base_zero": BEFORE},
    undelayed=True,
)
LAPICQUE = Spec(
    snntorch.Lapicque,
    ("mem",),
    ("R", "C", "time_step"),
    LapicqueCharge,
    _lapicque,
    _RESETS,
    constant=True,
)
SYNAPTIC = Spec(
    snntorch.Synaptic,
    ("syn", "mem"),
    ("alpha", "beta"),
    SynapticCharge,
    _synaptic,
    _RESETS,
    undelayed=True,
)
ALPHA = Spec(
    snntorch.Alpha,
    ("syn_exc", "syn_inh", "mem"),
    ("alpha", "beta"),
    AlphaCharge,
    _alpha,
    {"_base_zero": AFTER},
    constant=True,
)
RLEAKY = LEAKY._replace(
    stock_type=snntorch.RLeaky, states=("spk", "mem"), resets=_RESETS, recurrent=True
)
# Its undelayed reset changes nothing that it returns, and fails where no spikes are passed.
RSYNAPTIC = SYNAPTIC._replace(
    stock_type=snntorch.RSynaptic, states=("spk", "syn", "mem"), undelayed=False, recurrent=True
)


def analytic(neuron: Any, spec: Spec, current: Tensor, given: tuple[Tensor | None, ...]) -> Any:
    """Run one analytic step and return what stock's ``forward`` would; None where stock has to run."""
    mechanism = mechanism_of(neuron, spec) if tape.may_record() else None
    states = None if mechanism is None else _states(neuron, spec, current, given)
    if mechanism is None or states is None:
        return None
    mem, threshold = states[-1], neuron.threshold
    parameters = [getattr(neuron, name) for name in spec.parameters]
    if not all(_fits(parameter, mem) for parameter in (threshold, *parameters)):
        return None
    derivative = _derivative(neuron)
    delayed = not spec.undelayed or neuron.reset_delay
    reset = _reset(neuron, mem, derivative, delayed)
    if reset.dtype is not torch.float32 or reset.shape != mem.shape:
        return None
    currents = again = [current]
    if spec.recurrent:
        # A tensor in two roles would get the recurrent layer's gradient after the charge's.
        roles = {id(tensor) for tensor in (current, *states)}
        if len(roles) <= len(states) or not _fits_recurrent(neuron.recurrent, mem):
            return None
        currents = [neuron.recurrent(states[0]), current]
        if mechanism == AFTER:
            again = [neuron.recurrent(states[0]), current]
    neuron.reset = reset

    plan = Plan(spec.charge, mechanism, derivative is not None and delayed)
    if spec.charge is SynapticCharge and mechanism != AFTER:
        alpha, beta = parameters
        leaky = plan._replace(charge=LeakyCharge)
        syn = Charging.apply(_SYN, [mem, reset], threshold, *currents, states[-2], alpha)
        states = [syn, Charging.apply(leaky, [mem, reset], threshold, syn, mem, beta)]
    else:
        x = spec.arrange(currents, states, parameters)
        if mechanism == AFTER:
            x = spec.arrange(again, states, parameters) + x
        charged = Charging.apply(plan, [mem, reset], threshold, *x)
        states = [charged] if isinstance(charged, Tensor) else list(charged)
    tape.mark_opaque(*states)
    spikes = _fire(neuron, states[-1], derivative)
    if not delayed:
        states[-1] = _reset_now(neuron, spikes, states[-1])
    results = (spikes, *states)
    for name, state in zip(spec.states, results if spec.recurrent else states, strict=True):
        setattr(neuron, name, state)
    return results if neuron.output or not neuron.init_hidden else spikes


_SYN = Plan(LeakyCharge, NONE)


def mechanism_of(neuron: Any, spec: Spec) -> str | None:
    """The reset of a neuron whose charge, as it is set now, the analytic step covers; else None."""
    charge = neuron.state_function
    name = getattr(charge, "__name__", "")
    if (
        neuron.state_quant
        or name not in spec.resets
        or getattr(charge, "__self__", None) is not neuron
        or charge.__func__ is not getattr(spec.stock_type, name)
        or "_base_state_function" in neuron.__dict__
        or not _inherits(type(neuron), spec.stock_type, "_base_state_function")
        or (spec.constant and any(getattr(neuron, p).requires_grad for p in spec.parameters))
        or (spec is RSYNAPTIC and not neuron.reset_delay)
    ):
        return None
    return spec.resets[name]


@functools.cache
def _inherits(cls: type, stock_type: type, *names: str) -> bool:
    return all(getattr(cls, name) is getattr(stock_type, name) for name in names)


def _states(
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


def _fits_recurrent(layer: nn.Module, state: Tensor) -> bool:
    """Whether the recurrent current has the state's shape."""
    if isinstance(layer, nn.Conv2d):
        return all(size % 2 for size in layer.kernel_size)
    one_to_one = type(layer).__name__ == "RecurrentOneToOne"
    return isinstance(layer, nn.Linear) or (one_to_one and _fits(layer.V, state))


def _derivative(neuron: nn.Module) -> Derivative | None:
    """The surrogate's derivative; None where firing has to be left to the neuron's own methods."""
    overridden = "fire" in neuron.__dict__ or "mem_reset" in neuron.__dict__
    if overridden or not _inherits(type(neuron), snntorch.SpikingNeuron, "fire", "mem_reset"):
        return None
    return derivative_of(neuron.spike_grad)


def _reset(neuron: Any, mem: Tensor, derivative: Derivative | None, delayed: bool) -> Tensor:
    """The spikes of the membrane that the step starts from."""
    if derivative is None:
        return neuron.mem_reset(mem)
    with tape.paused(), torch.no_grad():
        reset = fired(mem, neuron.threshold)
    if not delayed:
        tape.mark_spikes(reset)
    return reset


def _fire(neuron: Any, mem: Tensor, derivative: Derivative | None) -> Tensor:
    if neuron.inhibition:
        return neuron.fire_inhibition(mem.size(0), mem)
    if derivative is None:
        return neuron.fire(mem)
    spikes = Firing.apply(derivative, mem, neuron.threshold)
    tape.mark_spikes(spikes)
    factor = neuron.graded_spikes_factor
    # Reading the factor off another device would wait for it; there, the product stays an operation.
    readable = factor.device.type == "cpu" and not factor.dim() and not factor.requires_grad
    return spikes if readable and factor.item() == 1 else spikes * factor


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


class RevLeaky(snntorch.Leaky):
    """snnTorch's ``Leaky`` that holds its membrane and nothing else.

    ``mem[t] = clamp(beta, 0, 1) * mem[t-1] + input_[t] - spk[t-1] * threshold``, with the other reset
    mechanisms, learned parameters and surrogates of the stock class; same signature, attributes and
    ``state_dict``, outputs and gradients bit for bit. Of each step it holds 4 bytes a neuron (float32)
    for the backward, where stock holds 8 to 16; on a converted model the next layer keeps the spikes as
    one bit.

    Args:
        beta: decay of the membrane, clipped to [0, 1]; a number, or a tensor that broadcasts to ``input_``.
        **kwargs: as ``snntorch.Leaky``, with its defaults.

    Shapes: ``input_`` and ``mem`` [N, ...]; ``forward`` returns ``(spk, mem)`` of that shape, or ``spk``
    alone with ``init_hidden=True`` and ``output=False``.

    Raises:
        TypeError: ``mem`` is passed while ``init_hidden=True``, as stock does.
        RuntimeError: a double backward, or ``mem`` or a parameter was changed in place before the backward.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevLeaky
        >>> lif = RevLeaky(beta=0.9)
        >>> spk, mem = lif(torch.full((2, 3), 1.5), lif.reset_mem())
        >>> spk.sum().item()
        6.0
    """

    treatment = "analytic step"
    arithmetic = "stock"

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step."""
        result = analytic(self, LEAKY, input_, (mem,))
        return anchored(self, LEAKY, super().forward(input_, mem)) if result is None else result


class RevLapicque(snntorch.Lapicque):
    """snnTorch's ``Lapicque`` (an RC circuit) that holds its membrane and nothing else.

    ``mem[t] = input_ * R * (1 / RC) * dt + (1 - dt / RC) * mem[t-1]``, and the reset. Signature, shapes,
    errors and guarantee as :class:`RevLeaky`'s, against ``snntorch.Lapicque``.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevLapicque
        >>> lif = RevLapicque(beta=0.5)
        >>> spk, mem = lif(torch.ones(2, 3), lif.reset_mem())
        >>> mem.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """One time step."""
        result = analytic(self, LAPICQUE, input_, (mem,))
        return anchored(self, LAPICQUE, super().forward(input_, mem)) if result is None else result


class RevSynaptic(snntorch.Synaptic):
    """snnTorch's ``Synaptic`` (a decaying input current) that holds its membrane and nothing else.

    ``syn[t] = clamp(alpha, 0, 1) * syn[t-1] + input_``, ``mem[t] = clamp(beta, 0, 1) * mem[t-1] + syn[t]``,
    and the reset; ``syn`` is held too where ``alpha`` is learned. Signature, shapes, errors and guarantee
    as :class:`RevLeaky`'s, against ``snntorch.Synaptic``; returns ``(spk, syn, mem)``.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.snntorch import RevSynaptic
        >>> lif = RevSynaptic(alpha=0.9, beta=0.8)
        >>> spk, syn, mem = lif(torch.ones(2, 3), *lif.reset_mem())
        >>> syn.shape
        torch.Size([2, 3])
    """

    treatment = "analytic step"
    arithmetic = "stock"

    def forward(
        self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None
    ) -> Any:
        """One time step."""
        result = analytic(self, SYNAPTIC, input_, (syn, mem))
        return (
            anchored(self, SYNAPTIC, super().forward(input_, syn, mem)) if result is None else result
        )


class RevAlpha(snntorch.Alpha):
    """snnTorch's ``Alpha`` that holds its membrane; its two currents where ``beta`` is learned."""

    treatment = "analytic step"
    arithmetic = "stock"

    def forward(
        self,
        input_: Tensor,
        syn_exc: Tensor | None = None,
        syn_inh: Tensor | None = None,
        mem: Tensor | None = None,
    ) -> Any:
        """One time step."""
        result = analytic(self, ALPHA, input_, (syn_exc, syn_inh, mem))
        if result is None:
            result = anchored(self, ALPHA, super().forward(input_, syn_exc, syn_inh, mem))
        return result


class RevRLeaky(snntorch.RLeaky):
    """snnTorch's ``RLeaky``: as :class:`RevLeaky`, its recurrent layer an ordinary one, fed with spikes."""

    treatment = "analytic step"
    arithmetic = "stock"

    def forward(
        self, input_: Tensor, spk: Tensor | None = None, mem: Tensor | None = None
    ) -> Any:
        """One time step."""
        result = analytic(self, RLEAKY, input_, (spk, mem))
        return anchored(self, RLEAKY, super().forward(input_, spk, mem)) if result is None else result


class RevRSynaptic(snntorch.RSynaptic):
    """snnTorch's ``RSynaptic``: as :class:`RevSynaptic`, its recurrent layer an ordinary one."""

    treatment = "analytic step"
    arithmetic = "stock"

    def forward(
        self,
        input_: Tensor,
        spk: Tensor | None = None,
        syn: Tensor | None = None,
        mem: Tensor | None = None,
    ) -> Any:
        """One time step."""
        result = analytic(self, RSYNAPTIC, input_, (spk, syn, mem))
        if result is None:
            result = anchored(self, RSYNAPTIC, super().forward(input_, spk, syn, mem))
        return result
