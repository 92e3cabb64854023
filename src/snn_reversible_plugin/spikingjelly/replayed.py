"""Any stateful neuron of SpikingJelly: stock's own forward, run again in the backward.

The one idea: for a neuron whose arithmetic this package does not know, stock's code is the only
authority, so it is what runs, both times. In chunks where each element is known to go its own way,
which keeps what autograd saves of the second run small; as a black box otherwise. Which are known is
in :mod:`.types`.

Source: the neurons of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.kinds import is_multi_step
from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.neurons.own.reads import behind
from snn_reversible_plugin.neurons.rerun import (
    Rerun,
    differentiable_once,
    shadow,
)
from snn_reversible_plugin.neurons.witness import Witness, alone
from snn_reversible_plugin.ops.autocast import Autocast
from snn_reversible_plugin.ops.chunks import cuts
from snn_reversible_plugin.ops.layouts import is_contiguous_in
from snn_reversible_plugin.ops.outputs import on_its_own
from snn_reversible_plugin.spikingjelly.claims import claim_of
from snn_reversible_plugin.spikingjelly.copies import Copy, InTorch, ServedInTorch, copy_of
from snn_reversible_plugin.spikingjelly.scripted import same_graph
from snn_reversible_plugin.spikingjelly.surrogates import is_heaviside, is_known, is_uniform
from snn_reversible_plugin.spikingjelly.types import replaced_methods, row_of
from snn_reversible_plugin.spikingjelly.written_out import why_not_same


class Replayed(ServedInTorch, SwappedClass):
    """In front of a stock neuron class: its forward is run again in the backward."""

    treatment = "generic replay"
    arithmetic = "stock"

    @property
    def treatment_reason(self) -> str:
        """What is done otherwise than it is set, and why it has no written-out backward, for reports."""
        module: Any = self
        unproved = why_not_same(module) if claim_of(behind(type(module))) else ""
        return "; ".join(filter(None, (self.served_otherwise, unproved)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not tape.may_record():
            with InTorch(self):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        if replaced_methods(self):  # type: ignore[arg-type]
            with InTorch(self):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        learns = is_learning(self, args, kwargs)  # type: ignore[arg-type]
        run = replayed if learns else as_stock
        return run(self, Replayed, args, kwargs)  # type: ignore[arg-type]


def as_stock(module: nn.Module, mixin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward that ``mixin`` stands in front of, as it is: no gradient goes through, or no tape's."""
    with tape.paused(), InTorch(module):
        out = super(mixin, module).forward(*args, **kwargs)
    _mark(module, out, _fires(module))
    return out


