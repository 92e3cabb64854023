"""One run of a chain of reversible blocks: what its backward needs, and how it walks.

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

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.coupling import Streams, couple, entered
from snn_reversible_plugin.blocks.inner_backward import Totals, sharded_modules
from snn_reversible_plugin.blocks.promised_states import PromisedStates, Undoing
from snn_reversible_plugin.blocks.second_run import BranchRun, How, shared_parameters, shared_tables
from snn_reversible_plugin.blocks.unchanged import Unchanged
from snn_reversible_plugin.blocks.undo import Flips, Undo, difference, flipped
from snn_reversible_plugin.grid import reach, watch
from snn_reversible_plugin.modules.kinds import load_adapters
from snn_reversible_plugin.modules.states import Key, state_tensors
from snn_reversible_plugin.ops.layouts import storage_key, with_strides
from snn_reversible_plugin.tape.unseen import checksum

# NOTE [How the backward walks]
#
# 1. From the last block to the first, G before F: x2 = y2 - snap(G(y1)), x1 = y1 - snap(F(x2)). One run of
#    each branch, with a graph, gives the value to subtract and the gradient.
# 2. Parameters, and states that have a gradient, are inputs of autograd functions, their gradients its
#    outputs, so that accumulation, DistributedDataParallel, hooks and `torch.autograd.grad` see what they
#    see of any module (`chain_nodes`).
# 3. Each rebuilt stream gets the strides of the forward's: a kernel may round by layout.
# 4. The range is checked on what is rebuilt (grid, note 3), when the whole backward is over (grid.range).
# 5. What the second run reads by reference (parameters, statistics of norms in evaluation) must be
#    unchanged; version counters say so. They don't see `parameter.data = ...`.
# 6. Where all around it is in mode "minimal", the chain holds its two last streams and not the tensor that
#    they are put together to, which is a recipe (`tape.mark_put_together`). Streams that nobody else holds
#    when their turn comes, as counts of references say, are undone in place, and gradients that came as one
#    tensor of nobody else's are added to in place. So of n bytes of output 2 n stand in the walk, and what
#    a branch has of one stream. With its output held, the walk would begin with 3 n: copies of the streams
#    beside it and its gradient.

WAITING = 1 << 20  # bytes of gradients that may wait for others

Update = tuple[str, nn.Module, str]  # what errors call a branch, the block that runs it, the branch's name


class Walk:
    """Where a walk back through a chain stands.

    Args:
        streams: the chain's last two.
        kept: the entry states that are tensors, of each branch that is not undone yet.
        g_streams: gradients of the streams, until the next branch is differentiated.
        g_states: gradients of the states; at first at the chain's exit, in the end at its entry.
        shared: ids of the parameters that several branches have.
        owned: whether nobody else reads the streams, and the gradients.
    """

    def __init__(
        self,
        streams: Streams,
        kept: list[list[Tensor]],
        g_streams: Sequence[Tensor | None],
        g_states: dict[Key, Tensor],
        shared: set[int],
        owned: tuple[bool, bool],
    ) -> None:
        self.a: Any
        self.b: Any
        (self.a, self.b), (self.g_a, self.g_b) = streams, g_streams
        self.owns_streams, self.owns_gradients = owned
        self.kept, self.g_states, self.totals = kept, g_states, Totals(shared)
        self.flips: dict[str, Flips] = {}


class ChainRun:
    """One forward of a chain: what its backward needs besides tensors.

    Args:
        chain: the :class:`RevSSequence`, for its settings.
        updates: its branches in order.
        dim: in which the output is put together; None for two streams.
        parameters: those that get a gradient.
    """

    def __init__(
        self, chain: Any, updates: Sequence[Update], dim: int | None, parameters: list[nn.Parameter]
    ) -> None:
        self.chain, self.dim, self.wanted = chain, dim, set(map(id, parameters))
        self.bits, self.check = chain.bits, chain.check
        self.carries = chain.states == "carry"
        load_adapters()
        how = How(
            tape.mode_inside(chain.mode),
            observe=chain.check,
            inspect=chain.check or not chain._inspected,
        )
        self.branches = [BranchRun(*update, how) for update in updates]
        recorded = tape.is_recording() and tape.mode_inside("") == "minimal"
        self.holds_streams = dim is None or recorded  # and not what they are put together to
        self.in_slices = how.mode == "minimal"
        self.shared = shared_parameters(self.branches)
        if self.in_slices:
            for branch in self.branches:
                branch.may_wait = {id(p) for p in branch.parameters() if p.nbytes >= WAITING} - self.shared
        self.strides: list[tuple[int, ...]] = []
        self.checksums: list[Tensor] = []
        self.exits: list[tuple[dict[str, Any], str]] = []
        self.original: Streams | None = None
        in_backward = torch._C._current_graph_task_id() != -1
        promises = self.carries and not in_backward and not sharded_modules(chain)
        self.promised = PromisedStates(self.branches, chain.modules() if promises else ())
        self.states = state_tensors(chain) if self.carries else []
        if not self.carries:
            read_again = shared_tables(self.branches)
            for branch in self.branches:
                branch.forgets = read_again.isdisjoint(branch.tables())

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
        tape.let_go(x1)
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
            if branch.forgets:
                branch.forget_states()  # now, or every block's would stand until the chain has run
        self.strides.append(a.stride())
        self.exits = list(exits.values()) if self.carries else []
        self.unchanged = Unchanged(self.chain, "RevSSequence")
        return (a, b), kept, undoing

    def apart(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """A branch's parameters, in parts whose gradients need not stand at once."""
        may_wait = set().union(*(branch.may_wait for branch in self.branches))
        parts: list[list[nn.Parameter]] = [[]]
        for one in parameters:
            if id(one) in may_wait and any(id(other) in may_wait for other in parts[-1]):
                parts.append([])
            parts[-1].append(one)
        return parts

    def walk_without_graph(self, streams: Sequence[Tensor], kept: list[list[Tensor]]) -> None:
        """Undo the chain for the states that its neurons were left in."""
        self.unchanged.check()
        if not self.unchanged.same_parameters():
            raise RuntimeError(
                "RevSSequence: its parameters are not those that its forward ran with, so that the "
                "membranes can't be computed any more. Read a membrane right after the forward."
            )
        a, b = self.last(streams)
        for index in range(len(self.branches) - 1, -1, -1):
            undo = self._undo(index, b, not self.holds_streams)
            undo(self.branches[index].without_graph((a,), kept[index]))
            a, b = undo.rebuilt, a

    def last(self, outs: Sequence[Tensor]) -> Streams:
        """The two streams in the order in which the walk takes them."""
        if self.holds_streams:
            a, b = outs
        else:
            assert self.dim is not None
            a, b = (stream.clone() for stream in outs[0].chunk(2, self.dim))  # the output may go
        return with_strides(a, self.strides[-1]), b

    def _undo(self, index: int, stream: Tensor | None, owns_streams: bool) -> Undo:
        # The first two undone are what was held.
        owned = owns_streams or index < len(self.branches) - 2
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

    def walk_back(self, walk: Walk, first: int) -> None:
        """Walk back to a branch, ``first`` included, with a graph of one branch at a time."""
        left = len(walk.kept)
        if left == len(self.branches):
            for name, output in (("first", walk.a), ("second", walk.b)):
                self.watch(f"the output's {name} stream", output)
        for index in range(left - 1, first - 1, -1):
            self._step_back(walk, index)
        if first or not left:  # all were undone already: the rest of the first one's gradients
            return
        self.chain._inspected = True
        if self.original is not None:
            self.chain.last_rebuild = difference((walk.a, walk.b), self.original, walk.flips)

    def _step_back(self, walk: Walk, index: int) -> None:
        branch = self.branches[index]
        # Forward: b = before + snap(branch(a)), where `before` and `a` were the streams.
        parameters = list({id(p): p for p in branch.parameters() if id(p) in self.wanted}.values())
        # Nobody reads the chain's first input stream.
        undo = self._undo(index, walk.b if index or self.check else None, walk.owns_streams)
        before = walk.g_a if walk.owns_gradients else None
        arrived = [walk.g_b, walk.g_a if before is None else None]
        walk.b = walk.g_a = None
        leaf = walk.a.detach().requires_grad_()
        (g_total,), g_parameters, spikes = branch.again(
            (leaf,), walk.kept.pop(), parameters, undo, arrived, walk.g_states
        )
        if before is not None:  # what is passed on as it came is not written over
            g_parameters = [_apart_from(before, g) for g in g_parameters]
            walk.g_states.update({key: _apart_from(before, g) for key, g in walk.g_states.items()})
        for parameter, g_p in zip(parameters, g_parameters, strict=True):
            walk.totals.add(parameter, g_p)
        if before is not None:
            g_total = before if g_total is None else before.add_(g_total)
        walk.a, walk.b = undo.rebuilt, walk.a
        walk.g_a, walk.g_b = walk.g_b, g_total
        if self.check:
            walk.flips[branch.name] = flipped(branch.name, branch.spikes, spikes)


def _apart_from(gradient: Tensor, other: Any) -> Any:
    """Another gradient, or whatever there is instead of one, in memory of its own."""
    shares = isinstance(other, Tensor) and storage_key(other) == storage_key(gradient)
    return other.clone() if shares else other
