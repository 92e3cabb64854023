"""The tape itself: a dispatch mode that records recipes, and a pack hook that hands out handles.

While a tape is on, it notes how each tensor came about (its *recipe*), and gives autograd a small handle
in place of each tensor that autograd saves. The same kernels run on the same values, so outputs and
gradients are stock's bit for bit; only what is stored between forward and backward changes. Working
below autograd makes each saved tensor, also the masks, indices and casts inside composite functions, the
output of some recorded operation.

Source: this package's own. The mechanism of ``torch.utils.checkpoint`` is the nearest relative, but needs
a function to run again; a recipe is one operation, so a loop that the user wrote works too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import NO_DISPATCH, STRIDED, is_plain, storage_key
from snn_reversible_plugin.tape.as_stock import ByStorage, by_reference, follow, is_stocks
from snn_reversible_plugin.tape.by_values import packed_by_values
from snn_reversible_plugin.tape.carried import owe, pay
from snn_reversible_plugin.tape.checked import about_to_write, compared
from snn_reversible_plugin.tape.constants import constant
from snn_reversible_plugin.tape.exposed import leave_alone, look_after
from snn_reversible_plugin.tape.few_bits import few_bits
from snn_reversible_plugin.tape.findings import Observer
from snn_reversible_plugin.tape.handles import Handle, Kept, Passing
from snn_reversible_plugin.tape.mode import Args, Recording
from snn_reversible_plugin.tape.off_stack import OffStack
from snn_reversible_plugin.tape.operators import Kind, Operator, aten, operator_of
from snn_reversible_plugin.tape.origins import (
    OUTSIDE,
    enter,
    is_ended,
    look_up,
    now,
    tidy,
    written,
    written_unseen,
)
from snn_reversible_plugin.tape.outlived import end_histories, is_over, outlive, outlived, pass_on_the_end
from snn_reversible_plugin.tape.outsiders import Outsiders, alias
from snn_reversible_plugin.tape.own_functions import OwnFunctions, enter_unknown, may_be_filled
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.plans import Following
from snn_reversible_plugin.tape.recipes import WORK_LIMIT, Prices, handles_for, tensors_among, view_of
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced.cut import Slices
from snn_reversible_plugin.tape.spans import Span
from snn_reversible_plugin.tape.unseen import checksum
from snn_reversible_plugin.tape.writes import TensorsOfParts


class Tape(Recording):
    """Records recipes, and packs what autograd saves. Made by :class:`recording`.

    Attributes:
        where: the name of the module that runs. Whoever wants names in errors and reports sets it.
        work_limit: how many convolutions and matrix products a rebuild may run; 0: they are kept.
        sizes: takes note of the sizes of what runs, where that is wanted.
        observer: is told of what runs and is saved, where a report wants that.
    """

    def __init__(
        self, mode: str, check: bool, observer: Observer | None, following: Following | None = None
    ) -> None:
        super().__init__()
        self.where: str | None = None
        self.work_limit = WORK_LIMIT[mode]
        self._check = check
        self.observer = observer
        self._following = following
        self.sizes = None if following is None else following.sizes
        self.slices = Slices(self, check) if mode == "minimal" else None
        tidy()
        self._began = now()
        self.latest_writes: list[Any] = []  # in check mode
        self._prices = Prices(self.work_limit)
        self._outsiders = Outsiders()
        self.kept_by_storage: ByStorage = {}
        self._just_kept: list[Kept] = []  # packed since the last operation
        self._last_product: tuple[Replayed, torch.Tensor, int] | None = None
        self._parts = TensorsOfParts(self)
        self._own_functions = OwnFunctions()
        self._refused: str | None = None  # why the last operation has no recipe

    def pack(self, tensor: torch.Tensor, whole: bool = False) -> Handle:
        """The pack hook: a handle for one who will unpack it; ``whole``: and never ask for slices."""
        known = None if self._suspended else look_up(tensor)
        is_state = False
        if isinstance(known, Passing):
            is_state, known = known.is_state, known.leads_to()
        if isinstance(known, Packed) and known.bits is None:
            with OffStack(self):
                known.materialize(tensor)
        caller = sys._getframe().f_back
        if self._own_functions.calls and self._own_functions.keeps(tensor, known, caller):
            known = None
        handle = self.relied_on(tensor, known)
        if isinstance(handle, Kept):
            handle.unpaid = 0.0
            if is_stocks(caller):
                handle = by_reference(handle)
        elif isinstance(handle, Replayed) and handle.carried and not handle.uses:
            pay(handle.carried, tensor.nbytes)
        if handle.counts:
            handle.need()
        if torch._C._current_graph_task_id() != self._graph_task:
            return handle  # what a backward saves for one of its own
        if self.sizes is not None:
            self.sizes.packed(handle)
        if isinstance(handle, Kept):
            self._just_kept.append(handle)
        if self._check:
            compared(self, [(handle, tensor)])
        if self.observer is not None and not handle.where:
            handle.where = self.where
        if is_state and is_stocks(caller):
            handle = follow(self.kept_by_storage, handle, tensor)
        elif self.slices is not None:
            handle = self.slices.cut(handle, tensor, whole)
        if self.observer is not None:
            self.observer.packed(self.where, tensor, handle)
        return handle

    def handle_of(self, tensor: torch.Tensor) -> Handle:
        """A handle for one who may look at it, or not."""
        return self.relied_on(tensor, look_up(tensor))

    def keep(self, tensor: torch.Tensor) -> Kept:
        """A handle that keeps a tensor's value by reference, for somebody who is no node of the graph."""
        kept = Kept(alias(tensor))
        kept.anchored = True
        self._remember(kept)
        return kept

    def paused(self) -> OffStack:
        """Inside, nothing is recorded: a neuron computes. What comes before it isn't the end of a block."""
        self._last_product = None
        return OffStack(self)

    def finish(self, of_loops: set[int], unpack: Any) -> None:
        """Forget what only a forward needs.

        ``of_loops``: the storages of states that loops left in the user's hands. ``unpack``: the hook,
        which lives as long as anything that autograd saved.
        """
        self._outsiders.clear()
        self._just_kept.clear()
        self.latest_writes.clear()
        if not self.in_backward:
            look_after(self.kept_by_storage, of_loops)
        outlive(self.kept_by_storage)
        is_over(unpack, self._began)
        self.kept_by_storage.clear()
        self._parts.clear()
        if self._last_product is not None:  # of a block that is rebuilt; see recipes, note 9
            recipe, value, version = self._last_product
            self._last_product = None
            if recipe.needs and value._version == version:
                recipe.cache = value

    def record(
        self,
        func: Any,
        operator: Operator,
        args: Args,
        kwargs: dict[str, Any],
        out: Any,
        operands: list[torch.Tensor] | None = None,
    ) -> None:
        """Write down that ``out`` is ``func(*args, **kwargs)``, and how ``func`` is to be treated.

        ``operands``: the tensors among the arguments, if they are at hand.
        """
        if operands is None:
            operands = tensors_among(args, kwargs)
        base = args[0] if operator.kind is Kind.VIEW else None
        if isinstance(out, torch.Tensor):
            if out.dtype is torch.bool and base is None:
                return enter(out, Packed())
            span, recipe = few_bits(operator, args, kwargs) if operator.bounded else (None, None)
            if recipe is None and base is not None:
                recipe = self._parts.read(func, args, kwargs, out)
                if recipe is None and len(operands) == 1 and not kwargs:
                    recipe = view_of(func, args, out, look_up(base), self.work_limit)
            if recipe is None:
                recipe = self._recipe(func, operator, args, kwargs, operands, [out])
                if func is aten.cat.default and recipe is not None:
                    self._parts.put_together(args, recipe)
            self._enter(out, recipe, base, span)
            if recipe is None:
                pass_on_the_end(operands, out, base)
            if operator.work and isinstance(recipe, Replayed) and self.in_backward and self.slices is None:
                self._last_product = recipe, alias(out), out._version
            return
        if not isinstance(out, (tuple, list)):
            return  # a number that the user reads off
        outputs = [tensor for tensor in out if isinstance(tensor, torch.Tensor)]
        recipe = self._recipe(func, operator, args, kwargs, operands, outputs) if outputs else None
        siblings: list[weakref.ref[Replayed]] = []
        for index, tensor in enumerate(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            part = self._parts.read(func, args, kwargs, tensor, index) if base is not None else None
            if part is not None:
                self._enter(tensor, part, base)
            elif recipe is None or (index and operator.kind is Kind.NORM):
                enter(tensor, None, base)
            else:
                self._enter(tensor, one := recipe.output(index, siblings), base)
                if self.slices is not None and operator.kind is Kind.NORM:
                    self.slices.normalized(one, args[0], out)

    def before_write(self, tensor: torch.Tensor, spared: Sequence[Kept] = ()) -> None:
        """Save what would be lost: something is about to write into a tensor, with ``spared`` in mind."""
        handle = look_up(tensor)
        if isinstance(handle, Packed):
            handle.materialize(tensor)
        if not is_plain(tensor):
            return
        storage = storage_key(tensor)
        for ref in (*self.kept_by_storage.pop(storage, ()), *outlived(storage)):
            kept = ref()
            if kept is not None and kept.anchored:
                kept.spill(any(kept is one for one in spared))

    def run(self, func: Any, types: Any, args: Args, kwargs: dict[str, Any]) -> Any:
        if self.slices is not None and self.slices.between.holds_bits:
            self.slices.between.before(func, args, kwargs, bool(types) or func in self._rules)
        just_kept = self._just_kept
        if just_kept:
            self._just_kept = []
        if self._rules and not (types or self._suspended):
            rule = self._rules.get(func)
            out = None if rule is None else rule(self, func, args, kwargs)
            if out is not None:
                return out
        operator, self._refused = operator_of(func), None
        kind = operator.kind
        if kind is Kind.MUTATING:
            # What an operation fills beside its result (the noise of rrelu), autograd saved a moment ago,
            # for the value that it will have.
            spared = () if operator.inplace else just_kept
            return self._run_mutating(func, operator, types, args, kwargs, spared)
        slices = None if types else self.slices
        out = func(*args, **kwargs) if slices is None else slices.run(func, operator, args, kwargs)
        counts = kind is Kind.NORM and args[5]  # its running statistics
        if counts:
            leave_alone(just_kept, args[3:5])
        if operator.work and not torch.is_grad_enabled():
            self._own_functions.product()
        elif self._own_functions.calls and torch.is_grad_enabled():
            self._own_functions.over()
        if kind is Kind.VIEW and look_up(args[0]) is OUTSIDE:
            return out
        operands = tensors_among(args, kwargs)
        if operator.work and self.slices is not None:
            self.slices.room.product(operands, out)
        end_histories(func, operands, self._began)
        unknown = kind is Kind.OPAQUE or may_be_filled(operator, operands, self._began)
        if types or self._suspended or unknown:
            enter_unknown(operator, args, out)
        elif operator.constant:
            self._enter(out, constant(func, args, out))
        elif counts:
            self.record(func, operator, (*args[:3], None, None, *args[5:]), kwargs, out)
        else:
            self.record(func, operator, args, kwargs, out, operands)
        if (following := self._following) is not None:  # with no sizes, where it has found a plan to follow
            self._following, self.sizes = following.computed(operator, args, out), following.sizes
        if self.observer is not None:
            self.observer.computed(self.where, operator, out, self._refused)
        return out

    def _run_mutating(
        self, func: Any, operator: Operator, types: Any, args: Args, kwargs: Any, spared: Sequence[Kept]
    ) -> Any:
        mutated = tensors_among(
            kwargs.get(at) if isinstance(at, str) else args[at] if at < len(args) else None
            for at in operator.mutated
        )
        recipe: Handle | None = None
        root = after = parts = span = None
        if operator.inplace and not (types or self._suspended) and isinstance(args[0], torch.Tensor):
            root = args[0]._base
            if root is None:
                span, recipe = few_bits(operator, args, kwargs)
            else:
                recipe, after, parts = self._parts.write(root, func, operator, args, kwargs)
            before = look_up(args[0]) if recipe is None else None
            if isinstance(before, Handle) and not (isinstance(before, Kept) and not before.anchored):
                operands = tensors_among(args, kwargs)
                recipe = self._recipe(func, operator, args, kwargs, operands, [args[0]])
            if root is not None and parts is not None:
                parts.wrote(args[0], root, recipe)
        if self._check:
            about_to_write(self, mutated)
        for tensor in mutated:
            self.before_write(tensor, spared)
            written_unseen(tensor)  # an interrupt may come between the write and what is noted of it
        out = func(*args, **kwargs)
        if root is not None and after is not None:
            self._enter(root, after)
        for tensor in mutated:
            if recipe is not None:
                self._enter(tensor, recipe, None, span)
            elif operator.binary or tensor.dtype is torch.bool:
                enter(tensor, Packed())
            elif look_up(tensor) is not OUTSIDE:
                enter(tensor, None)
            written(tensor, root if after is not None else None)
        if (following := self._following) is not None:  # with no sizes, where it has found a plan to follow
            self._following, self.sizes = following.computed(operator, args, out), following.sizes
        return out

    def _recipe(
        self,
        func: Any,
        operator: Operator,
        args: Args,
        kwargs: dict[str, Any],
        operands: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> Replayed | None:
        """The recipe of an operation, or None where keeping its output is cheaper."""
        cost = self._prices.of(operator, operands, outputs)
        if isinstance(cost, str):
            self._refused = cost
            return None
        known = self.operands(operands, cost.known)
        positional, by_name = handles_for(args, known), kwargs
        if kwargs:
            by_name = dict(zip(kwargs, handles_for(kwargs.values(), known), strict=True))
        if self._check and operator.kind is not Kind.VIEW:
            compared(self, [(known[id(one)], one) for one in operands])
        options = cost.products, cost.depth, operator.inplace, cost.cheap, cost.series
        recipe = Replayed(func, positional, by_name, *options)
        recipe.carried = (
            owe([known[id(one)] for one in cost.free], cost.carried) if cost.free else cost.carried
        )
        return recipe

    def operands(self, tensors: Iterable[torch.Tensor], known: dict[int, Any]) -> dict[int, Handle]:
        """The handles to store for operands, by id, given what :func:`known_of` said of them."""
        for tensor in tensors:
            known[id(tensor)] = self.relied_on(tensor, known[id(tensor)], looked_at=True)
        return known

    def relied_on(self, tensor: torch.Tensor, handle: Any, *, looked_at: bool = False) -> Handle:
        """The handle to store, for a tensor of which :func:`look_up` said this, or else its values did."""
        if isinstance(handle, Replayed):
            return handle
        if isinstance(handle, Passing):
            handle = handle.leads_to()
        if handle is None and not (looked_at or self._suspended):
            handle = packed_by_values(tensor)
        if isinstance(handle, Packed):
            handle.materialize(tensor)
        elif handle is OUTSIDE:
            handle = self._outsiders.known(tensor)
            if handle is None:
                handle = self._outsiders.keep(tensor)
                self._remember(handle)
        elif handle is None:
            handle = Kept(alias(tensor))
            handle.ended = is_ended(tensor)
            enter(tensor, handle)
            self._remember(handle)
        if isinstance(handle, Kept):
            handle.anchored = True
        return handle  # type: ignore[no-any-return]

    def _remember(self, kept: Kept) -> None:
        if self.where is not None:
            kept.where = self.where
        tensor = kept.tensor
        if tensor.layout is STRIDED and type(tensor).__torch_dispatch__ is NO_DISPATCH:
            storage = tensor.untyped_storage()._cdata
            self.kept_by_storage.setdefault(storage, []).append(weakref.ref(kept))

    def _enter(
        self,
        out: torch.Tensor,
        recipe: Handle | None,
        base: torch.Tensor | None = None,
        span: Span | None = None,
    ) -> None:
        """Write down a tensor's recipe; None: it has none."""
        if (self._check or self.observer is not None) and recipe is not None:
            recipe.where = self.where
            if self._check:
                recipe.checksum = checksum(out)
        if self.slices is not None:
            self.slices.computed(recipe, out)
        enter(out, recipe, base, span)
