"""IFNode, LIFNode and ParametricLIFNode with an analytic backward.

The one idea: these three are nearly all of practice, and their arithmetic is known, so the backward is
written out (:mod:`.neurons.integrate_fire.reference`) instead of recorded. Over a sequence only the input
current is saved, which the tape replays from spikes; stepped one time step at a time, the charged
membrane, 4 bytes a neuron and step. :func:`how` says of each call whether that is so; a configuration whose
arithmetic is not known here, and any subclass with dynamics of its own, is replayed as a black box
(:mod:`.spikingjelly.replayed`).

Source: SpikingJelly 2.0, ``_ops/{if_,lif,plif}/reference.py``, which is what runs on a CPU, and on a
GPU where there is no fused kernel.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step, multi_step_vjp
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Neuron,
    OutputGradients,
    Rule,
    Wanted,
    single_step,
    single_step_vjp,
)
from snn_reversible_plugin.neurons.rerun import differentiable_once
from snn_reversible_plugin.neurons.surrogates import Surrogate, by_autograd
from snn_reversible_plugin.neurons.witness import agree
from snn_reversible_plugin.ops.chunks import chunk_size
from snn_reversible_plugin.spikingjelly.replayed import as_stock, is_learning, replayed
from snn_reversible_plugin.spikingjelly.surrogates import fused, proved
from snn_reversible_plugin.spikingjelly.types import ROWS, dynamics_of
from snn_reversible_plugin.tape.final_membrane import FinalMembrane, Memories

# NOTE [What stock runs]
#
# 1. In float32 with one of seven surrogates, an operator: on a CPU torch code with derivatives of its
#    own for those surrogates, on a GPU a fused kernel, which is left alone. ParametricLIF takes the
#    sigmoid of w once. The final membrane is cut from v_seq where that is stored.
# 2. Otherwise torch code with the surrogate as it is. ParametricLIF takes the sigmoid in every step, so
#    w gets T gradients one after the other; w is handed over T times for that.
# 3. The membrane is handed over twice for the same reason (reference, note on order, 3).


class _Call(NamedTuple):
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
        if self.fused:
            total = g_q[0]
            for g in g_q[1:]:
                total = total + g
            g_q = [total]
        return [torch.ops.aten.sigmoid_backward(g, q).to(w.dtype) for g in g_q]


def _final_membrane(call: _Call, v: float, x_seq: Tensor, w: Tensor | None = None) -> Tensor:
    return multi_step(x_seq, v, call.with_leak(w))[1]


class _MultiStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_seq: Tensor,
        v: Any,
        _v_again: Any,
        call: _Call,
        final: FinalMembrane | None,
        *ws: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.final = None if final is None else weakref.ref(final)
        ctx.call, ctx.start = call, None if isinstance(v, Tensor) else v
        ctx.save_for_backward(x_seq, v if ctx.start is None else None, ws[0] if ws else None)
        with tape.paused():
            spikes, v, v_seq = multi_step(x_seq, v, call.with_leak(ws[0] if ws else None), call.store_v_seq)
            if final is not None:
                v = final.placeholder(v)
        if v_seq is None:
            return spikes, v
        return (spikes, v_seq) if call.fused else (spikes, v, v_seq)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_s: Tensor | None, *g_states: Tensor | None) -> Any:
        x_seq, v, w = ctx.saved_tensors
        owned = tape.owns(x_seq)
        call: _Call = ctx.call
        nothing = (None,) * (len(ctx.needs_input_grad) - 5)
        g_v, g_v_seq = (*g_states, None)[:2]
        if call.store_v_seq and call.fused:
            g_v, g_v_seq = None, g_v
        if g_s is None and g_v is None and g_v_seq is None:
            return None, None, None, None, None, *nothing
        neuron = call.with_leak(w)
        wanted = Wanted(
            x=ctx.needs_input_grad[0],
            v=ctx.needs_input_grad[1],
            q=w is not None and ctx.needs_input_grad[5],
        )
        final = None if ctx.final is None else ctx.final()
        v_last = None if final is None else final.empty()
        # What is saved is part of the forward's graph, and a gradient must not be.
        found = multi_step_vjp(
            x_seq.detach(), ctx.start if v is None else v, OutputGradients(g_s, g_v, g_v_seq), neuron,
            wanted, owned=owned, v_last=v_last,
        )  # fmt: skip
        if final is not None and v_last is not None:
            final.keep(v_last)
        g_ws = call.leak_vjp(found.q, neuron.q, w) if wanted.q else nothing  # type: ignore[arg-type]
        return found.x, *found.v, None, None, *g_ws


class _SingleStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, v: Any, _v_again: Any, call: _Call, *ws: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        with tape.paused():
            if not isinstance(v, Tensor):
                v = torch.full_like(x, v)
            s, v, h, pull = single_step(x, v, call.with_leak(ws[0] if ws else None))
        if not ws:
            ctx.save_for_backward(h)
        else:
            ctx.save_for_backward(h, ws[0], pull if ctx.needs_input_grad[4] else None)
        return s, v

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_s: Tensor | None, g_v: Tensor | None) -> Any:
        h, *leak = ctx.saved_tensors
        call: _Call = ctx.call
        if g_s is None and g_v is None:
            return (None,) * len(ctx.needs_input_grad)
        w, pull = leak or (None, None)
        neuron = call.with_leak(w)
        grads = single_step_vjp(h, g_s, g_v, neuron, pull)
        g_vs = grads.v if ctx.needs_input_grad[1] else (None, None)
        if w is None:
            return grads.x, *g_vs, None
        return grads.x, *g_vs, None, call.leak_vjp(grads.q, neuron.q, w)[0] if grads.q else None  # type: ignore[arg-type]


# -- how a call is run ---------------------------------------------------------------------------------


class ByFormula(NamedTuple):
    """By the written-out forward and backward: what they take beside the input."""

    call: _Call
    v: Tensor | float
    w: Tensor | None


class ByReplay(NamedTuple):
    """By stock's own forward, run again in the backward, and why."""

    reason: str


