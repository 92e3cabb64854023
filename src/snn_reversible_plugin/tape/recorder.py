"""The tape itself: a dispatch mode that records recipes, and a pack hook that hands out handles.

While a tape is on, it notes how each tensor came about (its *recipe*), and gives autograd a small handle
in place of each tensor that autograd saves. The same kernels run on the same values, so outputs and
gradients are stock's bit for bit; only what is stored between forward and backward changes. Working
below autograd makes each saved tensor, also the masks, indices and casts inside composite functions, the
output of some recorded operation.

Source: design section 1. The mechanism of ``torch.utils.checkpoint`` is the nearest relative, but needs
a function to run again; a recipe is one operation, so a loop that the user wrote works too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode,
    _push_mode,
)

from snn_reversible_plugin.tape.handles import Handle, Kept, Packed, Passing, Replayed, checksum
from snn_reversible_plugin.tape.operators import Kind, Plan, aten, plan_of
from snn_reversible_plugin.tape.origins import (
    OUTSIDE,
    enter,
    forget_writes,
    is_plain,
    look_up,
    storage_key,
    written,
)

# NOTE [What gets a recipe]
#
# 1. Only what an aten operation computed from tensors alone (`operators`). All else is kept.
# 2. A truth value is one bit by construction: the outputs of comparisons, `bernoulli_`, and the spikes
#    that a neuron of ours vouches for. That is the only way to be packed.
# 3. A recipe may not cost more memory than it saves: the tensors that it would newly hold must not be
#    larger than its output, and a small output of a large input is kept.
# 4. A recipe may not cost more time than allowed: `work`, the convolutions and matrix products down to
#    something stored, is bounded by the mode, so a long chain gets an anchor now and then by itself.
# 5. A recipe describes a value; the entry that leads to it describes a tensor *at a version*. An
#    in-place operation voids the entry, and the new value's recipe starts from the old value's handle.
# 6. What a recipe holds by reference is copied when an operation is about to write to it: stock
#    autograd may never have saved it, so it would not have minded. Writes that the tape can't see
#    (an optimizer's, after the forward) are found by the version and refused, as autograd does.
# 7. A tensor without an entry came from outside: a parameter, an input, a state of an earlier call.
#    Somebody else holds it anyway, so it costs nothing.
# 8. Batch norm replays on batch statistics with no running statistics at all: the kernels compute the
#    same output, and nothing is updated twice.
# 9. In a block that is rebuilt, the backward follows at once and begins where the block ends. So the last
#    output of a convolution or matrix product, which it asks for first, waits and isn't computed again.

MAX_DEPTH = 64
WORK_LIMIT = {"memory": 2, "speed": 0}
_NO_KWARGS: dict[str, Any] = {}
SMALL_OUTPUT = 16  # an output this many times smaller than the largest activation it is made of is kept

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], torch.Tensor | None]
"""Runs an operator, given it and its arguments, in place of the tape; None: it is one like any other."""


class Observer(Protocol):
    """Is told of every tensor that autograd saves under the tape. See ``report``."""

    def packed(self, where: str | None, tensor: torch.Tensor, handle: Handle) -> None: ...


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same storage and version counter, without the tensor's place in the graph."""
    with (
        torch._C._DisableTorchDispatch(),
        torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False),
        torch.no_grad(),
    ):
        return tensor.detach()


def _view_key(tensor: torch.Tensor) -> Any:
    if not is_plain(tensor):
        return id(tensor)
    bits = tensor.is_conj(), tensor.is_neg()
    return storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, bits


