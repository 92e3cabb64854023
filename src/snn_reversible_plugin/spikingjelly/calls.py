"""The autograd functions of IFNode, LIFNode and ParametricLIFNode: a sequence, and a step.

The one idea: over a sequence only the input current is saved, which the tape replays from spikes; a step
saves its charged membrane, as a place on a stretch of steps where it has one, or the current that a
fresh one was charged with.

Source: SpikingJelly 2.0, ``_ops/{if_,lif,plif}/reference.py``, which is what runs on a CPU, and on a
GPU where there is no fused kernel; ``neuron`` of 0.0.0.0.14 and 0.0.0.0.12.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step, multi_step_vjp
from snn_reversible_plugin.neurons.integrate_fire.in_slices import (
    may_be_written_over,
    sequence_vjp_in_slices,
    sequence_vjp_over,
)
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Neuron,
    OutputGradients,
    Rule,
    Wanted,
    number_pulling,
    single_step,
    single_step_vjp,
    step,
)
from snn_reversible_plugin.neurons.rerun import differentiable_once
from snn_reversible_plugin.neurons.stretch import Place
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.tape.final_membrane import FinalMembrane, LastOfAll, Memories, OfFirstStep

# NOTE [What stock runs]
#
# 1. SpikingJelly 2.0, in float32 with one of seven surrogates, an operator: on a CPU torch code with
#    derivatives of its own for those surrogates, on a GPU a kernel. Where that is Triton's, ours stands in
#    for it (`neurons/integrate_fire/on_device.py`), over sequences; others are left alone.
#    ParametricLIF takes the sigmoid of w once. The final membrane is cut from v_seq where that is stored.
# 2. Otherwise, and in older releases, torch code with the surrogate as it is. ParametricLIF takes the
#    sigmoid in every step, so w gets T gradients one after the other; w is handed over T times for that.
# 3. The membrane is handed over twice for the same reason (reference, note on order, 3).
# 4. The older releases' sums are in another order (reference, note on other orders), and 0.0.0.0.12 stores
#    v_seq of every sequence. On a GPU a kernel takes that order, whatever backend they are set to.
# 5. A checkpoint (`torch.utils.checkpoint`) around a neuron that nothing resets inside runs it again from
#    the membrane that the first run left, and takes what that saves. So a number is saved as well, by a
#    tensor of one element that looks like a membrane; what stands in its place then is what stock starts
#    from. A step saves its charged membrane there, whatever it was charged from.


class Call(NamedTuple):
    """What one call of a neuron does, fixed at the time of the call. ``neuron`` is without its leak q."""

    neuron: Neuron
    fused: bool
    store_v_seq: bool = False

    def with_leak(self, w: Tensor | None) -> Neuron:
        if w is None:
            return self.neuron
        return self.neuron._replace(q=w.float().sigmoid() if self.fused else w.sigmoid())

    def leak_vjp(self, g_q: list[Tensor], q: Tensor, w: Tensor) -> list[Tensor]:
        """Gradients of w, one each time it was handed over, in the order of autograd's arrivals."""
        if self.fused and self.neuron.launched:  # stock's kernel writes the derivative out
            return [(g * q * (1 - q)).to(w.dtype) for g in g_q]
        if self.fused:
            total = g_q[0]
            for g in g_q[1:]:
                total = total + g
            g_q = [total]
        return [torch.ops.aten.sigmoid_backward(g, q).to(w.dtype) for g in g_q]


def final_membrane(call: Call, v: float, x_seq: Tensor, w: Tensor | None = None) -> Tensor:
    """The membrane that a sequence leaves behind."""
    return multi_step(x_seq, v, call.with_leak(w))[1]


def first_membrane(call: Call, v: float, x: Tensor, w: Tensor | None = None) -> Tensor:
    """The membrane that one step leaves behind."""
    return single_step(x, torch.full_like(x, v), call.with_leak(w))[1]


def all_membranes(call: Call, v: float, x_seq: Tensor, w: Tensor | None = None) -> Tensor:
    """The membranes after each step of a sequence."""
    v_seq = multi_step(x_seq, v, call.with_leak(w), store_v_seq=True)[2]
    assert v_seq is not None
    return v_seq


class Promised(NamedTuple):
    """The promises of a sequence's states, in place of tensors."""

    final: FinalMembrane | None = None
    stored: FinalMembrane | None = None