class ByStock(NamedTuple):
    """By stock's own forward as it is, and why."""

    reason: str


How = ByFormula | ByReplay | ByStock
_TEXTS = {ByReplay: "generic replay", ByStock: "stock"}
# What ran last in place of the formulas, for reports; nothing of a neuron that runs by them.
_instead: weakref.WeakKeyDictionary[Any, ByReplay | ByStock] = weakref.WeakKeyDictionary()


class Analytic:
    """Mixin in front of one of the three neurons."""

    arithmetic = "stock"
    lean = True

    @property
    def treatment(self) -> str:
        """What the backward does, for reports; of the last call that recorded a gradient."""
        instead = _instead.get(self)
        return "analytic" if instead is None else _TEXTS[type(instead)]

    @property
    def treatment_reason(self) -> str:
        """Why the last call's backward was not the written-out one, for reports."""
        instead = _instead.get(self)
        return "" if instead is None else instead.reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        chosen = how(self, args, kwargs)
        if isinstance(chosen, ByFormula):
            if _instead:
                _instead.pop(self, None)
            return _run(self, args[0], chosen)
        if not tape.may_record():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        _instead[self] = chosen
        run = replayed if isinstance(chosen, ByReplay) else as_stock
        return run(self, Analytic, args, kwargs)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Set the states to their reset values."""
        memories = self.__dict__["_memories"]
        if isinstance(memories, Memories):
            memories.forget()
        super().reset()  # type: ignore[misc]


class Reversible(Analytic, SwappedClass):
    """In front of a subclass that has one of the three neurons' dynamics."""


