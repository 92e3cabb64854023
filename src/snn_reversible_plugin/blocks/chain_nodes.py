"""A run of a chain in autograd's graph: a few nodes one behind the other, so that gradients need not wait.

The one idea: a node returns all its gradients at once, and a chain's parameters may be most of a network's.
So the chain's backward is cut into segments, a node each, and autograd accumulates (steps, reduces) what a
segment's parameters got before the next one begins. The last node computes the whole forward and holds its
outputs; the others hold nothing, and are tied to it by a number without a meaning. Source: this package's
own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.chain_function import WAITING, ChainRun, Update, Walk
from snn_reversible_plugin.grid.range import when_over
from snn_reversible_plugin.modules.states import Key
from snn_reversible_plugin.ops.batched import comes_again, one_by_one
from snn_reversible_plugin.tape.replayed import keeps_graph

# NOTE [Segments]
#
# 1. In the graph: entry (streams, states, parameters) -> number -> ... -> number -> exit, whose outputs are
#    the chain's. The walk of a backward goes from the exit to the entry, and stands in between among the
#    run's `walks`, by backward. Of a batch of gradients each node has the same ones in the same order.
# 2. A parameter goes in where its first branch is, which is undone last, so that its gradient is whole.
# 3. Whether parameters are unchanged is looked at once, at the exit: those of later segments may have been
#    stepped when an earlier one runs, and nobody needs them any more.
# 4. A node costs time: a segment goes on until its parameters are worth one.
# 5. A state is an input, whether the branch reads it or not: only the second run tells. A loop whose
#    neurons are reset inside of a branch (snnTorch's `mem = self.lif.reset_mem()`) would go back through
#    all steps before it. So a state whose graph has gone with its backward goes in without one, and if it
#    was read after all, the backward raises, as autograd does there.
# 6. In mode "minimal" a branch with several large weights is several segments. The first of them to run
#    undoes and differentiates the branch, where a convolution's weight that is larger than what goes
#    through it gets no gradient, but how to compute it (tape.sliced.later): its own segment does. For
#    example a branch of two convolutions of 448 channels, [4 * 8, 448, 4, 4]: weights' gradients are 7.2 MB
#    each, of which one stands at a time; what waits is two tensors of 0.9 MB for each.


def run_reversibly(
    chain: Any, updates: Sequence[Update], x1: Tensor, x2: Tensor, dim: int | None
) -> tuple[Tensor, ...]:
    """Run branches one after the other, keeping the outputs alone.

    Args:
        chain: the :class:`RevSSequence`, for its settings.
        updates: its branches in order.
        x1, x2: the streams.
        dim: in which the output is put together; None for two streams.
    """
    parameters = [p for p in chain.parameters() if p.requires_grad]
    nodes = _Nodes(ChainRun(chain, updates, dim, parameters), (x1, x2))
    run = nodes.run
    inputs: tuple[Tensor, ...] = (x1, x2, *nodes.starts())
    *before, last = nodes.segments(parameters)
    for index, (first, of_segment) in enumerate(before):
        inputs = (_Entry.apply(nodes, index, first, len(inputs), *inputs, *of_segment),)  # type: ignore[no-untyped-call]
    outs = _Exit.apply(nodes, len(before), last[0], len(inputs), *inputs, *last[1])  # type: ignore[no-untyped-call]
    streams = 2 if dim is None else 1
    tape.mark_opaque(*outs)
    if dim is not None and run.holds_streams:
        tape.mark_put_together(outs[0], nodes.streams, dim)
    del nodes.streams
    for (table, key), state in zip(run.exits, outs[streams:], strict=True):
        if (id(table), key) in run.promised.places:
            run.promised.may_be_read((id(table), key), state)
        else:
            table[key] = state
    run.promised.places.clear()
    return outs[:streams]  # type: ignore[no-any-return]


class _Nodes:
    """What the nodes of one run share. ``streams`` are the chain's first, until the forward has run."""

    def __init__(self, run: ChainRun, streams: tuple[Tensor, Tensor]) -> None:
        self.run, self.streams, self.dtype = run, streams, streams[0].dtype
        self.walks: dict[int, deque[Walk]] = {}  # by backward
        self.is_over = False  # its graph has gone with a backward
        self.from_the_past: set[Key] = set()  # states that the graph of an earlier run gave, which is over

    def starts(self) -> list[Tensor]:
        """The states that the run starts from, without the graphs that are over."""
        found = []
        for key, state in self.run.states:
            if is_over := _is_over(state):
                self.from_the_past.add(key)
            found.append(state.detach() if is_over else state)
        return found

    def segments(self, parameters: Sequence[nn.Parameter]) -> list[tuple[int, list[nn.Parameter]]]:
        """The first branch of each segment, and the parameters whose gradients it returns."""
        left = {id(p): p for p in parameters}
        found: list[tuple[int, list[nn.Parameter]]] = [(0, [])]
        of_branches = []
        for branch in self.run.branches:
            ids = dict.fromkeys(id(p) for p in branch.parameters())
            of_branches.append([left.pop(one) for one in ids if one in left])
        for index, own in enumerate(of_branches):
            for place, some in enumerate(self.run.apart(own)):
                if place or (sum(p.nbytes for p in found[-1][1]) >= WAITING and some):
                    found.append((index, []))
                found[-1][1].extend(some)
        found[0][1].extend(left.values())  # of no branch
        return found

    def begun(self, walk: Walk) -> None:
        """A walk has to stand until the next node is reached."""
        task = torch._C._current_graph_task_id()
        if task not in self.walks:
            self.walks[task] = deque()

            def over() -> None:
                self.walks.pop(task, None)

            when_over(over)
        self.walks[task].append(walk)

    def backward(self, ctx: Any, walk: Walk) -> tuple[Tensor | None, ...]:
        """A segment's gradients."""
        needs = ctx.needs_input_grad[4:]
        goes_on = ctx.index > 0 and needs[0]
        first = ctx.first if goes_on else 0
        self.run.walk_back(walk, first)
        of_parameters = [walk.totals.take(one) for one in ctx.parameters]
        if goes_on:
            self.begun(walk)
            return (None, None, None, None, _number(walk.b), *of_parameters)
        if ctx.index:  # nothing before needs a gradient
            return (None, None, None, None, None, *of_parameters)
        if used := self.from_the_past & walk.g_states.keys():
            raise RuntimeError(
                "Trying to backward through the graph a second time: RevSSequence starts from the state "
                f"{min(name for _, name in used)!r} that an earlier step has left, whose backward is over. "
                "Reset its neurons before each step, or detach their states (functional.reset_net and "
                "detach_net of SpikingJelly, utils.reset and detach_hidden of snnTorch), or keep the "
                "earlier graph with retain_graph=True."
            )
        g_streams = (None if g is None else g.to(self.dtype) for g in (walk.g_a, walk.g_b))
        g_states = (walk.g_states.get(key) for key, _ in self.run.states)
        return (None, None, None, None, *g_streams, *g_states, *of_parameters)