def promises_of(call: Call, v: float, held: tuple[tape.Handle, ...]) -> Promised:
    """The states of a sequence, to be computed when somebody reads them."""
    stored = FinalMembrane(partial(all_membranes, call, v), *held) if call.store_v_seq else None
    if call.store_v_seq and call.fused:  # stock cuts the last from the membranes of all steps
        return Promised(stored=stored)
    return Promised(FinalMembrane(partial(final_membrane, call, v), *held), stored)


# Neurons that were found to take several steps: somebody read the membrane after their first one.
stepped_neurons: weakref.WeakSet[Any] = weakref.WeakSet()


def leave(module: Any, promise: FinalMembrane, place: Tensor) -> None:
    """Leave the promise of a membrane; ``place`` is the output that gets its gradient."""
    leave_all(module, Promised(promise), [place])


def leave_all(module: Any, promised: Promised, places: list[Tensor]) -> None:
    """Leave promises among a neuron's states; ``places`` are the outputs that get their gradients."""
    memories = module._memories
    if not isinstance(memories, Memories):
        memories = module.__dict__["_memories"] = Memories(memories)
    final, stored = promised
    if stored is not None:
        stored.promise(places[-1])
        if "v_seq" in memories:
            memories["v_seq"] = stored
        else:
            memories.stored = stored
    if final is not None:
        final.goes_unread = memories.goes_unread
        final.promise(places[0])
    memories["v"] = LastOfAll(lambda: module.v_seq) if final is None else final


class MultiStep(torch.autograd.Function):
    """Spikes and final membrane, and what is stored of those between, of a whole sequence."""

    takes_slices = True

    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        v: Any,
        _v_again: Any,
        call: Call,
        promised: Promised,
        *ws: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        final, stored = promised
        ctx.final = None if final is None else weakref.ref(final)
        ctx.stored = None if stored is None else weakref.ref(stored)
        ctx.call, ctx.start = call, None if isinstance(v, Tensor) else v
        ctx.in_slices = tape.mode_inside("") == "minimal"
        ctx.save_for_backward(x_seq, _start_to_save(x_seq, v, call), ws[0] if ws else None)
        with tape.paused():
            builds_v_seq = call.store_v_seq and stored is None
            neuron = call.with_leak(ws[0] if ws else None)
            over = ctx.in_slices and tape.may_be_replaced(x_seq)
            how: Any = {"drops_last": final is not None, "in_chunks": ctx.in_slices, "over": over}
            spikes, v, v_seq = multi_step(x_seq, v, neuron, builds_v_seq, **how)
            if stored is not None:
                v_seq = stored.placeholder(spikes, spikes.new_zeros((), dtype=v.dtype))
            if final is not None:
                v = final.placeholder(v, x_seq.new_zeros((), dtype=v.dtype))
        if v_seq is None:
            return spikes, v
        return (spikes, v_seq) if call.fused else (spikes, v, v_seq)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_s: Tensor | None, *g_states: Tensor | None) -> Any:
        x_seq, v, w = ctx.saved_tensors
        cut = tape.cut_of(x_seq)
        owned = cut is None and tape.owns(x_seq)
        call: Call = ctx.call
        if ctx.in_slices and call is not _TRIED:
            tape.try_out(MultiStep, _tried)
        asks = ctx.in_slices or call is _TRIED
        overwrites = asks and tape.is_alone(MultiStep, tape.references(g_s))
        nothing = (None,) * (len(ctx.needs_input_grad) - 5)
        g_v, g_v_seq = (*g_states, None)[:2]
        if call.store_v_seq and call.fused:
            g_v, g_v_seq = None, g_v
        if g_s is None and g_v is None and g_v_seq is None:
            if cut is not None:
                cut.release()
            return None, None, None, None, None, *nothing
        neuron = call.with_leak(w)
        wanted = Wanted(
            x=ctx.needs_input_grad[0],
            v=ctx.needs_input_grad[1],
            q=w is not None and ctx.needs_input_grad[5],
            sums_chunks=ctx.in_slices,
        )
        final = None if ctx.final is None else ctx.final()
        stored = None if ctx.stored is None else ctx.stored()
        if stored is not None and not stored.settle(cut is not None):
            stored.compute()
        lean = cut is not None or (ctx.in_slices and final is not None and final.is_of_other_weights())
        v_last = None if final is None or final.settle(lean) else final.empty()
        is_number = ctx.start is not None and (v is None or not any(v.stride()))
        start, grads = ctx.start if is_number else v, OutputGradients(g_s, g_v, g_v_seq)
        if cut is not None:
            found = sequence_vjp_in_slices(cut, start, grads, neuron, wanted, v_last, overwrites=overwrites)
        else:
            # What is saved is part of the forward's graph, and a gradient must not be.
            x = x_seq.detach()
            if overwrites and wanted.x and not owned and may_be_written_over(x, g_s, neuron):
                found = sequence_vjp_over(x, start, grads, neuron, wanted, v_last)
            else:
                found = multi_step_vjp(x, start, grads, neuron, wanted, owned=owned, v_last=v_last)
        if final is not None and v_last is not None:
            final.keep(v_last)
        g_ws = call.leak_vjp(found.q, neuron.q, w) if wanted.q else nothing  # type: ignore[arg-type]
        return found.x, *found.v, None, None, *g_ws


