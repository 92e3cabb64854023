"""What a model keeps of its products, from one forward to the next.

The one idea: the first forward of a shape runs as in mode "memory" while its sizes are noted, within a
budget also what it and its backward take, and later ones follow the plan that is made of these. A plan
lists the products in their order, by operator and shapes. Source: this package's own.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.choice import choose, foreseen, refuse, within
from snn_reversible_plugin.tape.measured import Measured
from snn_reversible_plugin.tape.operators import Operator
from snn_reversible_plugin.tape.origins import entered_between, look_up, now
from snn_reversible_plugin.tape.outsiders import alias
from snn_reversible_plugin.tape.pending import Pending
from snn_reversible_plugin.tape.recipes import tensors_among
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sizes import Sizes
from snn_reversible_plugin.tape.together import Together

# NOTE [When a plan holds]
#
# 1. A forward follows the plan that begins with its first product, for as long as each product is the one
#    that the plan names. It never waits for a device and reads no value, so that equal shapes give equal
#    choices, on every machine of a group.
# 2. A forward that goes another way, or ends early, has other layers than the plan knows. What begins with
#    that product runs as "memory" from then on.
# 3. Where a forward begins and the backward of an earlier one is still to come (a network that is called
#    once a time step, two calls and one loss), what both keep is alive at once, and neither's sizes
#    say how much. The model runs as "memory" from then on. Within a budget all forwards of the first such
#    step are measured, and its backward: a budget below that is refused when the next step begins, which
#    is where no backward is to come.
# 4. That is seen by products that the backward will ask for and has not: alive, needed, not served. The
#    first forward keeps nothing, so the first training step says it before anything is kept.
# 5. What is in somebody's hand when the forward is over, an output above all, may be written to past the
#    version counter. It is not kept: the backward computes it again.
# 6. Where no plan of the model keeps anything, nobody looks at the operations of a forward that has one.
# 7. Plans are of a place and a process: copies and pickles of a model start without.
# 8. Within a budget a plan waits for the first backward, and is made when the next forward of that shape
#    begins. Where nothing could be measured (somebody's profiler was on, the allocator doesn't say, TRIES
#    forwards had no backward), bounds decide, as without a budget.
# 9. The hooks that measure change which sums of gradients autograd forms in place, so that later steps may
#    take a tensor more than the one that was measured. What is kept leaves RESERVE for that.
# 10. Nor is a plan made of a step that the next one outgrows by what it starts from (pending.py): that one
#    is measured in its place, TRIES times at most. The third step is looked at, too, though it has a plan:
#    the second is the first that reads what was promised, and what it reads stands in the third.

Product = tuple[Any, ...]
TRIES = 3
RESERVE = 0.05  # of a budget
MANY_SPANS = 4096  # of forwards, which are taken as one then
MANY = 64  # products whose backward says that all is over: the first ones come last


class Plan(NamedTuple):
    """The products of a forward, and which of them are kept.

    ``peak``: bytes that a step with it takes, what lives anyway included, where one was measured; ``least``
    with nothing kept.
    """

    products: tuple[Product, ...]
    kept: tuple[bool, ...]
    peak: int | None = None
    least: int | None = None


class Plans:
    """The plans of one model.

    Args:
        budget: bytes that may be alive, with what lives before a step; None: as much as "memory" takes.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self.overlapping = False
        self.by_first: dict[Product, Plan | None] = {}  # None: goes several ways
        self.pending: dict[Product, Pending] = {}
        self.measuring = budget is not None  # a forward may be of a shape that is not measured yet
        self.tries = self.starts = TRIES
        self._spans: list[tuple[int, int]] = []  # when forwards began and ended, while they are measured
        self.together: Together | None = None  # forwards that overlap, within a budget
        self._awaited: dict[int, list[weakref.ref[Replayed]]] = {}  # of each thread's last forward
        self._measured: dict[int, Pending] = {}  # and what is known of that, where it was measured

    def __reduce__(self) -> Any:
        return Plans, (self.budget,)

    def begin(self) -> Following:
        """A forward begins on this thread."""
        thread = threading.get_ident()
        first = self._measured.pop(thread, None)
        if any(_is_awaited(ref()) for ref in self._awaited.pop(thread, ())):
            if not self.overlapping and first is not None and first.measured is not None:
                self.together = Together(first)
            self.overlapping = True
            self.pending.clear()
        elif self.together is not None and self.together.is_here:
            self._meets_budget(self.together)
        return Following(self)

    def ran(self, began: int) -> None:
        """A forward that began then is over."""
        if self.measuring or (self.together is not None and self.together.is_open):
            self._spans.append((began, now()))
            if len(self._spans) > MANY_SPANS:
                self._spans = [(self._spans[0][0], now())]
        else:
            self._spans.clear()

    def standing(self) -> list[torch.Tensor]:
        """What forwards have made since they are measured, and is alive still."""
        if not self._spans:
            return []
        began, ended = zip(*sorted(self._spans), strict=True)
        return [tensor for tensor in entered_between(began, ended) if is_plain(tensor)]

    def waits(self, pending: Pending) -> None:
        """A forward was measured, and its backward is to come."""
        self.pending[pending.products[0]] = self._measured[threading.get_ident()] = pending

    def _meets_budget(self, together: Together) -> None:
        """A step of several forwards begins; or another forward of one that isn't measured any more."""
        if together.is_open:
            together.step_begins(Sizes().stood(self.standing()))
            first, peak = together.products, together.peak
            self.by_first[first[0]] = Plan(first, (False,) * len(first), peak, peak)
        if together.peak is not None and self.budget is not None:
            refuse(self.budget, together.lives, together.peak - together.lives)
        if together.is_outgrown and self.starts > 1:  # this one is measured as the first was
            self.starts -= 1
            self.together, self.overlapping, self.measuring = None, False, True
            self.by_first.clear()

    def over(self, awaited: list[weakref.ref[Replayed]]) -> None:
        """A forward on this thread is over; the backward will ask for these."""
        if len(self._awaited) > 64:  # of threads that are no more
            self._awaited.clear()
            self._measured.clear()
        self._awaited[threading.get_ident()] = awaited


