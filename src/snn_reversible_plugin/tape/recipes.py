"""Which operations get a recipe, and at what price.

The one idea: a recipe may cost neither more memory than it saves nor more time than the mode allows; where
it would, its output is kept. Both are counted when the operation runs, from what is known of its arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.carried import NOTHING, Carried, together, unpaid
from snn_reversible_plugin.tape.constants import number_in
from snn_reversible_plugin.tape.copies import known_of
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.operators import Kind, Operator
from snn_reversible_plugin.tape.origins import OUTSIDE, is_ended, look_up
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import NO_PRODUCTS, PLAIN, Products, Replayed

# NOTE [What gets a recipe]
#
# 1. Only what an aten operation computed from tensors alone (`operators`). All else is kept.
# 2. A truth value is one bit by construction: the outputs of comparisons, `bernoulli_`, and the spikes
#    that a neuron of ours vouches for. That is the only way to be packed.
# 3. A recipe may not cost more memory than it saves: the tensors that it would newly keep alive must not be
#    larger than its output, and a small output of a large input is kept. Nor may a chain of them, since
#    something was last saved (`carried`).
# 4. A recipe may not run ever more. `products` are the convolutions and matrix products down to something
#    stored, each counted once however many paths lead to it; their number is bounded by the mode, so a long
#    chain gets an anchor now and then by itself. So does a chain of cheaper operations, by its `depth`: one
#    step in so many of a loop is kept, and what stands beyond it stays free.
#    Of products that run one after another there are fewer: all that lies between them stands at once.
#    Both are measured in operations of this size: of a stack of T steps, each step's chain is a T-th. So
#    a stack of T convolutions, each of one step, has run one. What leads to a part of a tensor has it all.
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
# 10. A state that an earlier recording left and that is detached here ends its history: the steps before
#    have had their backward, or get none through it. Its recipe would lead through all of them. And what is
#    made of it without a gradient (a trace of spikes) is the user's next state, which lives anyway.
# 11. In a loop over time each step adds products, so that the limit alone would keep one step in two or
#    three. They follow no other, and each runs once, as all that is between two anchors waits for its own
#    step. So their number grows with the products behind the anchors that are kept already, as their root:
#    what stands at once grows as what is held does, and both as the root of T. For example, with two
#    products a step and T = 100, steps 3, 7, 12, 17, 23, ... are kept, 14 of them. A loop is known by its
#    weights: the last product read those of an earlier one. Shapes tell loops apart.

MAX_DEPTH = 256
SHORT = 2  # operations, that a state which ends its history may be away from what is stored
MAX_SERIES = 3
WORK_LIMIT = {"memory": 5, "speed": 0, "minimal": 5}
SMALL_OUTPUT = 16  # an output this many times smaller than the largest activation it is made of is kept
MANY_PRODUCTS = 48  # parts of products are not told apart beyond

NO_NAMES: dict[str, Any] = {}
_Tensor, _STRIDED, _LISTS = torch.Tensor, torch.strided, frozenset((list, tuple))
# Asked first of each argument: whether it is a tensor takes torch's classes five times as long to say.
_NO_TENSORS = frozenset((int, bool, float, type(None), torch.dtype, torch.device, torch.layout, str))
_SETTLED = frozenset((OUTSIDE.__class__, Kept, Packed, *PLAIN))  # `known_of` says nothing else of these
_serial = itertools.count()


class Refused:
    """Why an operation has no recipe, in words for a report."""

    WORK = "more different convolutions and matrix products lead to it than the mode runs again"
    DEPTH = "a long chain of operations leads to it"
    OPERANDS = "its operands, stored nowhere, would have to be kept in its place, and are larger"
    SMALL = "it is much smaller than what it is computed from"
    ATOMIC = "its result depends on the order of additions on a GPU"
    LAYOUT = "its layout is special"


@dataclass(slots=True)
class Price:
    """What a rebuild takes, see :class:`Replayed`; ``known``: what :func:`look_up` said, by tensor's id;
    ``free``: the operands that nothing relies on yet."""

    products: Products
    depth: float
    cheap: bool
    known: dict[int, Any]
    series: int = 0
    carried: Carried = field(default_factory=dict)
    free: Sequence[torch.Tensor] = ()
    newly_kept: int = 0


def price(
    operator: Operator,
    operands: list[torch.Tensor],
    outputs: list[torch.Tensor],
    known: dict[int, Any],
    work_limit: float,
    most_series: int = MAX_SERIES,
) -> Price | str:
    """The price of a recipe, or why keeping the output is cheaper: one of :class:`Refused`.

    ``known``: what :func:`known_of` said of the operands, by their ids.
    """
    size = 0
    for tensor in outputs:
        if tensor.layout is not _STRIDED or tensor.is_nested:
            return Refused.LAYOUT
        if (of_output := tensor.numel() * tensor.element_size()) > size:
            size = of_output
    depth, cheap, products = 0.0, operator.cheap, NO_PRODUCTS
    newly_kept = largest = series = 0
    carried, free = NOTHING, []
    for tensor in operands:
        handle = known[id(tensor)]
        if tensor.layout is not _STRIDED or tensor.is_nested:
            return Refused.LAYOUT
        if operator.atomic and tensor.is_cuda:
            return Refused.ATOMIC
        if handle is OUTSIDE:
            continue
        of_operand = tensor.numel() * tensor.element_size()
        if of_operand > largest:
            largest = of_operand
        if isinstance(handle, Replayed):
            part = of_operand / size if of_operand < size else 1.0
            if handle.depth * part > depth:
                depth = handle.depth * part
            cheap = cheap and handle.cheap
            if handle.series > series:
                series = handle.series
            if handle.products and handle.products is not products:
                products = _together(products, handle.products, part)
            if handle.carried:
                seen = size / of_operand if operator.kind is Kind.VIEW and size < of_operand else 1.0
                carried = together(carried, handle.carried, seen)
        elif handle is None or (isinstance(handle, Kept) and not handle.anchored):
            free.append(tensor)
            newly_kept += tensor.untyped_storage().nbytes()
            if not torch.is_grad_enabled() and is_ended(tensor):
                newly_kept += 1
    if operator.work:
        products, series = {**products, next(_serial): 1.0}, series + 1
    if products and (series > most_series or sum(products.values()) > work_limit + 1e-3):
        return Refused.WORK
    if depth >= MAX_DEPTH:
        return Refused.DEPTH
    owed = unpaid(carried) if carried else 0
    # Where products are kept, what stands for one is as good as the product, and takes no rebuild.
    stands_for_it = not work_limit and owed >= size and operator.kind is not Kind.VIEW
    if newly_kept + owed > size or stands_for_it:
        return Refused.OPERANDS
    if size * SMALL_OUTPUT <= largest and operator.kind is not Kind.VIEW:
        return Refused.SMALL
    return Price(products, depth + 1, cheap, known, series, carried, free)


def view_of(
    func: Any, args: tuple[Any, ...], out: torch.Tensor, handle: Any, work_limit: float
) -> Replayed | None:
    """The recipe of a view of bits, or of something replayed; None where :func:`price` has more to ask.

    ``args``: of which the first alone is a tensor, and has this handle.
    """
    x = args[0]
    if out.layout is not _STRIDED or x.layout is not _STRIDED:
        return None
    depth, cheap, products, series, carried = 0.0, True, NO_PRODUCTS, 0, NOTHING
    if handle.__class__ in PLAIN:
        cheap, products, series = handle.cheap, handle.products, handle.series
        size, of_x = out.numel() * out.element_size(), x.numel() * x.element_size()
        if products and (of_x < size or series > MAX_SERIES or sum(products.values()) > work_limit):
            return None
        depth = handle.depth * (of_x / size) if of_x < size else handle.depth
        if handle.carried:
            carried = together(NOTHING, handle.carried, min(size / of_x, 1.0))
        if depth >= MAX_DEPTH:
            return None
    elif isinstance(handle, Packed):
        handle.materialize(x)
    else:
        return None
    recipe = Replayed(func, (handle, *args[1:]), NO_NAMES, products, depth + 1, False, cheap, series)
    recipe.carried = carried
    return recipe


class Prices:
    """What operations cost under one tape: limits that grow in a loop over time; see recipes, note 11."""

    __slots__ = ("_again", "_limit", "_passed", "_seen")

    def __init__(self, work_limit: float) -> None:
        self._limit = work_limit
        self._seen: set[int] = set()  # storages that products have read: weights, inputs
        self._again = False  # whether the last product read what an earlier one had
        self._passed: dict[torch.Size, float] = {}

    def of(
        self, operator: Operator, operands: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> Price | str:
        """See :func:`price`."""
        known, read = {}, set()  # this is asked of each operation: with few calls
        for tensor in operands:
            handle = look_up(tensor)
            if handle is OUTSIDE and tensor.layout is _STRIDED:
                read.add(tensor.untyped_storage()._cdata)
            known[id(tensor)] = handle if handle.__class__ in _SETTLED else known_of(tensor)
        cost = price(operator, operands, outputs, known, self._limit)
        if operator.work and self._limit:
            self._again = bool(read) and read <= self._seen
            self._seen |= read
        if cost is not Refused.WORK or not self._again:
            return cost
        shape = outputs[0].shape
        passed = self._passed.get(shape, 0.0)
        limit = self._limit + math.isqrt(int(passed))
        cost = price(operator, operands, outputs, known, limit, most_series=1)
        if cost is Refused.WORK:
            self._passed[shape] = passed + limit
        return cost


def price_of_part(
    operator: Operator,
    root: torch.Tensor,
    before: Handle,
    written: tuple[torch.Tensor, Sequence[Any], dict[str, Any]],
    work_limit: float,
    kept: int,
) -> Price | None:
    """The price of a root's value after an operation wrote into a view of it, or None: keep the root.

    Args:
        operator: the operation.
        root: what the view is of.
        before: the root's value before.
        written: the view, and the operation's other operands, by position and by name.
        work_limit: how many products a rebuild may run.
        kept: bytes that are kept for the root's other parts.
    """
    view, operands, named = written
    if not is_plain(view) or (operator.atomic and view.is_cuda):
        return None
    size, whole = _bytes(view), _bytes(root)
    part = size / whole
    products, depth = NO_PRODUCTS, 0.0
    if isinstance(before, Replayed):
        products, depth = before.products, before.depth
    of_operands, newly_kept, series = 0.0, 0, getattr(before, "series", 0)
    cheap = operator.name == "copy" and (is_cheap(before) or number_in(before) is not None)
    known: dict[int, Any] = {}
    for tensor in tensors_among(operands, named):
        handle = known[id(tensor)] = known_of(tensor)
        if not is_plain(tensor):
            return None
        if isinstance(handle, Replayed):
            of_operands = max(of_operands, handle.depth)
            series = max(series, handle.series)
            products = _together(products, handle.products, part)
        elif handle is None or (isinstance(handle, Kept) and not handle.anchored):
            newly_kept += tensor.untyped_storage().nbytes()
        cheap = cheap and is_cheap(handle)
    if operator.work:
        products = {**products, next(_serial): part}
    if operator.name == "copy":
        depth = max(depth, of_operands * part) + part
    else:
        depth += (of_operands + 1) * part
    too_much = newly_kept > size or 2 * (kept + newly_kept) > whole
    if depth >= MAX_DEPTH or too_much or sum(products.values()) > work_limit + 1e-3:
        return None
    return Price(products, depth, cheap, known, series, newly_kept=newly_kept)


def is_cheap(handle: Any) -> bool:
    """Whether a rebuild of these bits, or of a view or cast of some, is hardly more than a copy."""
    return handle.cheap if isinstance(handle, Replayed) else isinstance(handle, Packed)


def _together(some: Products, more: Products, part: float) -> Products:
    """Products of both, those of ``more`` for a part of the output: what both have counts once."""
    if not more or (part == 1 and not some):
        return more or some
    together = dict(some)
    for serial, share in more.items():
        together[serial] = min(together.get(serial, 0.0) + share * part, max(1.0, share))
    if len(together) > MANY_PRODUCTS:
        return {next(_serial): sum(together.values())}
    return together


def tensors_among(args: Iterable[Any], named: dict[str, Any] = NO_NAMES) -> list[torch.Tensor]:
    """The tensors among an operator's arguments, and in lists among them; ``named``: those by name."""
    found = []
    for arg in (*args, *named.values()) if named else args:
        cls = arg.__class__
        if cls is _Tensor:
            found.append(arg)
        elif cls in _NO_TENSORS:
            continue
        elif cls in _LISTS:
            if arg and not isinstance(arg[0], int):  # a list has one type
                found += tensors_among(arg)
        elif isinstance(arg, _Tensor):
            found.append(arg)
    return found


def handles_for(args: Iterable[Any], known: dict[int, Any]) -> tuple[Any, ...]:
    """An operator's arguments with the handles of its tensors, by their ids, in place of these."""
    found: list[Any] = []
    for arg in args:
        cls = arg.__class__
        if cls in _NO_TENSORS:
            found.append(arg)
        elif isinstance(arg, _Tensor):
            found.append(known[id(arg)])
        elif cls in _LISTS and tensors_among(arg):
            found.append(list(handles_for(arg, known)))
        else:
            found.append(arg)
    return tuple(found)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