def how(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> How:
    """How a call of one of the three neurons is run: by the formulas where they are stock's arithmetic.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly.neurons import RevLIFNode, how
        >>> node, x_seq = RevLIFNode(step_mode="m"), torch.rand(4, 3, requires_grad=True)
        >>> type(how(node, (x_seq,), {})).__name__
        'ByFormula'
        >>> how(node, (x_seq.detach(),), {})
        ByStock(reason='neither its input nor anything of its own has a gradient')
    """
    if not tape.runs_eagerly():
        return ByStock("it is traced, or its operations are counted")
    if len(args) != 1 or kwargs:
        found: ByFormula | str = "it is called with more than its input"
    else:
        found = _unusual(module, args[0]) or _by_formula(module, args[0])
    if isinstance(found, ByFormula):
        return found
    if not torch.is_grad_enabled():
        return ByStock("no gradient is recorded")
    if not is_learning(module, args, kwargs):
        return ByStock("neither its input nor anything of its own has a gradient")
    return ByReplay(found)


def _unusual(module: Any, x: Any) -> str | None:
    """What is not covered of an input, or of what the neuron is set to do with it."""
    multi = module._step_mode == "m"
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__} and no plain tensor"
    if x.dim() < 1 + multi or (multi and x.shape[0] == 0):
        return f"its input has no {'time steps' if multi else 'dimensions'}: shape {tuple(x.shape)}"
    if not x.is_floating_point() or x.layout is not torch.strided:
        return f"its input is {x.dtype}, {x.layout}"
    if len(module._memories) != 1:
        return f"it has states beside v: {', '.join(module._memories)}"
    if module.store_v_seq and not multi:
        return "store_v_seq is on, and it takes one step at a time"
    return None


def _by_formula(module: Any, x: Tensor) -> ByFormula | str:
    shape = x.shape[1:] if module._step_mode == "m" else x.shape
    v = module._memories.get("v")
    if isinstance(v, Tensor):
        if v.shape != shape:
            v = module.v_reset if module.v_reset is not None else 0.0
        elif v.dtype != x.dtype or v.device != x.device:
            v = v.to(dtype=x.dtype, device=x.device)
    elif not isinstance(v, float):
        return f"its membrane is a {type(v).__name__}"
    kind = dynamics_of(type(module))
    w = module.w if kind is neuron.ParametricLIFNode else None
    if torch.is_grad_enabled() and not (
        x.requires_grad
        or (isinstance(v, Tensor) and v.requires_grad)
        or (isinstance(w, Tensor) and w.requires_grad)
    ):
        return "what learns in it is neither its input nor its state"
    call = _call(module, kind, shape, x, w)
    return call if isinstance(call, str) else ByFormula(call, v, w)


def _run(module: Any, x: Tensor, chosen: ByFormula) -> Tensor:
    call, start, w = chosen
    v: Any = start
    again = v if isinstance(v, Tensor) else None
    ws: tuple[Tensor, ...] = ()
    final = None
    if module._step_mode != "m":
        ws = () if w is None else (w,)
        s, v = _SingleStep.apply(x, v, again, call, *ws)
        v_seq = None
    else:
        ws = () if w is None else (w,) * (1 if call.fused else x.shape[0])
        promises = torch.is_grad_enabled() and tape.may_promise()
        if promises and not isinstance(v, Tensor) and not call.store_v_seq:
            final = FinalMembrane(partial(_final_membrane, call, v), *map(tape.handle_of, (x, *ws[:1])))
        s, *states = _MultiStep.apply(x, v, again, call, final, *ws)
        v_seq = states[-1] if call.store_v_seq else None
        v = states[0]
        if v_seq is not None:
            tape.mark_opaque(v_seq)
            if call.fused:
                v = v_seq[-1].clone()
        module.v_seq = v_seq
    if call.neuron.surrogate.spikes:
        tape.mark_spikes(s)
    else:
        tape.mark_opaque(s)
    if final is not None:
        final.promise(v)
        v = final
        if not isinstance(module._memories, Memories):
            module.__dict__["_memories"] = Memories(module._memories)
    elif v_seq is None or not call.fused:
        tape.mark_opaque(v)
    module._memories["v"] = v
    return s


