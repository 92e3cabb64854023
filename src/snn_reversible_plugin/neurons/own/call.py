"""A neuron that a user wrote, run by its recorded operations where those are proved to be all it does.

The one idea: the module stays what it is, and each call asks whether there is a proof for it as it is now:
its code reads what it read (:mod:`.reads`), and its operations are recorded for this shape (:mod:`.graph`).
Then only the input current is saved, which the tape rebuilds from spikes, and the operations run a few rows
of the batch at a time. Else its forward runs as ever, and the tape records it.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.kinds import framework_of, is_spiking
from snn_reversible_plugin.modules.registry import StaysStock, reversible_type
from snn_reversible_plugin.modules.swap import SwappedClass, swapped_class
from snn_reversible_plugin.neurons.own.code import Unprovable
from snn_reversible_plugin.neurons.own.graph import Function, Kind, Programs, Recording, name_of
from snn_reversible_plugin.neurons.own.reads import Reads, behind
from snn_reversible_plugin.neurons.own.rows import Rows, along
from snn_reversible_plugin.neurons.rerun import differentiable_once, shadow
from snn_reversible_plugin.ops.autocast import Autocast
from snn_reversible_plugin.ops.chunks import chunk_size
from snn_reversible_plugin.tape.sliced.rows import Part

AT_ONCE = 32_768  # neurons on a CPU: with all that a step's backward needs, what its caches hold
MOST_WHOLE = 8192  # neurons that are not cut: beyond, the tape needs less at a time
MOST_SHARED = 64  # proofs
MOST_MODULES = 1024  # whose proofs are at hand: beyond, all are asked again
MOST_KINDS = 16  # of inputs that a neuron gets: beyond, they are all different


class Proof:
    """That a module's calls with inputs of one kind are a recording, and what runs it.

    Raises:
        Unprovable: they are not.
    """

    def __init__(self, function: Function, kind: Kind) -> None:
        self.function, self.kind = function, kind
        autocast = Autocast()
        whole = Recording(function, kind, autocast)
        self.out, self.grad = whole.out, whole.grad
        self.dim = self.out_dim = 0
        self._rows: Rows | None = None
        neurons = math.prod(kind.shape) // max(_steps(kind, whole), 1)
        at_once = AT_ONCE if kind.device.type == "cpu" else chunk_size(kind.device)
        pieces = max(-(-neurons // at_once), min(4, neurons // 2048))
        if pieces > 1 and whole.uniform:
            self._rows = Rows(function, whole, autocast)
            self.dim, self.out_dim = self._rows.dim, self._rows.out_dim
            self.count = self._rows.count
            self.size = max(self.count // pieces, 1)
        elif neurons > MOST_WHOLE:
            raise Unprovable("the last bits of its surrogate hang on where in memory an element lies")
        else:
            self.count = self.size = 1
            self._programs = whole.programs()

    def parts(self, among: slice | None = None) -> Iterator[tuple[Programs, slice]]:
        """What to run, and on which rows, of all or some."""
        if self._rows is None:
            yield self._programs, slice(None)
            return
        first, end = (0, self.count) if among is None else (among.start, among.stop)
        for start in range(first, end, self.size):
            rows = slice(start, min(start + self.size, end))
            yield self._rows.programs(rows.stop - rows.start), rows

    def way(self) -> tuple[int, int] | None:
        """How an input has to be cut to be given a few rows at a time; None: it can't be."""
        if self._rows is None or self.dim > 1 or self.kind != self.grad:
            return None
        return (self.kind.shape[0], self.count) if self.dim else (1, self.count)


def _steps(kind: Kind, whole: Recording) -> int:
    walks = [node for node in whole.nodes[0].users if name_of(node) in ("select", "unbind")]
    return max((kind.shape[along(node)] for node in walks), default=1)