def _same(kept: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether what is kept is this leaf, or a view of it that was not copied away since."""
    if tensor.is_leaf or not is_plain(tensor):
        return kept is tensor
    return kept.data_ptr() == tensor.data_ptr()


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            for item in arg:
                if isinstance(item, torch.Tensor):
                    yield item


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Tape(TorchDispatchMode):
    """Records recipes, and packs what autograd saves. Made by :func:`recording`."""

    def __init__(self, mode: str, check: bool, observer: Observer | None) -> None:
        super().__init__()
        self.work_limit = WORK_LIMIT[mode]
        self.check = check
        self.observer = observer
        self.where: str | None = None  # the module that runs, in check mode and under an observer
        forget_writes()
        # A block that is rebuilt records inside a backward; what a backward itself runs is not recorded.
        self.graph_task = torch._C._current_graph_task_id()
        self.overriding: dict[Any, Rule] = {}  # operators that somebody else runs for the time being
        self.suspended = 0
        self.paused = 0
        self._outside: dict[Any, weakref.ref[Kept]] = {}
        self._held: dict[int, list[weakref.ref[Kept]]] = {}
        self._latest_view: tuple[torch.Tensor | None, Kept | None] = None, None
        self.last_product: tuple[Replayed, torch.Tensor, int] | None = None

    # The pack hook.

    def pack(self, tensor: torch.Tensor) -> Handle:
        known = None if self.suspended else look_up(tensor)
        if isinstance(known, Passing):
            known = known.held()
        if isinstance(known, Packed):
            with OffStack(self):
                known.materialize(tensor)
        handle = self._relied_on(tensor, known)
        handle.need()
        if self.check or self.observer is not None:
            self._label(handle, tensor)
            if self.observer is not None:
                self.observer.packed(self.where, tensor, handle)
        return handle

    def _label(self, handle: Handle, tensor: torch.Tensor) -> None:
        if handle.where is None:
            handle.where = self.where
        if self.check and handle.checksum is None and not isinstance(handle, Kept):
            with OffStack(self), torch.no_grad():
                handle.checksum = checksum(tensor)

    def keep(self, tensor: torch.Tensor, known: Any) -> Kept:
        """A handle that holds a tensor; ``known`` is what :func:`look_up` said of it."""
        if known is OUTSIDE:
            # A loop over time takes the same view of a weight at each step: one handle serves them all.
            # Each view is looked up twice, as an operand and for autograd.
            view, kept = self._latest_view
            if view is not tensor:
                key = id(tensor) if tensor.is_leaf else _view_key(tensor)
                earlier = self._outside.get(key)
                kept = earlier() if earlier is not None else None
                if not tensor.is_leaf:
                    self._latest_view = tensor, kept
            if kept is not None and kept.version == tensor._version and _same(kept.tensor, tensor):
                return kept
            self._latest_view = None, None
            # A leaf can be held as it is; another tensor would tie its graph into a cycle.
            kept = Kept(tensor if tensor.is_leaf else _alias(tensor))
            kept.anchored = True
            if kept.version >= 0:
                key = id(tensor) if tensor.is_leaf else _view_key(tensor)
                self._outside[key] = weakref.ref(kept)
        else:
            kept = Kept(_alias(tensor))
            enter(tensor, kept)
        kept.where = self.where
        if is_plain(tensor):
            self._held.setdefault(storage_key(tensor), []).append(weakref.ref(kept))
        return kept

    def finish(self) -> None:
        """Forget what only a forward needs: whatever autograd saved keeps its tape alive."""
        self._outside.clear()
        self._held.clear()
        self._latest_view = None, None
        if self.last_product is not None:  # of a block that is rebuilt; see note 9
            recipe, value, version = self.last_product
            self.last_product = None
            if recipe.needs and value._version == version:
                recipe.cache = value

    def hold(self, tensor: torch.Tensor) -> Kept:
        """Keep a tensor's value by reference, for somebody who is no node of the graph."""
        kept = Kept(_alias(tensor))
        kept.anchored = True
        self._held.setdefault(storage_key(tensor), []).append(weakref.ref(kept))
        return kept

    # The recording mode.

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or torch._C._current_graph_task_id() != self.graph_task:
            return func(*args, **kwargs)
        if self.overriding and not (types or self.suspended):
            rule = self.overriding.get(func)
            out = None if rule is None else rule(func, args, kwargs)
            if out is not None:
                return out
        plan = plan_of(func)
        if plan.kind is Kind.MUTATING:
            return self._run_mutating(func, plan, types, args, kwargs)
        out = func(*args, **kwargs)
        if plan.kind is Kind.VIEW and look_up(args[0]) is OUTSIDE:
            return out
        if types or self.suspended or plan.kind is Kind.OPAQUE:
            self._enter_unknown(plan, out)
        elif plan.constant:
            self._record_constant(func, args, out)
        elif plan.kind is Kind.NORM and args[5]:
            self.record(func, plan, (*args[:3], None, None, *args[5:]), kwargs, out)
        else:
            self.record(func, plan, args, kwargs, out)
        return out

    def _run_mutating(
        self, func: Any, plan: Plan, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        mutated = list(
            _tensors(
                kwargs.get(at) if isinstance(at, str) else args[at] if at < len(args) else None
                for at in plan.mutated
            )
        )
        recipe = None
        if plan.inplace and not (types or self.suspended) and isinstance(args[0], torch.Tensor):
            before = look_up(args[0])
            if isinstance(before, Handle) and not (isinstance(before, Kept) and not before.anchored):
                recipe = self.recipe(func, plan, args, kwargs, [args[0]])
        for tensor in mutated:
            self.before_write(tensor)
        out = func(*args, **kwargs)
        for tensor in mutated:
            if recipe is not None:
                self.enter_recipe(tensor, recipe)
            elif plan.binary or tensor.dtype is torch.bool:
                enter(tensor, Packed())
            elif look_up(tensor) is not OUTSIDE:
                enter(tensor, None)
            written(tensor)
        return out

    def before_write(self, tensor: torch.Tensor) -> None:
        """Save what would be lost: something is about to write into a tensor."""
        handle = look_up(tensor)
        if isinstance(handle, Packed):
            handle.materialize(tensor)
        if not is_plain(tensor):
            return
        for ref in self._held.pop(storage_key(tensor), ()):
            kept = ref()
            if kept is not None and kept.anchored:
                kept.spill()

    def _enter_unknown(self, plan: Plan, out: Any) -> None:
        for tensor in _tensors((out,)):
            bit = plan.binary or tensor.dtype is torch.bool
            enter(tensor, Packed() if bit and plan.kind is not Kind.VIEW else None)

    def _record_constant(self, func: Any, args: tuple[Any, ...], out: torch.Tensor) -> None:
        """A constant needs no example to be made again, only its shape."""
        if not out.is_contiguous():
            enter(out, None)
            return
        value = args[1] if func is aten.full_like.default else int(func is aten.ones_like.default)
        options = {"dtype": out.dtype, "device": out.device}
        recipe = Replayed(aten.full.default, (list(out.shape), value), options, 0, 0)
        self.enter_recipe(out, recipe)

    def record(
        self, func: Any, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        """Write down how ``out`` came about."""
        base = args[0] if plan.kind is Kind.VIEW else None
        if isinstance(out, torch.Tensor):
            if out.dtype is torch.bool and base is None:
                enter(out, Packed())
                return
            recipe = self.recipe(func, plan, args, kwargs, [out])
            self.enter_recipe(out, recipe, base)
            if plan.work and recipe is not None and self.graph_task != -1:
                self.last_product = recipe, _alias(out), out._version
            return
        if not isinstance(out, (tuple, list)):
            return  # a number that the user reads off
        outputs = [tensor for tensor in out if isinstance(tensor, torch.Tensor)]
        recipe = self.recipe(func, plan, args, kwargs, outputs) if outputs else None
        siblings: list[weakref.ref[Replayed]] = []
        for index, tensor in enumerate(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            if recipe is None or (index and plan.kind is Kind.NORM):
                enter(tensor, None, base)
            else:
                self.enter_recipe(tensor, recipe.output(index, siblings), base)

    def recipe(
        self,
        func: Any,
        plan: Plan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[torch.Tensor],
    ) -> Replayed | None:
        """The recipe of an operation, or None where keeping its output is cheaper."""
        view = plan.kind is Kind.VIEW
        work, depth = plan.work, 0
        newly_held = largest = 0
        cheap = plan.cheap
        known: dict[int, Any] = {}
        for tensor in _tensors((*args, *kwargs.values()) if kwargs else args):
            handle = known[id(tensor)] = look_up(tensor)
            if tensor.layout is not torch.strided or (plan.atomic and tensor.is_cuda):
                return None
            if handle is OUTSIDE:
                continue
            largest = max(largest, _bytes(tensor))
            if isinstance(handle, Replayed):
                work += handle.work
                depth = max(depth, handle.depth)
                cheap = cheap and handle.cheap
            elif handle is None or (isinstance(handle, Kept) and not handle.anchored):
                newly_held += tensor.untyped_storage().nbytes()
        size = 0
        for tensor in outputs:
            if tensor.layout is not torch.strided:
                return None
            size = max(size, _bytes(tensor))
        if work > self.work_limit or depth >= MAX_DEPTH or newly_held > size:
            return None
        if not view and size * SMALL_OUTPUT <= largest:
            return None
        return Replayed(
            func,
            tuple([self._operand(arg, known) for arg in args]),
            {name: self._operand(arg, known) for name, arg in kwargs.items()} if kwargs else _NO_KWARGS,
            work,
            depth + 1,
            plan.inplace,
            cheap,
        )

    def handle_of(self, tensor: torch.Tensor) -> Handle:
        """The handle of a tensor that something is going to rely on."""
        return self._relied_on(tensor, look_up(tensor))

    def _relied_on(self, tensor: torch.Tensor, handle: Any) -> Handle:
        if isinstance(handle, Passing):
            handle = handle.held()
        if isinstance(handle, Packed):
            handle.materialize(tensor)
        elif not isinstance(handle, Handle):
            handle = self.keep(tensor, handle)
        if isinstance(handle, Kept):
            handle.anchored = True
        return handle  # type: ignore[no-any-return]

    def _operand(self, arg: Any, known: dict[int, Any]) -> Any:
        if isinstance(arg, torch.Tensor):
            handle = known[id(arg)] = self._relied_on(arg, known[id(arg)])
            return handle
        if isinstance(arg, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in arg):
            return [self._operand(item, known) for item in arg]
        return arg

    def enter_recipe(
        self, out: torch.Tensor, recipe: Replayed | None, base: torch.Tensor | None = None
    ) -> None:
        """Write down a tensor's recipe; None: it has none."""
        if recipe is not None and (self.check or self.observer is not None):
            recipe.where = self.where
            if self.check:
                recipe.checksum = checksum(out)
        enter(out, recipe, base)


class OffStack:
    """Context manager: a tape records nothing inside; None for no tape."""

    __slots__ = ("popped", "tape")

    def __init__(self, tape: Tape | None) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        self.popped = False
        if self.tape is None:
            return
        # Off the stack it costs nothing; below a mode that the user entered it has to stay.
        if _get_current_dispatch_mode() is self.tape:
            _pop_mode()
            self.popped = True
        else:
            self.tape.paused += 1

    def __exit__(self, *exc: object) -> None:
        if self.tape is None:
            return
        if self.popped:
            _push_mode(self.tape)
        else:
            self.tape.paused -= 1