def _call(module: Any, kind: type | None, shape: torch.Size, x: Tensor, w: Tensor | None) -> _Call | str:
    """What the formulas need of a neuron, or why they are not stock's arithmetic as it is set."""
    rule = _rule(module, kind, x, w)
    if isinstance(rule, str):
        return rule
    function = module.surrogate_function
    known = fused(function) if x.dtype is torch.float32 else None
    if w is not None and w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        known = None
    if not _runs_torch(kind, x.device, known is not None):  # type: ignore[arg-type]
        return f"stock runs a kernel of its own on {x.device.type}"
    name = None if known is None else known.name.rpartition(".")[2]  # type: ignore[union-attr]
    if not _agrees(kind, rule.decay_input, rule.v_reset is None, rule.detach_reset, name):  # type: ignore[arg-type]
        return "the installed SpikingJelly computes it in another order"
    is_fused = known is not None
    if known is None:
        chunk = min(shape.numel(), chunk_size(x.device))
        known = proved(function, shape, x.dtype, x.device, chunk)
    if known is None:
        return f"its surrogate {type(function).__name__} is not known to work element by element"
    return _Call(Neuron(rule, known), is_fused, bool(module.store_v_seq))


def _rule(module: Any, kind: type | None, x: Tensor, w: Tensor | None) -> Rule | str:
    tau, decay_input = None, False
    if kind is neuron.LIFNode:
        tau, decay_input = module.tau, bool(module.decay_input)
        if not isinstance(tau, float):
            return f"its tau is a {type(tau).__name__}"
    elif kind is neuron.ParametricLIFNode:
        decay_input = bool(module.decay_input)
        if not isinstance(w, Tensor) or w.dim() or w.device != x.device:
            return "its w is not one number on the input's device"
    elif kind is not neuron.IFNode:
        return "its dynamics are its own"
    v_threshold, v_reset = module.v_threshold, module.v_reset
    if not isinstance(v_threshold, float):
        return f"its v_threshold is a {type(v_threshold).__name__}"
    if not (v_reset is None or isinstance(v_reset, float)):
        return f"its v_reset is a {type(v_reset).__name__}"
    if module._neuron_precision is not None:
        return "it has a precision of its own"
    return Rule(tau, decay_input, v_threshold, v_reset, bool(module.detach_reset))


def _runs_torch(kind: type, device: torch.device, fused: bool) -> bool:
    """Whether stock runs torch code here, rather than a kernel or an error message."""
    if device.type == "cpu":
        return True
    choice = os.environ.get(f"SJ_{ROWS[kind].equations}_CUDA_IMPLEMENTATION", "auto")
    return device.type == "cuda" and not fused and choice == "auto"


@functools.cache
def _agrees(kind: type, decay_input: bool, soft: bool, detach_reset: bool, name: str | None) -> bool:
    """Whether the installed SpikingJelly computes what is written out here; tried once for each case.

    Another version may do its arithmetic in another order; then stock's own code is replayed. ``name``: of
    the surrogate, in a fused operator; None: the surrogate is called as it is.
    """
    tau = 1.7 if kind is neuron.LIFNode else None
    rule = Rule(tau, decay_input, 0.9, None if soft else -0.3, detach_reset)
    function = getattr(surrogate, name or "ATan")(alpha=1.3)
    dtype = torch.float64 if name is None else torch.float32

    def sample() -> tuple[Tensor, Tensor, OutputGradients, Tensor]:
        grid = torch.arange(60, dtype=dtype, device="cpu")
        x_seq, w = (
            torch.sin(grid).mul_(3).view(3, 20),
            torch.full((), 0.4, device="cpu", dtype=torch.float32),
        )
        grads = OutputGradients(torch.cos(grid).view(3, 20), torch.sin(grid[:20] + 1))
        return x_seq, torch.cos(grid[:20] * 2), grads, w

    def stocks() -> Sequence[Tensor]:
        x_seq, v, grads, w = sample()
        x_seq.requires_grad_()
        options = (rule.v_threshold, rule.v_reset, function, detach_reset)
        if kind is neuron.IFNode:
            s, v_last, _ = functional.if_multi_step(x_seq, v, *options)
        elif kind is neuron.LIFNode:
            s, v_last, _ = functional.lif_multi_step(x_seq, v, tau, decay_input, *options)
        else:
            s, v_last, _ = functional.plif_multi_step(x_seq, v, w, decay_input, *options)
        return s, v_last, *torch.autograd.grad((s, v_last), x_seq, grads[:2])

    def ours() -> Sequence[Tensor]:
        x_seq, v, grads, w = sample()
        known = Surrogate(by_autograd(function)) if name is None else fused(function)
        assert known is not None
        own = Neuron(rule, known, w.sigmoid() if kind is neuron.ParametricLIFNode else None)
        with torch.no_grad():
            s, v_last, _ = multi_step(x_seq, v, own)
            g_x = multi_step_vjp(x_seq, v, grads, own).x
        assert g_x is not None
        return s, v_last, g_x

    return agree(ours, stocks)