def replayed(module: nn.Module, mixin: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward that ``mixin`` stands in front of, with as little kept as can be."""
    if tape.is_left_to_others():
        return as_stock(module, mixin, args, kwargs)

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with InTorch(module):
            return super(mixin, module).forward(*args, **kwargs)

    row, copy = row_of(module), copy_of(type(module))
    if not row.name and not is_multi_step(module) and tape.is_recording() and not _is_scripted(copy):
        # A step of a user's own is a few operations: on the tape each is rebuilt when it is asked for.
        return call(module, *args, **kwargs)
    known = (row.fires or row.graded) and is_known(_surrogate(module))
    if known and not kwargs and len(args) == 1:
        out = _in_chunks(module, args[0])
        if out is not NotImplemented:
            _mark(module, out, _fires(module))
            return out
    again = same_graph(module, call, args) if _is_scripted(copy) else call
    rerun = Rerun(module, again, args, kwargs, careful=not known)
    if known or tape.current() is None:
        out = rerun.run(module, args, kwargs)
        _mark(module, out, _fires(module))
        return out
    with tape.paused(), Witness() as witness:
        out = rerun.run(module, args, kwargs)
    first = out[0] if isinstance(out, (tuple, list)) else out
    _mark(module, out, witness.is_binary(first))
    return out


def _is_scripted(copy: Copy | None) -> bool:
    return copy is not None and copy.is_scripted


def _surrogate(module: nn.Module) -> Any:
    return getattr(module, "surrogate_function", None)


def _fires(module: nn.Module) -> bool:
    """Whether the first output is zeros and ones by construction."""
    return row_of(module).fires and is_heaviside(_surrogate(module))


def _highest_count(module: nn.Module) -> int | None:
    """The highest count of I-LIF's ``round(clamp(v, 0, highest))``, where a few bits hold it."""
    surrogate = _surrogate(module)
    known = type(surrogate).__name__ == "MultiLevelSpikeCount" and is_known(surrogate)
    if not known or row_of(module).name != "ILIFNode" or not surrogate.spiking:
        return None
    highest: int = surrogate.max_spike_count
    return highest if highest <= tape.MOST_COUNTS else None


def is_learning(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient could go through a call: to its input, its states, or what it holds."""
    memories = module.__dict__.get("_memories", {})
    for value in (*args, *kwargs.values(), *memories.values()):
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    # An attribute that learns without being a parameter counts too.
    return any(
        isinstance(value, Tensor) and value.requires_grad and key != "v_seq"
        for inner in module.modules()
        for table in (inner._parameters, inner.__dict__)
        for key, value in table.items()
    )


def _mark(module: nn.Module, out: Any, binary: bool) -> None:
    if tape.current() is None:
        return
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    if binary:
        tape.mark_spikes(outputs.pop(0))
    elif (highest := _highest_count(module)) is not None:
        tape.mark_levels(outputs.pop(0), highest)
    states = (*module.__dict__.get("_memories", {}).values(), module.__dict__.get("v_seq"))
    tape.mark_opaque(*(t for t in (*outputs, *states) if isinstance(t, Tensor)))


# -- in chunks ---------------------------------------------------------------------------------------

Run = Callable[[Tensor, tuple[Any, ...]], tuple[Tensor, ...]]
"""A forward as a function of currents [T, ...] and states: spikes of all steps, and the states after."""


class _Chunked(torch.autograd.Function):
    """``run(x_seq, states) -> outputs`` on one stretch of neurons after the other.

    ``reached``: of each output, whether x_seq reaches it.
    """

    @staticmethod
    def forward(
        ctx: Any, x_seq: Tensor, run: Run, states: Any, parts: list[slice], reached: tuple[bool, ...]
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.states, ctx.parts, ctx.autocast = run, states, parts, Autocast()
        ctx.save_for_backward(x_seq)
        outputs: list[Tensor] = []
        with tape.paused():
            x2 = x_seq.view(x_seq.shape[0], -1)
            for part in parts:
                results = run(_stretch(x2, part), _cut(states, part))
                if not outputs:
                    shapes = (x_seq.shape, *(x_seq.shape[1:] for _ in results[1:]))
                    outputs = [
                        torch.empty(shape, dtype=result.dtype, device=result.device)
                        for shape, result in zip(shapes, results, strict=True)
                    ]
                for index, (output, result) in enumerate(zip(outputs, results, strict=True)):
                    _rows(output, index)[..., part] = result
        if not all(reached):
            ctx.mark_non_differentiable(*(o for o, yes in zip(outputs, reached, strict=True) if not yes))
        return tuple(outputs)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (x_seq,) = ctx.saved_tensors
        owned = tape.owns(x_seq) and x_seq.is_contiguous()
        # What is saved is part of the forward's graph, and a gradient must not be.
        x_seq = x_seq.detach()
        given = [(index, grad) for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return None, None, None, None, None
        # The first output has time steps, whose stride is free.
        plain = [is_contiguous_in(g, range(int(i == 0), g.dim()), zeros=True) for i, g in given]
        if not all(plain):
            # Stock's gradient would be laid out after this one.
            return _vjp(ctx, x_seq, ctx.states, given), None, None, None, None
        g_x = x_seq if owned else torch.empty_like(x_seq)
        x2, g2 = x_seq.view(x_seq.shape[0], -1), g_x.view(x_seq.shape[0], -1)
        rows = [(index, _rows(grad, index)) for index, grad in given]
        for part in ctx.parts:
            cut = [(index, row[..., part]) for index, row in rows]
            g2[:, part] = _vjp(ctx, _stretch(x2, part), _cut(ctx.states, part), cut)
        return g_x, None, None, None, None


def _vjp(ctx: Any, x_seq: Tensor, states: Any, given: list[tuple[int, Tensor]]) -> Tensor:
    x_seq = x_seq.detach().requires_grad_()
    with torch.enable_grad(), ctx.autocast.again():
        results = ctx.run(x_seq, states)
    outputs, grads = [results[index] for index, _ in given], [grad for _, grad in given]
    (g_x,) = torch.autograd.grad(outputs, x_seq, grads)
    return g_x


def _rows(tensor: Tensor, index: int) -> Tensor:
    """[T, n] of the output sequence (index 0), [n] of a state."""
    return tensor.reshape(-1) if index else tensor.reshape(tensor.shape[0], -1)


def _stretch(x2: Tensor, part: slice) -> Tensor:
    # Kernels for a GPU want it contiguous; on a CPU the rows, which are, are taken one by one.
    return x2[:, part].contiguous() if x2.is_cuda else x2[:, part]


def _cut(states: Any, part: slice) -> tuple[Any, ...]:
    return tuple(s.reshape(-1)[part] if isinstance(s, Tensor) else s for s in states)


def _in_chunks(module: Any, x_seq: Any) -> Any:
    """Outputs of a multi-step call in chunks; NotImplemented where that would not be stock's result."""
    row = row_of(module)
    if (
        not row.pointwise
        or not hasattr(module, "functional_forward")  # older releases keep states to themselves
        or module.step_mode != "m"
        or module.store_v_seq
        or type(x_seq) not in (Tensor, nn.Parameter)
        or not x_seq.requires_grad
        or x_seq.dim() < 2
        or x_seq.numel() == 0
        or not is_contiguous_in(x_seq, range(x_seq.dim()))
    ):
        return NotImplemented
    states = tuple(module._memories.values())
    shape, dtype, device = x_seq.shape[1:], x_seq.dtype, x_seq.device
    for state in states:
        fits = (
            not state.requires_grad
            and (state.shape, state.dtype, state.device) == (shape, dtype, device)
            and state.is_contiguous()
            if isinstance(state, Tensor)
            else isinstance(state, float)
        )
        if not fits:
            return NotImplemented
    frozen: Any = shadow(module)
    names = tuple(module._memories)
    function = frozen.surrogate_function

    def run(x_seq: Tensor, states: tuple[Any, ...]) -> tuple[Tensor, ...]:
        (spikes,), updated = frozen.functional_forward((x_seq,), states)
        return (spikes, *updated)

    uniform = is_uniform(function) and not row_of(module).exponential
    parts = cuts(math.prod(shape), device, uniform)
    settings = (
        type(module), len(x_seq), module.v_reset is None, module.detach_reset, type(function),
        getattr(function, "spiking", True), tuple(map(type, states)),
    )  # fmt: skip
    if settings not in _reached:
        _reached[settings] = _outputs_reached(run, x_seq, states)
    if len(_reached[settings]) != 1 + len(states):
        return NotImplemented  # a state that a subclass added: what becomes of it only its forward knows
    spikes, *updated = _Chunked.apply(x_seq, run, states, parts, _reached[settings])
    for name, state in zip(names, updated, strict=True):
        module._memories[name] = on_its_own(state)
    module.v_seq = None
    return spikes


_reached: dict[Any, tuple[bool, ...]] = {}


def _outputs_reached(run: Run, x_seq: Tensor, states: Any) -> tuple[bool, ...]:
    """Which outputs have a gradient in stock; a first spike may depend on another state only."""
    with alone():
        one = x_seq.detach().reshape(len(x_seq), -1)[:, :1].requires_grad_()
        return tuple(output.requires_grad for output in run(one, _cut(states, slice(0, 1))))
