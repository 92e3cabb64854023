"""Recipes: an aten operation and the handles of its inputs, and how a chain of them is computed again.

The one idea: a rebuild first looks what it will run, and how often each value is used in it; then it runs,
in that order, each operation once. So its time is linear in the number of recipes, and no chain is too
deep.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from snn_reversible_plugin.tape.carried import NOTHING, Carried
from snn_reversible_plugin.tape.handles import Handle, labelled, note_ownership, storage_once, watchers
from snn_reversible_plugin.tape.operators import aten

# NOTE [When a rebuilt value is let go]
#
# 1. `uses` of a Replayed handle counts what wants its value in a backward: one for each time autograd
#    packed it, and one for each used handle that has it as an operand (a *claim*). `needs` are those of
#    them that are not served yet in the backward that runs, the *walk*.
# 2. A value is cached only while somebody else still needs it, and let go when the last need is
#    served. So a conv output that a neuron's backward had to rebuild waits for batch norm's backward
#    and no longer, and T slices of one tensor rebuild that tensor once, not T times.
# 3. What is cheap to rebuild, views, casts and copies of something packed or kept, is never cached: spikes
#    are a bit an element when they wait and a float when they are used.
# 4. A handle's claim on its operands ends as soon as its own value stands.
# 5. A value that is rebuilt for its last need, and shares no storage with a cached or kept tensor, is
#    *owned* by the one who asked: a neuron's backward may overwrite it. See `owns`.
# 6. Counts are an optimization and never decide correctness. A graph that is walked twice (retain_graph)
#    begins again with all its uses; what a walk over a part of the graph left cached goes when it ends. In
#    a walk that frees the graph, a use that is served is over for good: an online rule goes backward at
#    each time step, and a trace that two steps have used would else wait for the one that is gone.
# 7. A rebuild that runs over several products walks through layers whose turn comes much later. In mode
#    "minimal", what it passes there that takes one product and few operations to have again (no loop over
#    time), and that only its own packs still want, is not cached: of a residual stream in floating point
#    the sums are, which everything above is computed from, and not the input of each batch norm below.
#    That is one product more for each.
# 8. Of a stream of spikes (x + f(x), by no product) every fourth sum is cached on the way to a later one,
#    and those between are added up again from there: of 12 blocks' sums 2 stand, for 18 additions more.
# 9. What the forward left standing, because there is room for it (`standing`), is cached when the first
#    backward comes, if nobody has written to it since.
#
# For example: v1 = f(x0), v2 = f(v1), and autograd saved both. The backward asks for v2 first. v1 is used
# by v2 and by its own pack, so it is computed on the way and cached; v2 is handed out. Then autograd asks
# for v1, finds it, and nobody needs it any more. f has run twice, for any number of such steps and any
# walk.

Products = Mapping[int, float]
NO_PRODUCTS: Products = {}
SHALLOW = 16  # operations down to something stored
APART = 4  # sums of a stream of spikes
_CHEAP = attrgetter("cheap")
_SUMS = frozenset([aten.add.Tensor, aten.add_.Tensor])


class Replayed(Handle):
    """``func(*args, **kwargs)``, or output ``index`` of it, where handles stand for tensors.

    ``products`` are the convolutions and matrix products that a rebuild runs, by serial number, each with
    the part of one that this value accounts for (see recipes), ``series`` how many run one after another.
    ``carried`` is what is kept for it, see :mod:`.carried`. ``depth`` is the longest chain of operations
    down to something stored, in operations as large as this one. ``standing`` is
    the value, with its version, where the forward left it standing.
    """

    treatment = "replayed"
    counts = True
    __slots__ = (
        "args", "awaited", "cache", "carried", "cheap", "claiming", "depth", "func", "inplace", "kwargs",
        "needs", "packs", "products", "rests", "series", "standing", "uses", "walk",
    )  # fmt: skip

    index: int | None = None
    siblings: Sequence[weakref.ref[Replayed]] = ()

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        products: Products = NO_PRODUCTS,
        depth: float = 0,
        inplace: bool = False,
        cheap: bool = False,
        series: int = 0,
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.products, self.depth, self.inplace, self.cheap = products, depth, inplace, cheap
        self.series = series
        self.carried: Carried = NOTHING
        self.uses = self.needs = 0
        self.packs = 0  # those of the uses that are no claims, if a product is run again for one
        self.walk: int | None = None
        self.claiming = False
        self.rests: bool | None = None  # on a state that is undone in time, where somebody has asked
        self.cache: torch.Tensor | None = None
        self.standing: tuple[torch.Tensor, int] | None = None
        self.awaited: Callable[[], None] | None = None  # called once this value stands and is cached

    def output(self, index: int, siblings: list[weakref.ref[Replayed]]) -> Replayed:
        """The same recipe for one of several outputs; ``siblings`` collects those of one call."""
        one = _OneOfSeveral(self.func, self.args, self.kwargs, self.products, self.depth, self.inplace)
        one.index, one.siblings, one.series = index, siblings, self.series
        one.carried = self.carried
        siblings.append(weakref.ref(one))
        return one

    @property
    def work(self) -> float:
        """How many convolutions and matrix products a rebuild runs."""
        return sum(self.products.values()) if self.products else 0

    def relies_on(self) -> Iterable[Handle]:
        return self.operands()

    def stored(self, seen: set[int]) -> int:
        return 0 if self.standing is None else storage_once(self.standing[0], seen)

    def operands(self) -> list[Handle]:
        """The handles among its arguments."""
        found: list[Handle] = []
        for arg in (*self.args, *self.kwargs.values()) if self.kwargs else self.args:
            if isinstance(arg, Handle):
                found.append(arg)
            elif arg.__class__ is list and arg and not isinstance(arg[0], int):  # a list has one type
                for item in arg:
                    if isinstance(item, Handle):
                        found.append(item)
        return found

    def need(self) -> None:
        claiming = [self]
        while claiming:
            handle = claiming.pop()
            handle.uses += 1
            handle.needs += 1
            if handle.uses == 1:
                handle.claiming = True
                for operand in handle.operands():
                    if operand.__class__ in PLAIN:
                        claiming.append(operand)  # type: ignore[arg-type]
                    elif operand.counts:
                        operand.need()

    def enter(self, walk: int) -> None:
        """Count all uses again where another backward has begun."""
        if self.walk != walk:
            if self.walk is not None:
                self.needs, self.claiming, self.cache = self.uses, self.uses > 0, None
            self.walk = walk
            if self.standing is not None:
                (value, version), self.standing = self.standing, None
                if self.needs and value._version == version:
                    self.cache = value

    def stands(self) -> bool:
        """Whether the backward that runs has it already."""
        self.enter(_walk())
        return self.cache is not None

    def at_hand(self) -> torch.Tensor | None:
        """The value, where it stands."""
        return self.cache

    def release(self) -> None:
        self.enter(_walk())
        if self.needs:
            self.needs -= 1
        if not self.needs:
            self.cache = None
            self.drop_claims()

    def drop_claims(self) -> None:
        walk, dropping = _walk(), [self]
        while dropping:
            handle = dropping.pop()
            if not handle.claiming:
                continue
            handle.claiming = False
            for operand in handle.operands():
                if operand.__class__ not in PLAIN:
                    if operand.counts:
                        operand.release()
                    continue
                assert isinstance(operand, Replayed)
                operand.enter(walk)
                if operand.needs:
                    operand.needs -= 1
                if not operand.needs:
                    operand.cache = None
                    dropping.append(operand)

    def unpack(self) -> torch.Tensor:
        walk = _walk()
        if walk == -1:  # somebody looks at a node of the graph: no backward runs that would count
            return self.peek()
        self.enter(walk)
        value, owned = self.get(self.needs <= 1)
        self.release()
        if not keeps_graph():
            self.packs = max(0, self.packs - 1)
            self.spend()
        note_ownership(value, owned)
        return value

    def spend(self) -> None:
        """One of its uses is over for good: the graph goes with this backward."""
        spending = [self]
        while spending:
            handle = spending.pop()
            if handle.uses:
                handle.uses -= 1
                if not handle.uses:
                    spending += [one for one in handle.operands() if one.__class__ in PLAIN]  # type: ignore[misc]

    def get(self, last: bool) -> tuple[torch.Tensor, bool]:
        walk = _walk()
        if self.walk != walk:
            self.enter(walk)
        if self.cache is not None:
            return self.cache, False
        return _Rebuild(self, walk).run(last)

    def peek(self) -> torch.Tensor:
        if self.cache is not None:
            return self.cache
        return _Rebuild(self, None).run(True)[0]

    def fresh(self) -> torch.Tensor:
        """As :meth:`peek`, in memory that nobody else has."""
        value, owned = _Rebuild(self, None).run(True)
        return value if owned else value.clone()

    def hold(self, value: torch.Tensor, walk: int) -> None:
        """Keep a value for those who still need it, to the end of the walk at most."""
        self.cache = value
        held_in(walk, self)


class _OneOfSeveral(Replayed):
    __slots__ = ("index", "siblings")


PLAIN = (Replayed, _OneOfSeveral)  # what is rebuilt here; what derives from it knows how itself
_walk = torch._C._current_graph_task_id
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_held: dict[int, list[weakref.ref[Any]]] = {}


def held_in(walk: int, handle: Any) -> None:
    """What a handle caches goes when this backward ends, if it is still of this ``walk``."""
    if walk == -1:
        return
    held = _held.get(walk)
    if held is None:
        held = _held[walk] = []
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        engine.queue_callback(lambda: _end(walk))
    held.append(weakref.ref(handle))


def bytes_cached() -> int:
    """Of all values that the backward that runs has cached."""
    seen: set[int] = set()
    values = (handle.cache for ref in _held.get(_walk(), ()) if (handle := ref()) is not None)
    return sum(storage_once(value, seen) for value in values if value is not None)


def _end(walk: int) -> None:
    for ref in _held.pop(walk, ()):
        handle = ref()
        if handle is not None and handle.walk == walk:
            handle.cache = None


class _Rebuild:
    """One rebuild: the recipes to run, in order, and how often each value is used among them.

    Args:
        root: whose value is wanted; it stands nowhere yet.
        walk: the backward for which it is; None: only to look, so that nothing is counted or cached.
    """

    __slots__ = ("_order", "_uses", "_values", "_walk")

    def __init__(self, root: Replayed, walk: int | None) -> None:
        self._walk = walk
        self._uses: dict[Handle, int] = {root: 1}
        self._values: dict[Handle, tuple[torch.Tensor, bool]] = {}
        self._order: list[Replayed] = []
        uses, order, begun = self._uses, self._order, set()
        waiting: list[Any] = [root]
        while waiting:
            handle = waiting.pop()
            if handle is None:  # what the next one needs comes before it
                order.append(waiting.pop())
                continue
            if handle in begun:
                continue
            begun.add(handle)
            waiting += (handle, None)
            operands = handle.operands()
            operands.sort(key=_CHEAP)  # spikes are unpacked when they are used
            for operand in reversed(operands):
                if operand.__class__ in PLAIN:
                    if walk is not None:
                        operand.enter(walk)  # type: ignore[attr-defined]
                    if operand.cache is None:  # type: ignore[attr-defined]
                        uses[operand] = uses.get(operand, 0) + 1
                        waiting.append(operand)

    def run(self, last: bool) -> tuple[torch.Tensor, bool]:
        """The root's value, and whether it is the caller's; ``last``: nobody else needs it."""
        order, values = self._order, self._values
        if watchers and (watcher := watchers.get(self._walk)) is not None:
            watcher.begins(order, self._uses)
        root = order[-1]
        goes_far, passed = root.work > 1, 0
        for handle in order:
            if handle.cache is not None:  # a sibling ran
                values[handle] = handle.cache, False
                continue
            value, owned = self._run(handle)
            if self._walk is not None and not handle.cheap:
                others = handle.needs - self._uses[handle]
                again = handle.work <= 1 and handle.depth <= SHALLOW
                far = goes_far and again and others <= handle.packs
                stays = not last if handle is root else others > 0 and not far
                if stays and handle.func in _SUMS and handle is not root and not handle.products:
                    passed = (passed + 1) % APART
                    stays = passed == 0
                if stays:
                    handle.hold(value, self._walk)
                    owned = False
                    if handle.awaited is not None:
                        handle.awaited()
            values[handle] = value, owned
        return values[root]

    def _run(self, handle: Replayed) -> tuple[torch.Tensor, bool]:
        borrowed: list[torch.Tensor] = []
        args = [
            self._value_of(arg, borrowed) if isinstance(arg, (Handle, list)) else arg for arg in handle.args
        ]
        kwargs = handle.kwargs
        if kwargs:
            kwargs = {name: self._value_of(arg, borrowed) for name, arg in kwargs.items()}
        if handle.inplace and (_among(args[0], borrowed) or _among(args[0], args[1:])):
            args[0] = args[0].clone()
        outputs = handle.func(*args, **kwargs)
        value = outputs if handle.index is None else outputs[handle.index]
        if self._walk is not None:
            handle.drop_claims()
            for ref in handle.siblings:
                sibling = ref()
                if sibling is not None and sibling is not handle:
                    sibling.enter(self._walk)
                    if sibling.needs:
                        sibling.hold(outputs[sibling.index], self._walk)
                        sibling.drop_claims()
        if labelled:
            handle.verified(value, f"replaying {handle.func}")
        if borrowed:
            memory = value.untyped_storage().data_ptr()
            for tensor in borrowed:
                if tensor.untyped_storage().data_ptr() == memory:
                    return value, False
        return value, True

    def _value_of(self, arg: Any, borrowed: list[torch.Tensor]) -> Any:
        if not isinstance(arg, Handle):
            if arg.__class__ is list and arg and not isinstance(arg[0], int):
                return [self._value_of(item, borrowed) for item in arg]
            return arg
        if self._values and arg in self._values:
            value, owned = self._values[arg]
            self._uses[arg] -= 1
            if self._uses[arg]:
                owned = False
            else:
                del self._values[arg]
        elif self._walk is None:
            value, owned = arg.peek(), False
        elif isinstance(arg, Replayed):
            arg.enter(self._walk)
            value, owned = arg.get(arg.needs <= 1)
        else:
            value, owned = arg.get(True)
        if not owned:
            borrowed.append(value)
        return value


def _among(value: torch.Tensor, values: Iterable[Any]) -> bool:
    return any(value is one for one in values)