class RevIFNode(Analytic, neuron.IFNode):
    """Integrate-and-fire neuron that keeps its input current, or nothing under a tape, for the backward.

    Stands in for ``spikingjelly.activation_based.neuron.IFNode``: same signature, same outputs, states
    and gradients bit for bit, in both step modes. The equations (SpikingJelly, eqs. 2-4)::

        h[t] = v[t-1] + x[t]
        s[t] = h[t] >= v_threshold
        v[t] = h[t] - v_threshold * s[t]                  soft reset (v_reset=None)
        v[t] = v_reset * s[t] + (1 - s[t]) * h[t]         hard reset

    Args:
        v_threshold: firing threshold, in the unit of the input. Default 1.0.
        v_reset: membrane after a spike, or None for the soft reset. Default 0.0.
        surrogate_function: firing function with a surrogate gradient. Default ``Sigmoid()``.
        detach_reset: cut the gradient through the reset. Default False.
        step_mode: ``"s"`` takes x [N, ...], ``"m"`` takes x_seq [T, N, ...]. Default ``"s"``.
        store_v_seq: keep the membranes of all steps in ``v_seq`` [T, N, ...]. Default False.

    Raises:
        AssertionError: ``v_threshold`` or ``v_reset`` is no float (as in stock).

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevIFNode
        >>> node = RevIFNode(step_mode="m")
        >>> x_seq = torch.full((3, 1), 0.6, requires_grad=True)
        >>> node(x_seq).flatten().tolist()
        [0.0, 1.0, 0.0]
    """


class RevLIFNode(Analytic, neuron.LIFNode):
    """Leaky integrate-and-fire neuron; see :class:`RevIFNode`.

    Stands in for ``spikingjelly.activation_based.neuron.LIFNode``. With v_rest = v_reset, or 0 for the
    soft reset, it charges to::

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_rest)) / tau          decay_input=True
        h[t] = v[t-1] - (v[t-1] - v_rest) / tau + x[t]            decay_input=False

    Args:
        tau: membrane time constant, in time steps; above 1. Default 2.0.
        decay_input: whether the input is divided by tau too. Default True.
        v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: as in
            :class:`RevIFNode`.

    Raises:
        AssertionError: ``tau`` is no float above 1, and as in :class:`RevIFNode`.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevLIFNode
        >>> node = RevLIFNode(tau=2.0, detach_reset=True, step_mode="m")
        >>> x_seq = torch.full((3, 1), 1.5, requires_grad=True)
        >>> node(x_seq).flatten().tolist()
        [0.0, 1.0, 0.0]
    """


class RevParametricLIFNode(Analytic, neuron.ParametricLIFNode):
    """Leaky integrate-and-fire neuron that learns its time constant; see :class:`RevIFNode`.

    Stands in for ``spikingjelly.activation_based.neuron.ParametricLIFNode`` (Fang et al., ICCV 2021):
    1 / tau is ``sigmoid(w)``, one learnable scalar ``w`` for the layer.

    Args:
        init_tau: tau at the start, in time steps; above 1. Default 2.0.
        decay_input, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, store_v_seq: as
            in :class:`RevLIFNode`.

    Raises:
        AssertionError: ``init_tau`` is no float above 1, and as in :class:`RevIFNode`.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevParametricLIFNode
        >>> node = RevParametricLIFNode(step_mode="m")
        >>> node(torch.full((3, 1), 1.5, requires_grad=True)).sum().backward()
        >>> node.w.grad is not None
        True
    """
