"""Calls of the coupled node: its autograd functions, over a sequence and in a user's own loop.

The one idea: a call keeps its outputs, which the next layer keeps too, the remainders, and the states that
it ended with. In a loop not even those: the step after gives them back when its own backward is done.
Source: Lei et al., arXiv 2308.08649; the equations are in :mod:`.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.grid import stream_dtype, watch
from snn_reversible_plugin.neurons.coupled.in_place import Stepped, backward, forward, inverse
from snn_reversible_plugin.neurons.coupled.reference import Constants, Node, couple
from snn_reversible_plugin.ops.batched import one_by_one

# NOTE [What is held between forward and backward]
#
# 1. Outputs are not binary (O + beta X), so they are not packed. Whatever comes next usually saves them as
#    its input, and it is the same memory. On a tape their recipe is written down: the spikes, packed, and
#    the input current, replayed as the tape sees fit.
# 2. Remainders, log2(1 / beta) bits a neuron and step.
# 3. The states after a call. Stepped one time step at a time, that would be one a step. So a step that
#    starts from another's states takes them off its hands, and hands them back, rebuilt, after its own
#    backward, which autograd runs first.
# 4. Where no backward of the later step has come by (its outputs are no part of the loss), the earlier
#    one undoes the steps after it itself. It holds what that needs: their outputs and remainders, never
#    their nodes, so no cycle arises.
# 5. What is held outside of autograd has its version checked here.


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, s: Tensor | None, leak: Tensor | None, node: Node, undoable: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.node, ctx.dtype = node, x_seq.dtype
        recorded = undoable and tape.saves()
        with tape.paused():
            y_seq, s_out, remainders = forward(
                x_seq, s, node._replace(leak=leak), undoable=undoable, coupled=not recorded
            )
        if recorded:
            tape.mark_spikes(y_seq)
            y_seq = couple(y_seq, x_seq, node.constants)
            tape.mark_opaque(s_out)
        ctx.parts = [part for part, _ in remainders]
        ctx.save_for_backward(y_seq, s_out, leak, *(stored for _, stored in remainders))
        return y_seq, s_out

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_s: Tensor | None) -> Any:  # type: ignore[override]
        if g_y is None and g_s is None:
            return (None,) * 5
        y_seq, s, leak, *stored = ctx.saved_tensors
        owned = tape.owns(y_seq)
        node: Node = ctx.node
        # What is saved is part of the forward's graph, and a gradient must not be.
        after = Stepped(y_seq.detach(), s, list(zip(ctx.parts, stored, strict=True)))
        grads = backward(
            after, g_y, g_s, node._replace(leak=leak),
            wants_leak=ctx.needs_input_grad[2], dtype=ctx.dtype, owned=owned,
        )  # fmt: skip
        _watch(node, grads.reached)
        return grads.x_seq, grads.g_s if ctx.needs_input_grad[1] else None, grads.leak, None, None


class _States:
    """The states after a step: here, or with the step after."""

    __slots__ = ("after", "name", "s", "version")

    def __init__(self, s: Tensor, name: str) -> None:
        self.name = name
        self.after: _Undo | None = None
        self.put(s)

    def put(self, s: Tensor) -> None:
        self.s: Tensor | None = s
        self.version = s._version

    def take(self) -> Tensor:
        """The states, which are not held any longer if they can be had again."""
        states: _States = self
        later: list[_Undo] = []
        while states.s is None:
            assert states.after is not None
            later.append(states.after)
            states = states.after.states
        s = states.s
        if s._version != states.version:
            raise RuntimeError(
                f"a state of {states.name} was changed in place after its step, and the backward starts "
                "from it: work on a clone."
            )
        for step in reversed(later):
            s = step.undo(s)
        if self.after is not None:
            self.s = None
        return s


class _Undo:
    """What undoes a step, beside the states after it."""

    __slots__ = ("node", "remainders", "states", "version", "y_seq")

    def __init__(self, after: Stepped, states: _States, node: Node) -> None:
        self.y_seq, self.version = after.y_seq.detach(), after.y_seq._version
        self.remainders, self.states, self.node = after.remainders, states, node

    def from_states(self, s: Tensor) -> Stepped:
        """What the step's forward returned, given the states that it ended with."""
        if self.y_seq._version != self.version:
            raise RuntimeError(
                f"an output of {self.node.name} was changed in place, and the backward needs it: make the "
                "operation after it out of place (inplace=False), or let it work on a clone."
            )
        return Stepped(self.y_seq, s, self.remainders)

    def undo(self, s: Tensor) -> Tensor:
        return inverse(self.from_states(s), self.node).s


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        s: Tensor | None,
        leak: Tensor | None,
        node: Node,
        before: _States | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.before = x_seq.dtype, before
        with tape.paused():
            node = node._replace(leak=None if leak is None else leak.detach())
            after = forward(x_seq, s, node)
            ctx.states = _States(after.s.detach(), node.name)
            ctx.step = _Undo(after, ctx.states, node)
        if before is not None and before.after is None:
            before.after, before.s = ctx.step, None
        tape.mark_opaque(after.y_seq, after.s)
        return after.y_seq, after.s

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, g_y: Tensor | None, g_s: Tensor | None) -> Any:  # type: ignore[override]
        if g_y is None and g_s is None:
            return (None,) * 5
        step: _Undo = ctx.step
        after = step.from_states(ctx.states.take())
        grads = backward(after, g_y, g_s, step.node, wants_leak=ctx.needs_input_grad[2], dtype=ctx.dtype)
        if ctx.before is not None and ctx.before.after is step:
            ctx.before.put(grads.s)
        _watch(step.node, grads.reached)
        return grads.x_seq, grads.g_s if ctx.needs_input_grad[1] else None, grads.leak, None, None