def _is_awaited(handle: Replayed | None) -> bool:
    return handle is not None and handle.uses > 0 and handle.walk is None


class Following:
    """One forward: it follows a plan, or gives one.

    ``sizes``: what is noted of a forward without a plan.
    """

    def __init__(self, plans: Plans) -> None:
        self._plans = plans
        self._products: list[Product] = []
        self._plan: Plan | None = None
        self._began = None if plans.budget is None else now()
        self._left = 0  # bytes that earlier forwards made and that were alive then
        self._awaited: list[weakref.ref[Replayed]] = []
        self._standing: list[tuple[weakref.ref[Replayed], weakref.ref[torch.Tensor]]] = []
        self._strayed = False
        together = plans.together
        goes_on = together is not None and together.is_here and together.is_open
        self._together = together if goes_on else None
        # It keeps nothing, and has nothing to note.
        self._idle = plans.overlapping and self._together is None
        # A GPU's allocator knows at once, and of what no forward meets, an optimizer's state above all.
        self._before = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
        self.sizes: Sizes | None = None if plans.overlapping else Sizes()
        self._measured: Measured | None = None
        self._can_be_measured = plans.budget is not None

    def measure(self) -> Measured | None:
        """The forward that begins is measured, where it may be of a shape that was not."""
        if self._together is not None:
            self._measured = self._together.goes_on()
        elif self._plans.measuring and self.sizes is not None:
            standing = self._plans.standing()
            self._left = self.sizes.stood(standing)
            self._measured = Measured.begin(standing)
            self._can_be_measured = self._measured is not None
        return self._measured

    def computed_all(self) -> None:
        """Nothing more is computed in the forward."""
        if self._measured is not None:
            self._measured.forward_over()

    def computed(self, operator: Operator, args: tuple[Any, ...], out: Any) -> Following | None:
        """An operation ran, and is written down; None: of no other one it has to know."""
        if operator.work:
            handle = look_up(out) if isinstance(out, torch.Tensor) else None
            recipe = handle if isinstance(handle, Replayed) else None
            if self._keeps(_product(operator, args, out)) and recipe is not None:
                recipe.standing = alias(out), out._version
                self._standing.append((weakref.ref(recipe), weakref.ref(out)))
            if recipe is not None and len(self._awaited) < MANY:
                self._awaited.append(weakref.ref(recipe))
            if self._measured is not None and self.sizes is not None:  # its layers count
                self._measured.product(tensors_among((out,))[0], recipe)
        if self.sizes is not None:
            self.sizes.computed(operator, args, out)
        elif self._together is not None:
            self._together.computed(args)
        return None if self._idle else self

    def _keeps(self, product: Product) -> bool:
        if self._plans.overlapping or self._strayed:
            return False
        at = len(self._products)
        if not at:
            self._begin(product)
        self._products.append(product)
        if self._plan is None or self._strayed:
            return False
        if at >= len(self._plan.products) or self._plan.products[at] != product:
            self._stray()
            return False
        return self._plan.kept[at]

    def _begin(self, first: Product) -> None:
        plans, waiting = self._plans.by_first, self._plans.pending
        if (pending := waiting.get(first)) is not None:
            if first not in plans:
                waiting[first] = self._settle(pending).starting_from(self._left)
            elif plans[first] is not None and self._outgrows(pending):
                del plans[first], waiting[first]
            else:
                del waiting[first]
            self._plans.measuring = bool(waiting) or first not in plans
        self._plan, self._strayed = plans.get(first), plans.get(first, self) is None
        if first in plans:
            self.sizes = None
            self.computed_all()
            self._idle = not any(plan and any(plan.kept) for plan in plans.values())

    def _settle(self, pending: Pending) -> Pending:
        """Make the plan of a shape whose first step is over; none yet where its backward never came, or
        where this forward starts from more than that one did. Returns what is known by now."""
        plans, measured = self._plans, pending.measured
        assert measured is not None
        if measured.is_whole:
            pending = pending._replace(lives=pending.lives + measured.gone)
            results = {at for at, layer in enumerate(pending.layers) if layer.needed}
            found = measured.layers(pending.lives, results) or ()
            for layer, one in zip(pending.layers, found, strict=False):
                layer.forward, layer.backward = one
        elif not measured.is_blind and plans.tries > 1:
            plans.tries -= 1
            return pending
        plans.tries = TRIES
        if self._outgrows(pending):
            self._limit(pending)  # what that one took is refused already
        else:
            self._make(pending.starting_from(self._left))
        return pending

    def _outgrows(self, pending: Pending) -> bool:
        """Whether this forward, which starts from more, is to be measured in place of that one."""
        does = self._plans.starts > 1 and pending.is_outgrown(self._left, pending.takes())
        self._plans.starts -= does
        return does

    def _limit(self, of: Pending) -> int | None:
        """Bytes that a step may have alive beside what lives anyway; None: without a budget."""
        budget = self._plans.budget
        return None if budget is None else within(budget, of.lives, of.layers) - int(RESERVE * budget)

    def _make(self, of: Pending) -> None:
        limit = self._limit(of)
        kept = choose(of.layers, limit)
        peak, least = (
            None if beyond is None else of.lives + beyond
            for beyond in (foreseen(of.layers, one) for one in (kept, [False] * len(kept)))
        )
        kept = kept[1 : len(of.products) + 1]
        self._plans.by_first[of.products[0]] = Plan(of.products, tuple(kept), peak, least)

    def _lives(self) -> int:
        """Bytes that live beside what the step takes; gradients that stand already are the step's."""
        assert self.sizes is not None
        return max(self.sizes.lives, self._before - self.sizes.gradients)

    def _stray(self) -> None:
        self._strayed, self._plans.by_first[self._products[0]] = True, None

    def finish(self, failed: bool) -> None:
        """The forward is over."""
        if self._began is not None:
            self._plans.ran(self._began)
        for recipe, out in self._standing:
            handle = recipe()
            # Somebody has it in hand, and may write to it; or no backward will ask for it.
            if handle is not None and (out() is not None or not handle.uses):
                handle.standing = None
        if self._idle:
            return
        self._plans.over(self._awaited)
        if failed and self._together is not None:
            self._together.failed()
        if failed or self._plans.overlapping or self._strayed or not self._products:
            return
        if self._plan is None:
            assert self.sizes is not None
            found = Pending(
                tuple(self._products),
                self.sizes.read(),
                self._lives(),
                self._measured,
                self.sizes,
                self._before,
                self._left,
                self.sizes.gradients,
            )
            if self._plans.budget is not None:
                within(self._plans.budget, found.lives, found.layers)
            if self._measured is not None:
                self._measured.is_awaited = True
                self._measured.gradients = (
                    sum(layer.learned for layer in found.layers),
                    self.sizes.gradients,
                )
                self._plans.waits(found)
            elif self._can_be_measured:
                self._plans.measuring = True  # from its next forward on
            else:
                self._make(found)
        elif len(self._products) < len(self._plan.products):
            self._stray()


def _product(operator: Operator, args: tuple[Any, ...], out: Any) -> Product:
    shapes = tuple([tuple(one.shape) for one in tensors_among(args) if not one.is_nested])
    first = tensors_among((out,))[0]
    return operator.name, shapes, first.dtype, str(first.device), torch.is_grad_enabled()