class _Sequence(torch.autograd.Function):
    """``proof.function(x)``, with x saved and nothing else."""

    takes_slices = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, proof: Proof | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.proof, ctx.in_slices = proof, tape.mode_inside("") == "minimal"
        ctx.save_for_backward(x)
        with tape.paused():
            if proof is None:
                return x.clone()
            out = _empty(proof.out)
            for programs, rows in proof.parts():
                part = _cut(x, proof.dim, rows)
                _cut(out, proof.out_dim, rows).copy_(programs.forward(part, part))
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor | None) -> Any:
        if g is None:
            return None, None
        (x,) = ctx.saved_tensors
        proof: Proof | None = ctx.proof
        cut = tape.cut_of(x)
        if ctx.in_slices and proof is not None:
            tape.try_out(_Sequence, _tried)
        asks = ctx.in_slices or proof is None
        overwrites = asks and tape.is_alone(_Sequence, tape.references(g))
        if proof is None:
            return g, None
        overwrites = overwrites and proof.dim == proof.out_dim and proof.grad == Kind.of(g)
        owned = tape.owns(x) if cut is None else not cut.stands()
        if cut is not None:
            try:
                if g.is_contiguous() and (way := proof.way()) in cut.exact:
                    g_x = g if overwrites else _empty(proof.grad)
                    _in_slices(proof, cut, cut.parts(way), g, g_x)
                    return g_x, None
                x = cut.whole()
            finally:
                cut.release()
        if not g.is_contiguous():
            return _by_autograd(proof, x, g), None
        owned = owned and proof.kind == proof.grad == Kind.of(x)
        # What is saved is part of the forward's graph, and a gradient must not be.
        x = x.detach()
        g_x = x if owned else g if overwrites else _empty(proof.grad)
        with tape.paused():
            for programs, rows in proof.parts():
                found = programs.backward(_cut(x, proof.dim, rows), _cut(g, proof.out_dim, rows))
                _cut(g_x, proof.dim, rows).copy_(found)
        return g_x, None


def _in_slices(proof: Proof, cut: tape.Cut, parts: list[Part], g: Tensor, g_x: Tensor) -> None:
    """Write the gradient of an input that is rebuilt some rows at a time into ``g_x``, or over ``g``."""
    with tape.paused():
        for part in parts:
            rows = slice(part.start, part.stop)
            of_rows, target = _cut(g, proof.out_dim, rows), _cut(g_x, proof.dim, rows)
            if g_x is g:
                of_rows = of_rows.clone()
            # The input stands where its gradient will, laid out as it was recorded.
            target.copy_(cut.rows(part).reshape(target.shape))
            for programs, some in proof.parts(rows):
                among = slice(some.start - rows.start, some.stop - rows.start)
                found = programs.backward(
                    _cut(target, proof.dim, among), _cut(of_rows, proof.out_dim, among)
                )
                _cut(target, proof.dim, among).copy_(found)


def _tried(x: Tensor) -> Tensor:
    """A sequence whose backward is asked how a gradient comes to it."""
    return _Sequence.apply(x, None)  # type: ignore[no-any-return]


def _by_autograd(proof: Proof, x: Tensor, g: Tensor) -> Tensor:
    """Where stock's gradient is laid out after one that is not contiguous."""
    x = x.detach().requires_grad_()
    with tape.paused(), torch.enable_grad():
        y = proof.function(x)
    return torch.autograd.grad(y, x, g)[0]


def _empty(kind: Kind) -> Tensor:
    return torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=kind.device)


def _cut(x: Tensor, dim: int, rows: slice) -> Tensor:
    return x if rows == slice(None) else x.narrow(dim, rows.start, rows.stop - rows.start)


# -- the module --------------------------------------------------------------------------------------


class _Proofs:
    """What is proved of one module."""

    def __init__(self, module: nn.Module, reads: Reads) -> None:
        self.reads = reads
        # The module as it was: what runs in its place must not change with it.
        self.twin = shadow(module)
        self.of: dict[Any, Proof | Unprovable] = {}


_known: weakref.WeakKeyDictionary[nn.Module, _Proofs] = weakref.WeakKeyDictionary()
_last: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


