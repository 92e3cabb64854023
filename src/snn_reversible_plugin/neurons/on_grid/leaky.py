"""snnTorch's leaky family on the dyadic grid: equations of one time step, and back.

The one idea: a step is two autograd functions, charge and fire, as off the grid; but what they save is a
place on the neuron's :class:`~.neurons.on_grid.timeline.Timeline`, and no state. A charge resets by the
spikes of the state that it starts from.

Source: ``forward`` of ``snntorch/_neurons``, version 1.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin.grid import decay, snap
from snn_reversible_plugin.grid.decays import AFTER, BEFORE, NONE, SUBTRACT, Step, decay_of
from snn_reversible_plugin.grid.step import Record, as_pieces, steps_on
from snn_reversible_plugin.neurons.leaky.reference import through_clamp
from snn_reversible_plugin.neurons.on_grid.neuron import check_spikes
from snn_reversible_plugin.neurons.on_grid.places import NewBits, NewSpikes
from snn_reversible_plugin.neurons.on_grid.step import Before, Charged, Constants, Parameters, Stepped
from snn_reversible_plugin.neurons.surrogates import Surrogate, in_one_pass
from snn_reversible_plugin.ops.batched import one_by_one
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import flat, like
from snn_reversible_plugin.tape.origins import enter


class Fired(NamedTuple):
    """Spikes as bits."""

    bits: Any
    size: torch.Size
    stride: tuple[int, ...]
    device: torch.device

    def spikes(self) -> Tensor:
        """The spikes themselves."""
        return unpacked(self.bits, torch.empty_strided(self.size, self.stride, device=self.device))


@dataclass(frozen=True, eq=False)
class Leaky(Constants):
    """One leaky state of a neuron, that fires above its threshold or doesn't fire.

    Parameters of its steps: the decay and the threshold.

    Attributes:
        surrogate: None for a state that doesn't fire.
        beta: the decay, clamped.
        theta: the threshold on the grid, as a tensor of the parameter's shape.
        flat_theta: the same as a number, on a device float32 [1], or float32 [n].
    """

    surrogate: Surrogate | None
    beta: Tensor
    theta: Tensor
    flat_theta: Any

    @functools.cached_property
    def charging(self) -> type[Charging]:
        """:class:`Charging` with these constants: an attribute of each node would cost bytes a step."""
        return type("Charging", (Charging,), {"constants": self})

    @functools.cached_property
    def firing(self) -> type[Firing]:
        """:class:`Firing` with these constants."""
        return type("Firing", (Firing,), {"constants": self})

    @functools.cached_property
    def decayed(self) -> float | None:
        """The factor of the state in the charge's gradient, where that is a constant number."""
        factor = self.step.decay.beta
        return factor if isinstance(factor, float) and self.step.reset in (NONE, SUBTRACT) else None

    @staticmethod
    def lowest(theta: Any, example: Tensor) -> Any:
        """The lowest state that a reset may lose, in units of the grid: what is lost is counted from it.

        ``theta``: the threshold in these units.
        """
        return theta

    @functools.cached_property
    def inclusive(self) -> bool:
        """Whether it fires at its threshold too, and not only above."""
        return self.surrogate is not None and not self.surrogate.strict

    def start(self, state: Tensor) -> Any:
        """The spikes of a first state, as bits."""
        if self.fire is None:
            return None
        stride = state.stride()
        return steps_on(state.device).fire(
            flat(state, stride), self.flat_theta, self.inclusive, flat(like(state), stride)
        )

    def charge(self, current: Tensor, before: Before, parameters: Parameters) -> Charged:
        """Charge, and compute the spikes.

        Raises:
            OffGrid: a surrogate of the user's own gave other spikes than the comparison that it is.
        """
        (u, bits, timeline, *_), (beta, threshold) = before, parameters[:2]
        record = None if timeline is None else timeline.record
        spikes = None if self.fire is None else like(u)
        if (
            self.decayed is None
            or beta.requires_grad
            or threshold.requires_grad
            or current.stride() != u.stride()
        ):
            found: list[Any] = []
            sinks = [bits, self.reset_by(before, parameters), record, spikes, found]
            state = self.charging.apply(sinks, u, current, beta, threshold)
            lost, reach, fired = found
        else:
            # NOTE [A sum for its gradient]
            #
            # The gradient of such a charge is that of a sum, whose node saves nothing and is no Python
            # object. So autograd is shown the sum, and what it comes to is overwritten by what the grid
            # makes of it.
            state = torch.add(current, u, alpha=self.decayed)
            lost, reach, fired = self.write(u, current, bits, record, state, spikes)
        if spikes is not None and self.surrogate is not None and self.surrogate.users:
            check_spikes(self.fire, state - self.theta, spikes)
        return Charged(state, spikes, lost, () if fired is None else (fired,), (reach,))

    def resets(self, parameters: Parameters) -> bool:
        """Whether the gradient of a charge asks for the spikes that reset it."""
        kind = self.step.reset
        return kind in (BEFORE, AFTER) or (kind == SUBTRACT and parameters[1].requires_grad)

    def reset_by(self, before: Before, parameters: Parameters) -> Tensor | None:
        """Those spikes, where the gradient asks for them, as bits if the state is contiguous."""
        u, bits, timeline, *_ = before
        if not self.resets(parameters):
            return None
        contiguous = u.is_contiguous()
        reset = torch.as_tensor(bits) if contiguous else unpacked(bits, u)
        if timeline is not None:
            enter(reset, (NewBits if contiguous else NewSpikes)(timeline, timeline.length))
        return reset

    def write(
        self,
        u: Tensor,
        current: Tensor,
        bits: Any,
        record: Record | None,
        out: Tensor,
        spikes: Tensor | None,
    ) -> tuple[list[Any], Any, Any]:
        """Write the state after the charge to ``out``, and its spikes; both are laid out as u.

        ``bits``: the spikes of u; ``record``: None if nothing has to be written down. Returns what has to
        be, in pieces, the largest magnitude, and the bits of the spikes.
        """
        stride = u.stride()
        return steps_on(u.device).charge(  # type: ignore[no-any-return]
            flat(u, stride),
            flat(current, stride),
            None if self.step.reset == NONE else bits,
            self.step,
            record,
            flat(out, stride),
            None if spikes is None else (self.flat_theta, self.inclusive, flat(spikes, stride)),
        )

    def let_fire(self, charged: Charged, parameters: Parameters) -> Tensor | None:
        """The spikes in the graph."""
        if charged.spikes is None:
            return None
        threshold = parameters[1]
        learned = (threshold,) if threshold.requires_grad else ()
        return self.firing.apply([charged.spikes], charged.state, *learned)  # type: ignore[no-any-return]

    def fired(self, before: Before) -> Fired | None:
        """The spikes of the state before the step."""
        u, bits = before.state, before.fired
        return None if bits is None else Fired(bits, u.size(), u.stride(), u.device)

    def vjp(self, mem: Tensor, g: Tensor) -> Tensor:
        """The gradient of a membrane from that of its spikes."""
        assert self.surrogate is not None
        write = in_one_pass(self.surrogate, mem.device)
        stride = mem.stride()
        if write is None or g.stride() != stride or g.dtype is not torch.float32:
            return self.surrogate.vjp(g, mem - self.theta)
        out = like(mem)
        write(flat(mem, stride), self.flat_theta, flat(g, stride), flat(out, stride))
        return out

    def back(self, charged: Tensor, current: Tensor, fired: Any, lost: Any) -> Tensor:
        """The state before a step, flat."""
        return steps_on(charged.device).undo(charged, current, fired, self.step, lost)  # type: ignore[no-any-return]

    def reference(self, current: Tensor, state: Tensor, parameters: Parameters) -> Stepped:
        """The step as operations that autograd differentiates."""
        (beta, threshold), reset, bits = parameters[:2], self.step.reset, self.bits
        u, threshold = snap(state, bits), threshold.float()
        fired = self.fired_before(u.detach(), parameters)
        v = decay((1 - fired) * u if reset == BEFORE else u, beta.clamp(0, 1), bits)  # type: ignore[operator]
        if reset == SUBTRACT:
            v = v - fired * snap(threshold, bits)  # type: ignore[operator]
        state = v + snap(current, bits)
        if reset == AFTER:
            state = (1 - fired) * state  # type: ignore[operator]
        spikes = None if self.fire is None else self.fire(state - snap(threshold, bits))
        return Stepped(state, spikes, fired)

    def fired_before(self, u: Tensor, parameters: Parameters) -> Tensor | None:
        """The spikes that reset the state u in its charge."""
        return None if self.surrogate is None else self.surrogate.fired(u - self.theta).float()