def _is_sole(tensors: list[Tensor], index: int) -> bool:
    """Whether nobody but the list holds a tensor."""
    found, fresh = tape.references(tensors[index]), [torch.empty(1, device="cpu")]
    return found is not None and found == tape.references(fresh[0])


def _is_over(state: Tensor) -> bool:
    """Whether the graph that gave a state, a chain's, has gone with a backward."""
    node: Any = state.grad_fn
    if node is not None and node.name() == "_ReadBackward":  # of a promise
        node = node.next_functions[0][0]
    nodes = getattr(node, "nodes", None)
    return isinstance(nodes, _Nodes) and nodes.is_over


def _number(like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.float32)


def _sets_up(ctx: Any, nodes: _Nodes, index: int, first: int, tensors: Sequence[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.nodes, ctx.index, ctx.first = nodes, index, first
    ctx.parameters = [id(p) for p in tensors]


class _Entry(torch.autograd.Function):
    """A segment that is not the last."""

    @staticmethod
    def forward(ctx: Any, nodes: _Nodes, index: int, first: int, count: int, *tensors: Tensor) -> Tensor:
        with tape.paused():
            _sets_up(ctx, nodes, index, first, tensors[count:])
            return _number(nodes.streams[0])

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, number: Tensor | None) -> tuple[Tensor | None, ...]:
        if number is None:
            return (None,) * len(ctx.needs_input_grad)
        walk = ctx.nodes.walks[torch._C._current_graph_task_id()].popleft()
        return ctx.nodes.backward(ctx, walk)  # type: ignore[no-any-return]


class _Exit(torch.autograd.Function):
    """The last segment, which runs the chain."""

    @staticmethod
    def forward(
        ctx: Any, nodes: _Nodes, index: int, first: int, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        run, (x1, x2) = nodes.run, nodes.streams
        with tape.paused(), tape.to_be_repeated():
            _sets_up(ctx, nodes, index, first, tensors[count:])
            del nodes.streams
            nodes.streams, kept, undoing = run.forward(x1, x2)
            outs = nodes.streams if run.dim is None else (torch.cat(nodes.streams, run.dim),)
            held = nodes.streams if run.holds_streams else outs
        if run.dim is not None and run.holds_streams:
            tape.mark_opaque(*held)
        if run.promised.places:
            undoing.starts_from(held, kept)
        ctx.counts = [len(tensors) for tensors in kept]
        ctx.save_for_backward(*held, *(tensor for tensors in kept for tensor in tensors))
        given = {id(tensor) for tensor in (*outs, x1, x2, *tensors, *(state for _, state in run.states))}
        states = []
        for table, key in run.exits:
            place = run.promised.places.get((id(table), key))
            state = table[key] if place is None else place
            states.append(state.clone() if id(state) in given else state)
            given.add(id(states[-1]))
        return (*outs, *states)

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: ChainRun = ctx.nodes.run
        ctx.nodes.is_over = not (keeps_graph() or comes_again())
        if all(g is None for g in grads):  # reached through a state that nobody used
            return (None,) * len(ctx.needs_input_grad)
        run.unchanged.check()
        owns_gradients = False
        if run.in_slices and run.dim is not None:
            run.chain.try_out(_Exit)
            owns_gradients = tape.is_alone(_Exit, tape.references(grads[0]))
        count = 2 if run.dim is None else 1
        g_outs, g_exits = grads[:count], grads[count:]
        count = 2 if run.holds_streams else 1
        tensors = list(ctx.saved_tensors)  # once: a checkpoint around the chain gives them once
        held, saved = tensors[:count], tensors[count:]
        tensors.clear()
        if run.dim is not None:
            g_outs = (None, None) if g_outs[0] is None else g_outs[0].chunk(2, run.dim)
        g_states: dict[Key, Tensor] = {
            (id(table), key): g for (table, key), g in zip(run.exits, g_exits, strict=True) if g is not None
        }
        if hasattr(ctx, "maybe_clear_saved_tensors") and not comes_again():
            ctx.maybe_clear_saved_tensors()
        kept = [[saved.pop(0) for _ in range(count)] for count in ctx.counts]
        owns_streams = not run.holds_streams or all(_is_sole(held, index) for index in range(count))
        streams = run.last(held)
        held.clear()  # their last use is soon over
        walk = Walk(streams, kept, g_outs, g_states, run.shared, (owns_streams, owns_gradients))
        del streams, g_outs, g_states, kept, grads
        return ctx.nodes.backward(ctx, walk)  # type: ignore[no-any-return]
