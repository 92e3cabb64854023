"""A chain of reversible blocks as one autograd function: what its backward needs, and how it walks.

The one idea: a run of the chain is an object that outlives the forward by as little as it can: its outputs,
and how to run each branch again. Source: Zhang and Zhang, AAAI 2024 (arXiv 2312.07922); Gomez et al.,
NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.coupling import Streams, couple, entered
from snn_reversible_plugin.blocks.inner_backward import Totals, sharded_modules
from snn_reversible_plugin.blocks.promised_states import PromisedStates, Undoing
from snn_reversible_plugin.blocks.second_run import BranchRun, How, shared_parameters
from snn_reversible_plugin.blocks.unchanged import Unchanged
from snn_reversible_plugin.blocks.undo import Flips, Undo, difference, flipped
from snn_reversible_plugin.grid import reach, watch
from snn_reversible_plugin.modules.kinds import load_adapters
from snn_reversible_plugin.modules.states import Key, state_tensors
from snn_reversible_plugin.ops.batched import comes_again, one_by_one
from snn_reversible_plugin.ops.layouts import with_strides
from snn_reversible_plugin.tape.unseen import checksum

# NOTE [How the backward walks]
#
# 1. From the last block to the first, G before F: x2 = y2 - snap(G(y1)), x1 = y1 - snap(F(x2)). One run of
#    each branch, with a graph, gives the value to subtract and the gradient.
# 2. Parameters, and states that have a gradient, are inputs of the one autograd function, their gradients
#    its outputs, so that accumulation, DistributedDataParallel, hooks and `torch.autograd.grad` see what
#    they see of any module.
# 3. Each rebuilt stream gets the strides of the forward's: a kernel may round by layout.
# 4. The range is checked on what is rebuilt (grid, note 3), when the whole backward is over (grid.range).
# 5. What the second run reads by reference (parameters, statistics of norms in evaluation) must be
#    unchanged; version counters say so. They don't see `parameter.data = ...`.

Update = tuple[str, nn.Module, str]  # what errors call a branch, the block that runs it, the branch's name


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
    run = _Run(chain, updates, dim, parameters)
    inputs = (x1, x2, *parameters, *(state for _, state in run.states))
    outs = _Chain.apply(run, *inputs)  # type: ignore[no-untyped-call]
    streams = 2 if dim is None else 1
    tape.mark_opaque(*outs)
    for (table, key), state in zip(run.exits, outs[streams:], strict=True):
        if (id(table), key) in run.promised.places:
            run.promised.may_be_read((id(table), key), state)
        else:
            table[key] = state
    run.promised.places.clear()
    return outs[:streams]  # type: ignore[no-any-return]


class _Run:
    """One forward of a chain: what its backward needs besides tensors."""

    def __init__(
        self, chain: Any, updates: Sequence[Update], dim: int | None, parameters: list[nn.Parameter]
    ) -> None:
        self.chain, self.dim, self.parameters = chain, dim, parameters
        self.bits, self.check = chain.bits, chain.check
        self.carries = chain.states == "carry"
        load_adapters()
        how = How(
            tape.mode_inside(chain.mode), observe=chain.check, inspect=chain.check or not chain._inspected
        )
        self.branches = [BranchRun(*update, how) for update in updates]
        self.shared = shared_parameters(self.branches)
        self.strides: list[tuple[int, ...]] = []
        self.checksums: list[Tensor] = []
        self.exits: list[tuple[dict[str, Any], str]] = []
        self.original: Streams | None = None
        in_backward = torch._C._current_graph_task_id() != -1
        promises = self.carries and not in_backward and not sharded_modules(chain)
        self.promised = PromisedStates(self.branches, chain.modules() if promises else ())
        self.states = state_tensors(chain) if self.carries else []

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Streams, list[list[Tensor]], Undoing]:
        """Run every branch."""
        try:
            return self._forward(x1, x2)
        except BaseException:
            self.promised.take_back()
            raise

    def _forward(self, x1: Tensor, x2: Tensor) -> tuple[Streams, list[list[Tensor]], Undoing]:
        # a and b are the streams, and take turns.
        a, b = entered(x1, x2, self.bits)
        if self.check:
            self.original = (a.detach().clone(), b.detach().clone())
        kept = []
        wanted = {key for key, _ in self.states}
        exits: dict[Key, tuple[dict[str, Any], str]] = {}
        undoing = Undoing(self.walk_without_graph)
        for branch in self.branches:
            branch.wanted = set(wanted)
            self.strides.append(a.stride())
            if self.check:
                self.checksums.append(checksum(a))
            a, b = b, couple(branch.name, a, branch.first(b), self.bits)
            kept.append(branch.tensors())
            exits.update({(id(table), key): (table, key) for table, key in branch.exits()})
            wanted |= set(exits)
            self.promised.promise(branch, undoing)
        self.strides.append(a.stride())
        self.exits = list(exits.values()) if self.carries else []
        self.unchanged = Unchanged(self.chain, "RevSSequence")
        return (a, b), kept, undoing

    def walk_without_graph(self, streams: Sequence[Tensor], kept: list[list[Tensor]]) -> None:
        """Undo the chain for the states that its neurons were left in."""
        self.unchanged.check()
        if not self.unchanged.same_parameters():
            raise RuntimeError(
                "RevSSequence: its parameters are not those that its forward ran with, so that the "
                "membranes can't be computed any more. Read a membrane right after the forward."
            )
        a, b = self._last(streams)
        for index in range(len(self.branches) - 1, -1, -1):
            undo = self._undo(index, b)
            undo(self.branches[index].without_graph((a,), kept[index]))
            a, b = undo.rebuilt, a

    def _last(self, outs: Sequence[Tensor]) -> Streams:
        """The two streams in the order in which the walk takes them."""
        if self.dim is None:
            a, b = outs
        else:
            a, b = (stream.clone() for stream in outs[0].chunk(2, self.dim))  # the output may go
        return with_strides(a, self.strides[-1]), b

    def _undo(self, index: int, stream: Tensor | None) -> Undo:
        # The first two undone are the outputs themselves, if those were a pair.
        owned = self.dim is not None or index < len(self.branches) - 2
        undo = Undo(self.strides[index], self.bits, owned, partial(self._see, index))
        undo.stream = stream
        return undo

    def watch(self, name: str, stream: Tensor) -> None:
        """Look at how far a stream reaches, when it is time."""
        if self.bits is not None:
            watch(f"RevSSequence: {name}", reach(stream), self.bits)

    def _see(self, index: int, rebuilt: Tensor) -> None:
        self.watch(f"the stream that {self.branches[index].name} is added to", rebuilt)
        if not self.check or self.bits is None:
            return
        if not torch.equal(checksum(rebuilt), self.checksums[index]):
            raise RuntimeError(
                f"{self.branches[index].name}: the rebuilt input differs from the forward's. The branch is "
                "not deterministic, reads something that has changed, or a stream left the grid's range. "
                "Make it deterministic, lower its gain, or set reversible=False."
            )

    def backward(
        self,
        outs: list[Tensor],
        kept: list[list[Tensor]],
        g_streams: tuple[Tensor | None, Tensor | None],
        g_states: dict[Key, Tensor],
        wanted: set[int],
    ) -> tuple[tuple[Tensor | None, Tensor | None], dict[int, Tensor]]:
        """Walk back with a graph of one branch at a time.

        Args:
            outs: the outputs, emptied: their last use is soon over.
            kept: the entry states of each branch that are tensors.
            g_streams: gradients of the two last streams.
            g_states: gradients of the states; in: at the chain's exit, out: at its entry.
            wanted: ids of the parameters that get a gradient.

        Returns:
            Gradients of the two first streams, and of the parameters by their ids.
        """
        (a, b), (g_a, g_b) = self._last(outs), g_streams
        outs.clear()
        del g_streams
        totals = Totals(self.shared)
        for name, output in (("first", a), ("second", b)):
            self.watch(f"the output's {name} stream", output)
        flips: dict[str, Flips] = {}
        for index in range(len(self.branches) - 1, -1, -1):
            branch = self.branches[index]
            # Forward: b = before + snap(branch(a)), where `before` and `a` were the streams.
            parameters = list({id(p): p for p in branch.parameters() if id(p) in wanted}.values())
            # Nobody reads the chain's first input stream.
            undo = self._undo(index, b if index or self.check else None)
            arrived = [g_b, g_a]
            del b, g_a
            leaf = a.detach().requires_grad_()
            (g_total,), g_parameters, spikes = branch.again(
                (leaf,), kept.pop(), parameters, undo, arrived, g_states
            )
            for parameter, g_p in zip(parameters, g_parameters, strict=True):
                totals.add(parameter, g_p)
            del g_parameters
            a, b = undo.rebuilt, a
            g_a, g_b = g_b, g_total
            if self.check:
                flips[branch.name] = flipped(branch.name, branch.spikes, spikes)
        self.chain._inspected = True
        if self.original is not None:
            self.chain.last_rebuild = difference((a, b), self.original, flips)
        return (g_a, g_b), totals


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x1: Tensor, x2: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with tape.paused(), tape.to_be_repeated():
            streams, kept, undoing = run.forward(x1, x2)
            outs = streams if run.dim is None else (torch.cat(streams, run.dim),)
        if run.promised.places:
            undoing.starts_from(outs, kept)
        ctx.run, ctx.counts, ctx.dtype = run, [len(tensors) for tensors in kept], x1.dtype
        ctx.save_for_backward(*outs, *(tensor for tensors in kept for tensor in tensors))
        given = {id(tensor) for tensor in (*outs, x1, x2, *_)}
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
        run: _Run = ctx.run
        if all(g is None for g in grads):  # reached through a state that nobody used
            return (None,) * len(ctx.needs_input_grad)
        run.unchanged.check()
        count = 2 if run.dim is None else 1
        outs, saved = list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        g_outs, g_exits = grads[:count], grads[count:]
        if run.dim is not None:
            g_outs = (None, None) if g_outs[0] is None else g_outs[0].chunk(2, run.dim)
        g_states: dict[Key, Tensor] = {
            (id(table), key): g for (table, key), g in zip(run.exits, g_exits, strict=True) if g is not None
        }
        if hasattr(ctx, "maybe_clear_saved_tensors") and not comes_again():
            ctx.maybe_clear_saved_tensors()
        kept = [[saved.pop(0) for _ in range(count)] for count in ctx.counts]
        wanted = {id(p) for p, on in zip(run.parameters, ctx.needs_input_grad[3:], strict=False) if on}
        found, totals = run.backward(outs, kept, g_outs, g_states, wanted)  # type: ignore[arg-type]
        g_streams = (None if g is None else g.to(ctx.dtype) for g in found)
        g_inputs = [totals.get(id(p)) for p in run.parameters]
        return (None, *g_streams, *g_inputs, *(g_states.get(key) for key, _ in run.states))