class FireAndReset(NamedTuple):
    """What a state does at its threshold.

    Attributes:
        kind: which spikes reset it, and when.
        reset: what they do in a charge, one of those in :mod:`.grid.decays`.
        surrogate: how it fires; None if it doesn't.
        fire: the same as the user gave it, which autograd differentiates.
    """

    kind: type[Leaky]
    reset: str
    surrogate: Surrogate | None
    fire: Callable[[Tensor], Tensor] | None


def leaky(
    how: FireAndReset,
    name: str,
    bits: int,
    parameters: tuple[Tensor, Tensor],
    example: Tensor,
    smallest: float = 0.5,
) -> Leaky:
    """The constants of one of a neuron's states.

    Args:
        how: it fires and resets.
        name: which state of which neuron it is, for errors.
        bits: the grid's.
        parameters: the decay, which is clamped to [0, 1], and the threshold: of any shape that broadcasts.
        example: a tensor of the state's shape and layout.
        smallest: the smallest decay that there is room for on a device, which is not asked for its own.

    Raises:
        ValueError: a decay that can't be undone.
    """
    (beta, threshold), scale = parameters, 2.0**bits
    with torch.no_grad():
        clamped, theta = beta.float().clamp(0, 1), snap(threshold.float(), bits)
        factor, flat_theta = (_as_number_or_each(one, example) for one in (clamped, theta))
        if not may_look(example.device):
            decay = decay_of(factor, smallest, 1.0, name)
        elif not bool(theta.isfinite().all()):
            raise ValueError(f"{name}: a threshold that is not finite can't be on the grid.")
        elif isinstance(factor, float):
            decay = decay_of(factor, factor, factor, name)
        else:
            low, high = (float(end) for end in torch.aminmax(clamped))
            decay = decay_of(factor.double(), low, high, name)
    charge = Step(decay, how.kind.lowest(flat_theta * scale, example), how.reset, scale)
    return how.kind(name, bits, charge, how.fire, parameters, how.surrogate, clamped, theta, flat_theta)


