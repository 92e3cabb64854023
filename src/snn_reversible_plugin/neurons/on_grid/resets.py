"""Leaky states with other resets: by spikes of another state, or at once, by spikes with a gradient.

The one idea: the charge is :class:`~.neurons.on_grid.leaky.Leaky`'s. What differs is where the spikes that
reset come from, so they are written down with what the charge loses, and, where a reset follows at once,
with what it loses.

Source: ``snntorch.Alpha``, and ``reset_delay=False`` of ``snntorch.Leaky``, version 1.0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import reach, snap
from snn_reversible_plugin.grid.decays import SUBTRACT
from snn_reversible_plugin.grid.range import check_step
from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.neurons.on_grid.leaky import Fired, Leaky, unpacked
from snn_reversible_plugin.neurons.on_grid.places import NewCharged, NewSpikes
from snn_reversible_plugin.neurons.on_grid.step import Before, Charged, Parameters, Stepped
from snn_reversible_plugin.neurons.on_grid.timeline import REMEDY
from snn_reversible_plugin.ops.batched import one_by_one
from snn_reversible_plugin.ops.devices import may_look
from snn_reversible_plugin.ops.layouts import flat, like
from snn_reversible_plugin.tape.origins import enter

# NOTE [Spikes that a charge can't find again]
#
# 1. A delayed reset is by the spikes of the state that the charge starts from, which are on record as the
#    spikes of the step before. Here they are other spikes: r, of another neuron state, or of a state that
#    was reset since it fired. A record of the charge begins with their bits.
# 2. snnTorch's reset without delay comes on top of the delayed one, "to avoid double reset" for the
#    difference d = s - r only: v' = h - d theta, or v' = h - d h. Unlike the delayed one it is not cut off
#    the graph: s passes on the gradient that it gets there.
# 3. d is -1, 0 or 1. To zero, it loses h where d = 1, and there h is above the threshold: it is stored as
#    its distance from it, as in a delayed reset. Where d = -1, v' is 2 h. By subtraction nothing is lost.
#    Say theta = 1, v = 0, x = 2.5: h = 2.5, s = 1, r = 0, d = 1, so v' = 1.5, above the threshold still.
#    The next charge takes theta away (r = 1), and if s = 1 there, d = 0. Back: h = v' + d theta.


@dataclass(frozen=True, eq=False)
class ResetByGiven(Leaky):
    """A state that is reset after its charge by given spikes, float32, the last of the parameters."""

    @staticmethod
    def lowest(theta: Any, example: Tensor) -> Any:
        """Of all states: they may be anywhere. Kernels on devices have room for half of them only."""
        return -(2.0**24) if may_look(example.device) else -(2.0**23)

    def reset_by(self, before: Before, parameters: Parameters) -> Tensor | None:
        """They themselves, which are on the tape."""
        return parameters[-1] if self.resets(parameters) else None

    def fired_before(self, u: Tensor, parameters: Parameters) -> Tensor | None:
        """The same."""
        return parameters[-1]

    def charge(self, current: Tensor, before: Before, parameters: Parameters) -> Charged:
        """Charge, and write down what reset it."""
        u = before.state
        stride, given = u.stride(), like(u).copy_(parameters[-1])
        bits = steps_on(u.device).fire(flat(given, stride), 0.5, False, flat(like(u), stride))
        charged = super().charge(current, before._replace(fired=bits), parameters)
        return charged._replace(lost=(bits, *charged.lost))

    @property
    def resets_in_charge(self) -> bool:
        """Not by spikes of its own."""
        return False

    def back(self, charged: Tensor, current: Tensor, fired: Any, lost: Any) -> Tensor:
        """The state before a step, flat."""
        end = (len(charged) + 7) // 8
        return super().back(charged, current, lost[:end], lost[end:])


@dataclass(frozen=True, eq=False)
class Undelayed(Leaky):
    """A state that is reset as it fires, as well as by its spikes before the charge."""

    @property
    def resets_at_once(self) -> bool:
        """Yes."""
        return True

    @property
    def resets_in_charge(self) -> bool:
        """The spikes of a charge are in its own record."""
        return False

    def reset_by(self, before: Before, parameters: Parameters) -> Tensor | None:
        """The spikes of the state before the charge; the reset at once may ask for them again."""
        spikes = unpacked(before.fired, before.state)
        tape.mark_spikes(spikes)
        return spikes if self.resets(parameters) else None

    def charge(self, current: Tensor, before: Before, parameters: Parameters) -> Charged:
        """Charge, fire, and reset at once."""
        u, _, timeline, t, _ = before
        bits = self.start(u)  # the step that made this state wrote down its spikes before the reset
        charged = super().charge(current, before._replace(fired=bits), parameters)
        h = charged.state
        if timeline is None:
            tape.mark_opaque(h)
        else:
            enter(h, NewCharged(timeline, t))
        spikes = super().let_fire(charged, parameters)
        assert spikes is not None
        if timeline is None:
            tape.mark_spikes(spikes)
        else:
            enter(spikes, NewSpikes(timeline, t))
        reset, threshold = unpacked(bits, u), parameters[1]
        tape.mark_spikes(reset)
        found: list[Any] = []
        state = self.resetting.apply(found, h, spikes, reset, threshold)
        lost = () if timeline is None else (bits, *charged.lost)
        fired = (*charged.fired, bits, *found)
        return Charged(state, spikes, lost, fired, (*charged.reaches, reach(state)))

    @functools.cached_property
    def resetting(self) -> type[Resetting]:
        """:class:`Resetting` with these constants: an attribute of each node would cost bytes a step."""
        return type("Resetting", (Resetting,), {"constants": self})

    def write_reset(self, h: Tensor, d: Tensor, found: list[Any]) -> Tensor:
        """The state after the reset; ``found`` collects what it loses."""
        if self.step.reset == SUBTRACT:
            return h - d * self.theta
        stride, state = h.stride(), like(h)
        form, ends = steps_on(h.device), d.clamp(min=0)
        pieces, _ = form.reset(
            flat(h, stride),
            flat(ends, stride),
            self.step.theta,
            0.0,
            self.step.scale,
            True,
            flat(state, stride),
        )
        found += pieces
        return state.sub_(d.clamp(max=0) * h)

    def unreset(self, state: Tensor, fired: Any, lost: Any) -> Tensor:
        """The charged state of a step, flat."""
        end, form = (len(state) + 7) // 8, steps_on(state.device)
        spikes, reset = torch.empty_like(state), torch.empty_like(state)
        form.fired(fired, spikes)
        form.fired(lost[:end], reset)
        d = spikes - reset
        if self.step.reset == SUBTRACT:
            theta = self.flat_theta
            return state + d * theta
        ends, out = d.clamp(min=0), torch.empty_like(state)
        bits = form.fire(ends, 0.5, False, out)
        h = form.unreset(state, bits, self.step.theta, 0.0, self.step.scale, lost[end:])
        return torch.where(d < 0, h * 0.5, h)

    def back(self, charged: Tensor, current: Tensor, fired: Any, lost: Any) -> Tensor:
        """The state before a step, flat."""
        end = (len(charged) + 7) // 8
        return super().back(charged, current, lost[:end], lost[end:])

    def let_fire(self, charged: Charged, parameters: Parameters) -> Tensor | None:
        """They are in the graph: the state after the step is computed from them."""
        return charged.spikes

    def fired(self, before: Before) -> Fired | None:
        """The spikes of the state before the step."""
        u = before.state
        return Fired(self.start(u), u.size(), u.stride(), u.device)

    def reference(self, current: Tensor, state: Tensor, parameters: Parameters) -> Stepped:
        """The step as operations that autograd differentiates."""
        h, spikes, fired, _ = super().reference(current, state, parameters)
        check_step(reach(h), self.name, self.bits, REMEDY)
        assert spikes is not None and fired is not None
        d = spikes - fired
        by = snap(parameters[1].float(), self.bits) if self.step.reset == SUBTRACT else h
        return Stepped(h - d * by, spikes, fired)


class Resetting(torch.autograd.Function):
    """``constants.resetting.apply(found, h, spikes, reset, threshold)`` -> the state after a reset at once.

    ``reset``: the spikes of the delayed reset; ``found`` collects what this one loses.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, found: list[Any], h: Tensor, s: Tensor, r: Tensor, threshold: Tensor
    ) -> Tensor:
        constants: Undelayed = ctx._forward_cls.constants
        soft, learned = constants.step.reset == SUBTRACT, threshold.requires_grad
        kept = (None, s, r) if soft else (h, s, r)
        ctx.save_for_backward(*(kept if learned or not soft else (None, None, None)))
        return constants.write_reset(h, s - r, found)

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h, s, r = ctx.saved_tensors
        constants: Undelayed = ctx._forward_cls.constants
        _, of_h, of_s, _, of_threshold = ctx.needs_input_grad
        by_h, by_s, by_threshold, taken = g, None, None, -g
        if h is not None:
            by_h = g + taken * (s - r)
            by_s = taken * h if of_s else None
        else:
            by_s = taken * constants.theta if of_s else None
            if of_threshold:
                by_threshold = (taken * (s - r)).sum_to_size(constants.theta.shape)
        return None, by_h if of_h else None, by_s, None, by_threshold