class Proved(SwappedClass):
    """In front of a user's class: its recorded operations stand in for its forward, where proved."""

    arithmetic = "stock"

    @property
    def treatment(self) -> str:
        """What the backward of the last call does, for reports."""
        return why_taped(self) or "proved: its recorded operations, a few rows at a time"  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock = super().forward  # type: ignore[misc]
        if len(args) != 1 or kwargs or type(args[0]) is not Tensor or not tape.is_recording():
            return stock(*args, **kwargs)
        (x,) = args
        if not x.requires_grad or x.layout is not torch.strided or x.numel() == 0:
            return stock(x)
        if torch._C._len_torch_function_stack():  # a mode of somebody's changes what runs
            return stock(x)
        found = _proof(self, x)  # type: ignore[arg-type]
        _last[self] = str(found) if isinstance(found, Unprovable) else ""  # type: ignore[index]
        if isinstance(found, Unprovable):
            return stock(x)
        out: Tensor = _Sequence.apply(x, found)
        tape.mark_spikes(out)
        return out


def why_taped(module: nn.Module) -> str:
    """Of a module that a user wrote, why the tape records it; empty where it was proved, and of others."""
    unasked = "it was not called with a gradient" if isinstance(module, Proved) else ""
    why = _last.get(module, unasked)
    return f"the tape, for {why}" if why else ""


def _proof(module: nn.Module, x: Tensor) -> Proof | Unprovable:
    proofs = _known.get(module)
    if proofs is None or not proofs.reads.hold():
        try:
            proofs = _Proofs(module, Reads(module, behind(type(module))))
        except Unprovable as why:
            _known.pop(module, None)
            return Unprovable(str(why))
        if len(_known) >= MOST_MODULES:  # what is looked at leads to the module, which would never go
            _known.clear()
        _known[module] = proofs
    kind = Kind.of(x)
    key = (kind, *Autocast().dtypes.items(), torch.get_default_dtype())
    if key not in proofs.of:
        if len(proofs.of) >= MOST_KINDS:
            return Unprovable("its input is of another shape in every call")
        proofs.of[key] = _proved(proofs, (behind(type(module)), proofs.reads.key, *key), kind)
    return proofs.of[key]


# By all that a proof rests on, for layers that are alike. What is looked at is held, so no id is reused.
_shared: OrderedDict[Any, tuple[_Proofs, Proof | Unprovable]] = OrderedDict()


def _proved(proofs: _Proofs, key: Any, kind: Kind) -> Proof | Unprovable:
    if key not in _shared:
        try:
            found: Proof | Unprovable = Proof(partial(_stock_forward, proofs.twin), kind)
        except Unprovable as why:
            found = Unprovable(str(why))  # without the frames that led here, and all that they hold
        _shared[key] = proofs, found
        while len(_shared) > MOST_SHARED:
            _shared.popitem(last=False)
    return _shared[key][1]


def _stock_forward(twin: nn.Module, x: Tensor) -> Tensor:
    return behind(type(twin)).forward(twin, x)  # type: ignore[no-any-return]


def own_neurons(model: nn.Module, left: set[int]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules of a model whose forwards may be provable, and the class to swap to; ``left``: ids of
    those to leave as they are.

    By their code alone: what their calls do is asked when they are called.
    """
    found: list[tuple[nn.Module, type[nn.Module]]] = []
    inside: set[int] = set()
    for module in model.modules():
        if is_spiking(module):  # whose surrogate it is, is known: it asks what that does
            inside |= {id(inner) for inner in module.modules()}
        if id(module) in left | inside or not _is_candidate(module):
            continue
        try:
            Reads(module, behind(type(module)))
        except Unprovable as why:
            _last[module] = str(why)
            continue
        inside |= {id(inner) for inner in module.modules()}
        found.append((module, swapped_class(Proved, type(module))))
    return found


def _is_candidate(module: nn.Module) -> bool:
    """Whether a user's class takes one thing, and nobody has said what stands in for it."""
    cls = type(module)
    if cls.__module__.startswith(("torch.", "snn_reversible_plugin.")) or framework_of(module) is not None:
        return False
    try:
        if reversible_type(module) is not None:
            return False
        parameters = list(inspect.signature(cls.forward).parameters.values())
    except (StaysStock, TypeError, ValueError):
        return False
    needed = [one for one in parameters if one.default is one.empty]
    return len(needed) == 2 and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in needed)