def _as_number_or_each(parameter: Tensor, example: Tensor) -> Any:
    """A number, on a device as a tensor of one; or an element for each neuron, flat."""
    if parameter.numel() > 1:
        return _each(parameter, example)
    return float(parameter) if may_look(example.device) else parameter.view(1)


def _each(parameter: Tensor, example: Tensor) -> Tensor:
    """A parameter with an element for each neuron, flat in the order of memory."""
    return flat(parameter.expand(example.shape), example.stride())


class Charging(torch.autograd.Function):
    """``constants.charging.apply(sinks, u, current, beta, threshold)`` -> the state after the charge.

    Of the ``sinks = [bits, reset, record, spikes, found]``, ``reset`` are the spikes of u where the
    gradient asks for them, as bits if u is contiguous; ``found`` collects what :meth:`Leaky.write` returns;
    the rest are its arguments.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, sinks: list[Any], u: Tensor, current: Tensor, beta: Tensor, threshold: Tensor
    ) -> Tensor:
        constants: Leaky = ctx._forward_cls.constants
        bits, reset, record, spikes, found = sinks
        state = like(u)
        found.extend(constants.write(u, current, bits, record, state, spikes))
        # Asking for needs_input_grad here would cost bytes a step.
        learned = beta.requires_grad
        ctx.save_for_backward(beta if learned else None, u if learned else None, reset)
        if current.dtype is not torch.float32:
            ctx.dtype = current.dtype
        return state

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        beta, u, reset = ctx.saved_tensors
        constants: Leaky = ctx._forward_cls.constants
        dtype = getattr(ctx, "dtype", torch.float32)
        _, of_u, of_current, of_beta, of_threshold = ctx.needs_input_grad
        kind = constants.step.reset
        if kind == AFTER:
            g = _gated(g, 1.0, reset)
        by_threshold = by_beta = by_u = None
        if of_threshold and kind == SUBTRACT:
            by_threshold = (-g * _spikes(reset, g)).sum_to_size(constants.theta.shape)
        if of_beta:
            decayed = u if kind != BEFORE else (1 - _spikes(reset, g)) * u
            by_beta = through_clamp(beta, (g * decayed).sum_to_size(beta.shape).to(beta.dtype))
        if of_u:
            factor = constants.beta if beta is None else beta.clamp(0, 1)
            by_u = _gated(g, factor, reset) if kind == BEFORE else g * factor
        return None, by_u, g.to(dtype) if of_current else None, by_beta, by_threshold


def _spikes(reset: Tensor, g: Tensor) -> Tensor:
    """The spikes of a reset, which are saved as bits where a layout is contiguous."""
    if reset.dtype is not torch.uint8:
        return reset
    spikes = torch.empty(g.shape, device=g.device)
    steps_on(g.device).fired(as_pieces(reset), spikes.view(-1))
    return spikes


def _gated(g: Tensor, factor: Any, reset: Tensor) -> Tensor:
    """``g * factor``, and times 0 where neurons fired."""
    one = isinstance(factor, float) or factor.numel() == 1
    if reset.dtype is not torch.uint8 or not one:
        return (g * factor).mul_(1 - _spikes(reset, g))
    out = torch.empty(g.shape, device=g.device)
    form = steps_on(g.device)
    if isinstance(factor, Tensor):
        factor = float(factor) if may_look(factor.device) else factor.view(1)
    form.gate(flat(g, out.stride()), factor, as_pieces(reset), out.view(-1))
    return out


class Firing(torch.autograd.Function):
    """``constants.firing.apply([spikes], mem, *threshold)`` -> the spikes; a threshold only if learned."""

    @staticmethod
    def forward(ctx: Any, spikes: list[Tensor], mem: Tensor, *threshold: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(mem, *threshold)
        return spikes[0]

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mem, *threshold = ctx.saved_tensors
        constants: Leaky = ctx._forward_cls.constants
        of_mem = constants.vjp(mem, g)
        to_mem = ctx.needs_input_grad[1]
        of_threshold = [(-of_mem).sum_to_size(one.shape).to(one.dtype) for one in threshold]
        return None, of_mem if to_mem else None, *of_threshold


def unpacked(bits: Any, u: Tensor) -> Tensor:
    """Spikes as they are, from their bits, laid out as ``u``."""
    spikes = like(u)
    steps_on(u.device).fired(bits, flat(spikes, u.stride()))
    return spikes