def run_sequence(x_seq: Tensor, s: Tensor | None, node: Node) -> tuple[Tensor, Tensor]:
    """All steps in one call, with the gradient of :func:`.reference.sequence`, bit for bit.

    Args:
        x_seq: inputs [T, N, C, ...], C even, T at least 1.
        s: states [N, C, ...], None for zeros.
        node: whose steps they are.

    Returns:
        Outputs [T, N, C, ...] and states [N, C, ...].

    Raises:
        ValueError: a shape that does not fit.
        TypeError: an input that is not floating-point.
        OverflowError: from the backward, at its end: an output or a state left the range of the grid.
    """
    _check(x_seq, s, node.name, 2)
    undoable = _needs_grad(x_seq, s, node.leak)
    given = node._replace(leak=None)  # which goes its own way, as an input of the graph's node
    y_seq, s_out = _Sequence.apply(x_seq, s, node.leak, given, undoable)  # type: ignore[no-untyped-call]
    return y_seq, s_out


def run_step(x: Tensor, s: Tensor | None, node: Node) -> tuple[Tensor, Tensor]:
    """One step of a user's loop: [N, C, ...] to outputs and states. See :func:`run_sequence`."""
    _check(x, s, node.name, 1)
    x_seq = x.unsqueeze(0)
    if _needs_grad(x, s, node.leak):
        given = node._replace(leak=None)
        y_seq, s_out = _Step.apply(x_seq, s, node.leak, given, _states_of(s))  # type: ignore[no-untyped-call]
    else:
        y_seq, s_out = run_sequence(x_seq, s, node)
    return y_seq.squeeze(0), s_out


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in tensors)


def _check(x: Tensor, s: Tensor | None, name: str, channels: int) -> None:
    """Refuse an input or a state that does not fit; ``channels`` is the dimension that is split."""
    dtype = stream_dtype(x.dtype)
    expected = "[N, C, ...]" if channels == 1 else "[T, N, C, ...]"
    if x.dim() <= channels:
        raise ValueError(f"{name} takes {expected}, not a tensor of shape {tuple(x.shape)}")
    if channels == 2 and not x.shape[0]:
        raise ValueError(f"{name}: a sequence of no time steps, shape {tuple(x.shape)}: give one or more")
    if x.shape[channels] % 2:
        raise ValueError(
            f"{name}: {x.shape[channels]} channels (dimension {channels} of {tuple(x.shape)}) don't split "
            "into two groups: give the layer before it an even number"
        )
    if s is None:
        return
    shape = x.shape[channels - 1 :]
    if s.shape != shape or s.device != x.device or s.dtype is not dtype:
        raise ValueError(
            f"{name}: a state of shape {tuple(s.shape)} ({s.dtype}, {s.device}) does not belong to an "
            f"input whose steps have shape {tuple(shape)} ({dtype}, {x.device}): reset the network before "
            "another sequence"
        )


def _states_of(s: Tensor | None) -> _States | None:
    """The states of the step that made this tensor, if it is one and still has their values."""
    node = None if s is None else s.grad_fn
    states = getattr(node, "states", None)
    if s is None or not isinstance(states, _States) or s.output_nr != 1 or s._version != states.version:
        return None
    return states


def _watch(node: Node, reached: Tensor) -> None:
    bits = node.constants.bits
    watch(f"an output or a state of {node.name}{_growth(node.constants)}", reached, bits)


def _growth(constants: Constants) -> str:
    leak, beta = constants.leak, constants.beta
    if leak is None or beta <= leak:
        return ""
    return f" (beta={beta:g} is above 1 / tau={leak:g}, so states of silent neurons grow with time)"