def _start_to_save(x_seq: Tensor, v: Tensor | float, call: Call) -> Tensor | None:
    """The membrane that a sequence starts from, for its backward; see note 5."""
    if isinstance(v, Tensor):
        return v
    if tape.saves():
        return None
    dtype = torch.float32 if call.neuron.wide else x_seq.dtype
    return x_seq.new_full((), v, dtype=dtype).expand(x_seq.shape[1:])


_TRIED = Call(
    Neuron(Rule(2.0, True, 1.0, 0.0, True), Surrogate(lambda grad, u: grad / (1 + u.abs()))), False
)


def _tried(x_seq: Tensor) -> Tensor:
    """A sequence whose backward is asked how a gradient comes to it."""
    with tape.paused():
        return MultiStep.apply(x_seq, 0.0, None, _TRIED, Promised())[0]  # type: ignore[no-any-return]


class Beside(NamedTuple):
    """What a step is given beside its tensors: the promise of its membrane, and its place on a stretch."""

    first: OfFirstStep | None = None
    place: Place | None = None


class SingleStep(torch.autograd.Function):
    """Spikes and membrane of one step."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Any, _v_again: Any, call: Call, beside: Beside, *ws: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call, ctx.start = call, None if isinstance(v, Tensor) else v
        first, place = beside
        # On a stretch, what a fresh membrane was charged from: the current alone, which can be replayed.
        ctx.from_current = ctx.start is not None and place is not None
        w, alive = (*ws, None)[0], None
        with tape.paused():
            before = torch.full_like(x, v) if ctx.start is not None else v
            s, v, h, pull = single_step(x, before, call.with_leak(w))
            pull = pull if w is not None and ctx.needs_input_grad[5] else None
            if place is not None:
                alive = place.charged(h, pull)
            if first is not None:
                v = first.placeholder(v)
        ctx.first = None if first is None else weakref.ref(first)
        ctx.save_for_backward(*((x, w, None) if ctx.from_current else (h, w, pull)), alive)
        return s, v

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_s: Tensor | None, g_v: Tensor | None) -> Any:
        h, w, pull, _ = ctx.saved_tensors
        call: Call = ctx.call
        if g_s is None and g_v is None:
            return (None,) * len(ctx.needs_input_grad)
        neuron = call.with_leak(w)
        learns = w is not None and ctx.needs_input_grad[5]
        if ctx.from_current:
            # What is saved is part of the forward's graph, and a gradient must not be.
            x = h.detach()
            _, v, h, pull = step(x, torch.full_like(x, ctx.start), neuron)
            first = None if ctx.first is None else ctx.first()
            if first is not None and first.membrane is None and not first.settle():
                first.keep(v)
        if ctx.start is not None and (number := number_pulling(ctx.start, neuron.rule)) is not None:
            pull = number
        grads = single_step_vjp(h, g_s, g_v, neuron, pull if learns else None)
        g_vs = grads.v if ctx.needs_input_grad[1] else (None, None)
        if w is None:
            return grads.x, *g_vs, None, None
        return grads.x, *g_vs, None, None, call.leak_vjp(grads.q, neuron.q, w)[0] if grads.q else None  # type: ignore[arg-type]
