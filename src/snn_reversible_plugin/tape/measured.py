"""What a forward and its backward have alive, layer by layer, as the allocator counts it.

The one idea: bounds on what a backward takes can be made from sizes, its workspaces and the moments at
which things are freed can't. The first step of a shape keeps nothing, so what it takes is measured while it
runs: nothing runs twice, and what is known afterwards is what every later step of that shape takes.

Source: this package's own.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from snn_reversible_plugin.ops.allocations import given_out, mark, start, stop
from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.early import Early, EarlyValues
from snn_reversible_plugin.tape.moments import (
    EARLY,
    GONE,
    PRODUCT,
    REBUILDS,
    REBUILT,
    gone,
    made,
    of_forward,
    of_node,
    standing,
    that_decide,
    together,
)
from snn_reversible_plugin.tape.recipes import tensors_among
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sizes import Moment

# NOTE [How a step is measured]
#
# 1. A profiler that was on while the user's code runs would be in the way of the user's own, so it is on in
#    two places: from the start of a forward to its end, and in a node of the backward, from the hook
#    in front of it to the one behind. What a node that raises leaves on goes with the engine's state of
#    the thread. Where somebody else's profiler is on, nothing is measured.
# 2. Nodes are found when the backward first unpacks something: the node that asks, and all that it leads
#    to. A hook knows its node's number and doesn't hold it: what a node holds has to go when it has run.
# 3. Between two nodes only what the allocator has given out in all is known. On a CPU that is the C heap,
#    with all that is no tensor: what is compiled and loaded in a first step, nodes and handles. How much
#    of it a forward or a node leaves is known where both counts are, and taken off. What remains of that
#    at the end, where gradients are the only tensors that are new, has been let go between nodes: as much
#    after each. Where a graph has so many nodes for so few bytes (a loop of many steps and small layers)
#    that this is too vague for a budget, nobody knows.
# 4. A node is a layer's by its number: nodes are numbered as the forward makes them.
# 5. Of the nodes after the first MANY, a loop's, those of a kind and size that was seen are taken to need
#    what the largest of these did beyond what was alive before it and after: the first node of a layer
#    rebuilds all of it, which stands afterwards, and the same node of its other steps finds it.
# 6. What stood before and goes while it is measured, as states that an earlier backward has left, lives
#    anyway: without it the rest would count for too little.
# 7. A parameter that several nodes use, as in a loop, has its gradients summed up behind a node, where no
#    profiler is on: a third tensor stands beside the two for that.
#
# For example, two layers, numbers 0 to 2 and 3 to 5: the second's begin at 3. A node with number 4 that
# finds 10 MiB more given out than before the forward, and in which 6 are taken and 2 given back before
# another 1, has 16 alive at its peak, and that is the second layer's, if no other node of it has more.

MANY = 256
DOUBT = 0.05  # of the peak, what lives anyway included: as much of a budget stays free
OF_A_NODE = 512  # bytes on the heap that may come or go unseen with each node: loops of 7,840 showed 300

_graph_task = torch._C._current_graph_task_id


class _Window(NamedTuple):
    """A node that runs, what was alive when it began, its kind, where rebuilt results stood then, by layer,
    what was early, by address, and the profiler; None where it is not on."""

    number: int
    alive: int
    kind: tuple[Any, ...]
    results: dict[int, int]
    early: dict[int, Early]
    running: Any


class Measured:
    """One forward, and its backward; or several with one backward. Made by :meth:`begin`.

    Attributes:
        gradients: bytes of parameters' gradients, of all and of those that stood before the forward.
        is_awaited: whether somebody wants to know what the backward takes.
        gone: bytes on a CPU that stood before, beside what was told, and have been let go of since.
    """

    def __init__(self, before: dict[str, int], standing: set[int], running: Any) -> None:
        self._before, self._running, self._alive = before, running, 0
        self._here, self.gone = standing, 0
        self._device = "cpu"
        self.gradients = 0, 0
        self.is_awaited = False
        self._forward: list[list[Moment]] = []  # up to each product's end, and to the forward's
        self._results: dict[int, weakref.ref[Any]] = {}  # storages of what was rebuilt, by layer
        self._early = EarlyValues()
        self._backward: list[tuple[int, Moment, int]] = []  # layer, what was alive, nodes that had run
        self._after = 0  # what is alive when all is over
        self._begins: list[int] = []  # the number of the first node of each layer after layer 0
        self._task: int | None = None  # the backward that runs
        self._done = False
        self._numbers: set[int] = set()
        self._waiting: set[int] = set()  # nodes that have not run
        self._others = 0  # bytes of the C heap that are no tensor
        self._window: _Window | None = None
        self._transient: dict[tuple[Any, ...], int] = {}  # beyond what was alive before and after, by kind
        self._windows = 0
        self._arrived: set[int] = set()  # parameters that have a gradient, by id
        self.is_blind = False  # somebody's profiler was on, or the allocator says nothing

    @property
    def is_whole(self) -> bool:
        """Whether a backward through all that the forward made has come to its end."""
        return self._done and not self._waiting and not self.is_blind

    @classmethod
    def begin(cls, standing: Iterable[torch.Tensor] = ()) -> Measured | None:
        """A forward begins on this thread, and these stand; None where nothing can be measured."""
        before = {one: bytes_ for one in ("cpu", "cuda") if (bytes_ := given_out(one)) is not None}
        addresses = {tensor.untyped_storage().data_ptr() for tensor in standing}
        return None if torch.autograd._profiler_enabled() else cls(before, addresses, start())

    def layers(self, lives: int, results: set[int]) -> list[tuple[list[Moment], list[Moment]]] | None:
        """What was alive in each layer's forward and backward, beyond what was before the step, gradients
        apart: those of the layers of :class:`.sizes.Sizes`, in their order. None: nobody knows.

        ``lives``: bytes that live anyway, and count in a budget; ``results``: the layers whose products'
        results may be kept."""
        made, before = self.gradients
        on_heap = self._device == "cpu"
        let_go = max(0, made - before - self._after) if on_heap else 0
        forward = [
            [moment._replace(alive=moment.alive + before) for moment in moments]
            for moments in ([], *self._forward)  # nothing in front of the first product is a layer's
        ]
        backward: list[list[Moment]] = [[] for _ in forward[1:]]
        stood = results & {one for _, moment, _ in self._backward for one in moment.standing}
        again: set[int] = set()  # layers whose results stand later
        for layer, moment, ran in reversed(self._backward):
            beside = before + let_go * ran // max(1, len(self._numbers))
            # A kept result goes with its last use, as a rebuilt one does that is not rebuilt again.
            now = {one for one in moment.standing if one > 0}
            stands = frozenset(now | (stood - again))
            backward[layer].append(moment._replace(alive=moment.alive + beside, standing=stands))
            again |= now
        doubt = OF_A_NODE * len(self._numbers) if on_heap else 0
        peak = max((one.alive for moments in (*forward, *backward) for one in moments), default=0)
        if self.is_blind or doubt > DOUBT * (lives + peak):
            return None
        # The backward of what follows the last product and that of the loss are measured as one.
        return [*zip(map(that_decide, forward), map(that_decide, (*backward, backward[-1])), strict=True)]

    def product(self, out: torch.Tensor, result: Replayed | None) -> None:
        """A product of the forward has been computed."""
        if not self._begins:
            self._device = out.device.type
            self.is_blind = self._device not in self._before
        self._begins.append(torch.autograd._get_sequence_nr())
        if result is not None:
            self._early.product(result, len(self._begins))
            result.func = self._marking(len(self._begins), weakref.ref(result), result.func)
        mark(f"{PRODUCT} {out.untyped_storage().data_ptr() if is_plain(out) else GONE}")

    def _marking(
        self, layer: int, result: weakref.ref[Replayed], func: Callable[..., Any]
    ) -> Callable[..., Any]:
        """A product's function, which says when it is run again."""

        def run(*args: Any, **kwargs: Any) -> Any:
            mark(f"{REBUILDS} {layer}")
            out = func(*args, **kwargs)
            storage = tensors_among((out,))[0].untyped_storage()
            self._results[layer] = weakref.ref(storage)
            mark(f"{REBUILT} {layer} {storage.data_ptr()}")
            handle = result()
            for address in () if handle is None else self._early.ran(handle):
                mark(f"{EARLY} {address}")
            return out

        return run

    def forward_over(self) -> None:
        """The forward is over, or is not to be measured after all."""
        running, self._running = self._running, None
        if running is None:
            return
        if not torch.autograd._profiler_enabled():  # somebody has ended it, or this is another thread
            self.is_blind = True
            return
        events = stop(running, self._device)
        del running
        self._forward += [
            [one._replace(alive=self._alive + one.alive) for one in moments]
            for moments in of_forward(events)
        ]
        if self._device == "cpu":
            self._others = self._now() - self._alive - sum(event.size for event in events)
            self.gone += gone(events, self._here)

    def goes_on(self) -> bool:
        """Another forward begins, of which the same backward is to come; False: that can't be measured."""
        if self._done or self._task is not None or self.is_blind or torch.autograd._profiler_enabled():
            self.is_blind = True
            return False
        self._alive = self._now() - self._others
        self._running = start()
        return True

    def peak(self, lives: int) -> int | None:
        """The most that was alive; None: nobody knows. As for :meth:`layers`."""
        found = self.layers(lives, set())
        return None if found is None else max(one.alive for pair in found for part in pair for one in part)

    def unpacking(self, unpack: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
        """An unpack hook that looks who asks, and so finds the nodes."""

        def look_and_unpack(handle: Any) -> torch.Tensor:
            self._asked()
            return unpack(handle)

        return look_and_unpack

    def _asked(self) -> None:
        task = _graph_task()
        if not self.is_awaited or task == -1 or self._task not in (None, task):
            return  # a backward in a node of another one is that node's
        if self._task is None:
            self._task = task
            self._early.watch(task)
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            engine.queue_callback(self._backward_over)
        node = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() not in self._numbers:
            number = node._sequence_nr()
            before = self._now()
            self._watch(node)
            if self._device == "cpu":
                self._others += self._now() - before
            self._enters(number, (node.name(),), ())

    def _watch(self, node: Any) -> None:
        """Put hooks on a node and all that it leads to."""
        waiting = [node]
        while waiting:
            node = waiting.pop()
            number, name = node._sequence_nr(), node.name()
            if number in self._numbers or name == "torch::autograd::AccumulateGrad":
                continue
            self._numbers.add(number)
            self._waiting.add(number)
            node.register_prehook(partial(self._enters, number, (name,)))
            parameters = [_parameter(following) for following, _ in node.next_functions]
            node.register_hook(partial(self._leaves, number, parameters))
            waiting += [following for following, _ in node.next_functions if following is not None]

    def _enters(self, number: int, kind: tuple[Any, ...], gradients: Any) -> None:
        if _graph_task() != self._task:
            return
        self._waiting.discard(number)
        kind += tuple([one.shape for one in gradients if isinstance(one, torch.Tensor)])
        alive = self._now() - self._others
        if torch.autograd._profiler_enabled():
            self.is_blind = True
        elif self._windows < MANY or kind not in self._transient:
            self._windows += 1
            early = self._early.begin()
            self._window = _Window(number, alive, kind, self._standing_results(), early, start())
        else:
            self._window = _Window(number, alive, kind, self._standing_results(), self._early.now(), None)

    def _leaves(self, number: int, parameters: Sequence[int | None], gradients: Any, *_: Any) -> None:
        window = self._window
        if window is None or window.number != number or _graph_task() != self._task:
            return
        self._window = None
        number, alive, kind, results, early, running = window
        if running is None:
            alive = max(alive, self._now() - self._others) + self._transient[kind]
            stand = results.items() & self._standing_results().items()  # in all of it
            early = dict(self._early.now().items() & early.items())
            self._note(number, Moment(alive, standing(dict(stand)), early=together(early)))
            self._adds_up(number, parameters, gradients)
            return
        if not torch.autograd._profiler_enabled():
            self.is_blind = True
            return
        events = stop(running, self._device)
        del window, running  # a profiler takes memory itself
        net = sum(event.size for event in events)
        still = self._early.end({*made(events)} - {*self._standing_results().values()})
        moments = of_node(events, results, early, still)
        if self._overwrites(self._layer(number), gradients):
            moments = [one._replace(overwriting=True) for one in moments]
        transient = max(one.alive for one in moments) - max(0, net)
        self._transient[kind] = max(transient, self._transient.get(kind, 0))
        for one in moments:
            self._note(number, one._replace(alive=alive + one.alive))
        if self._device == "cpu":
            self._others = self._now() - alive - net
            self.gone += gone(events, self._here)
        self._adds_up(number, parameters, gradients)

    def _adds_up(self, number: int, parameters: Sequence[int | None], gradients: Any) -> None:
        """Where a parameter's gradient comes second, a sum is made beside both when the node is over."""
        alive = self._now() - self._others
        for parameter, gradient in zip(parameters, gradients, strict=False):
            if parameter is None or not isinstance(gradient, torch.Tensor):
                continue
            if parameter in self._arrived:
                self._note(number, Moment(alive + gradient.nbytes, standing(self._standing_results())))
            self._arrived.add(parameter)

    def _standing_results(self) -> dict[int, int]:
        """Where results stand that the backward has rebuilt, by layer."""
        storages = {layer: ref() for layer, ref in self._results.items()}
        self._results = {layer: ref for layer, ref in self._results.items() if storages[layer] is not None}
        return {layer: one.data_ptr() for layer, one in storages.items() if one is not None}

    def _overwrites(self, layer: int, gradients: Any) -> bool:
        """Whether a node gave back a gradient in the memory of the layer's result."""
        result = self._results[layer]() if layer in self._results else None
        plain = (one for one in gradients if isinstance(one, torch.Tensor) and is_plain(one))
        return result is not None and any(one.untyped_storage() is result for one in plain)

    def _backward_over(self) -> None:
        self._done, self._task = True, None
        self._after = self._now() - self._others

    def _layer(self, number: int) -> int:
        return bisect_right(self._begins, number + 1)

    def _note(self, number: int, moment: Moment) -> None:
        self._backward.append((self._layer(number), moment, len(self._numbers) - len(self._waiting)))

    def _now(self) -> int:
        return (given_out(self._device) or 0) - self._before.get(self._device, 0)


def _parameter(node: Any) -> int | None:
    """The id of the parameter whose gradients come together in a node."""
    return id(node.variable) if hasattr(node, "variable") else None
