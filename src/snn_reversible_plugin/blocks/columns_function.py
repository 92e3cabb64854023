"""Temporal columns as one autograd function: the walk from the last time step to the first.

The one idea: the top level of a step is undone first, since it hangs on nothing above it; then every level
below finds the state above as it was a step before. Source: Hu et al., ICML 2024 (arXiv 2405.16466).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.coupling import couple
from snn_reversible_plugin.blocks.inner_backward import Totals
from snn_reversible_plugin.blocks.second_run import BranchRun, How, shared_parameters
from snn_reversible_plugin.blocks.unchanged import Unchanged
from snn_reversible_plugin.blocks.undo import Flips, difference, flipped
from snn_reversible_plugin.grid import decay, reach, sub_snapped_, watch, when_over
from snn_reversible_plugin.grid.products import Factor, divide, factors, multiply
from snn_reversible_plugin.modules.kinds import load_adapters
from snn_reversible_plugin.modules.states import Key
from snn_reversible_plugin.ops.batched import comes_again, one_by_one
from snn_reversible_plugin.ops.layouts import with_strides
from snn_reversible_plugin.tape.unseen import checksum

# NOTE [How columns walk back]
#
# 1. At step t from the top level K - 1 to 0. When level k is undone, c[k-1](t) is not yet, and c[k+1](t-1)
#    has just been: these are its inputs. One run with a graph gives the value to take away and the
#    gradients; what is left is round(alpha * c[k](t-1)), which `grid.products` divides.
# 2. The gradient of c[k](t) is whole by then: it came from outside, from the product and from level k-1 at
#    step t+1, from level k+1 at step t, added up in this order, which is autograd's of the plain run.
# 3. The first step has no state before it, and its levels are not called with one.
# 4. Everything else is as in chains: parameters, states, strides, ranges (chain_function, the note there).
#
# Example, two levels, two steps: forward c0(0), c1(0), c0(1) of (x1, c1(0)), c1(1) of (c0(1)). Back: c1(1)
# less what level 1 makes of c0(1) is alpha c1(0), so c1(0) is known; c0(1) less what level 0 makes of
# (x1, c1(0)) is alpha c0(0), so c0(0) is; then step 0 has its gradients and nothing to rebuild.

States = tuple[Tensor, ...]
_OF_ROOM = (
    "Its magnitude became less than half, or too large, since the last backward, which made room for the "
    "remainders. There is room for it now: run this step again (capture a CUDA graph again), and change "
    "alpha less in one."
)


def next_state(name: str, before: Tensor | None, alpha: Tensor, out: Tensor, bits: int | None) -> Tensor:
    """A level's state, from the state before, with a graph: ``before`` is zeros where it is None."""
    if before is None:
        before = out.new_zeros((), dtype=_state_dtype(out, bits)).expand(out.shape)
    product = alpha * before if bits is None else decay(before, alpha, bits)
    return couple(name, product, out, bits)


def _state_dtype(out: Tensor, bits: int | None) -> torch.dtype:
    if bits is None or out.dtype in (torch.float16, torch.bfloat16):
        return torch.promote_types(out.dtype, torch.float32)
    return out.dtype


def run_reversibly(columns: Any, xs: Sequence[Tensor]) -> tuple[States, States]:
    """The last states of :class:`RevSColumns`, and the top level's at its ``tops_at`` before the end."""
    parameters = list(columns.parameters())
    inputs = list({id(x): x for x in xs}.values())
    run = _Run(columns, xs, inputs, parameters)
    outs = _Columns.apply(run, *inputs, *parameters)  # type: ignore[no-untyped-call]
    tape.mark_opaque(*outs)
    return outs[: run.levels], outs[run.levels :]


class _Run:
    """One forward of columns: what its backward needs besides tensors."""

    def __init__(
        self, columns: Any, xs: Sequence[Tensor], inputs: list[Tensor], parameters: list[nn.Parameter]
    ) -> None:
        self.columns, self.parameters = columns, parameters
        self.bits, self.check = columns.bits, columns.check
        self.steps, self.levels = len(columns.subnets), len(columns.subnets[0])
        self.tops_at = columns._tops_before_the_end()
        places = {id(x): place for place, x in enumerate(inputs)}
        self.places = [places[id(x)] for x in xs]  # of each step's input among the inputs
        load_adapters()
        how = How(
            tape.mode_inside(columns.mode), observe=self.check, inspect=self.check or not columns._inspected
        )
        self.branches = [
            [
                BranchRun(f"step {step}: level {k} ({level._get_name()})", level, None, how)
                for k, level in enumerate(levels)
            ]
            for step, levels in enumerate(columns.subnets)
        ]
        self.shared = shared_parameters(branch for of_step in self.branches for branch in of_step)
        alphas = [list(of_step) for of_step in columns.alphas]
        self.alphas = alphas
        self.factors: list[list[Factor]] = []
        self.seen: Tensor | None = None
        if self.bits is not None:
            every = [alpha for of_step in alphas for alpha in of_step]
            known, self.seen = factors(every, columns._room)
            found = iter(known)
            self.factors = [[next(found) for _ in of_step] for of_step in alphas]
        self.strides: list[list[tuple[int, ...]]] = []
        self.checksums: list[list[Tensor]] = []
        self.original: list[Tensor] = []

    # -- forward -------------------------------------------------------------------------------------------

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """The last states, the tops, and what is kept of each level's run: entry states, digits."""
        states: list[Tensor] = []
        tops, kept = [], []
        wanted: set[Key] = set()
        for step, place in enumerate(self.places):
            below = inputs[place]
            new: list[Tensor] = []
            for k, branch in enumerate(self.branches[step]):
                branch.wanted = set(wanted)
                out = branch.first(below, *states[k + 1 : k + 2])
                below, record = self._next(step, k, states[k] if states else None, out)
                kept += [branch.tensors(), record]
                wanted |= {(id(table), key) for table, key in branch.exits()}
                new.append(below)
            states = new
            self.strides.append([state.stride() for state in states])
            if self.check:
                self.checksums.append([checksum(state) for state in states])
                self.original = self.original or [state.clone() for state in states]
            if step in self.tops_at:
                tops.append(states[-1])
        self.unchanged = Unchanged(self.columns, "RevSColumns")
        return states, tops, kept

    def _next(self, step: int, k: int, before: Tensor | None, out: Tensor) -> tuple[Tensor, list[Tensor]]:
        name = self.branches[step][k].name
        if self.bits is not None and out.dtype is torch.float64:
            raise TypeError(
                f"{name} returned float64, in which a product of a state and alpha does not fit: "
                "RevSColumns on the grid takes float32. Use that, bits=None, or reversible=False."
            )
        if before is None or self.bits is None:
            return next_state(name, before, self.alphas[step][k], out, self.bits), []
        product, record = multiply(before, self.factors[step][k], self.bits)
        return couple(name, product, out, self.bits), record

    # -- backward ------------------------------------------------------------------------------------------

    def backward(
        self,
        states: list[Tensor],
        kept: list[list[Tensor]],
        inputs: Sequence[Tensor],
        g_states: list[Tensor | None],
        g_tops: list[Tensor | None],
        g_inputs: list[Tensor | None],
        wanted: set[int],
    ) -> dict[int, Tensor]:
        """Walk back.

        Args:
            states: the last ones; those before are rebuilt in their place.
            kept: of :meth:`forward`, emptied.
            inputs: those of the forward; the ones that require a gradient get one.
            g_states: gradients of the last states.
            g_tops: gradients of the tops, emptied.
            g_inputs: filled.
            wanted: ids of the parameters that get a gradient.

        Returns:
            The parameters' gradients by their ids.
        """
        totals = Totals(self.shared)
        g_of_neurons: dict[Key, Tensor] = {}
        flips: dict[str, Flips] = {}
        if self.seen is not None:
            when_over(partial(self.columns._room.look, self.seen))
        for k, state in enumerate(states):
            self._watch(f"level {k}'s last state", state)
        for step in range(self.steps - 1, -1, -1):
            place = self.places[step]
            for k in range(self.levels - 1, -1, -1):
                branch, record, entry = self.branches[step][k], kept.pop(), kept.pop()
                above = states[k + 1 : k + 2] if step else []
                leaves = [(states[k - 1] if k else inputs[place]).detach()]
                leaves[0].requires_grad_(bool(k) or inputs[place].requires_grad)
                leaves += [state.detach().requires_grad_() for state in above]
                g = g_states[k]
                arrived = [
                    g,
                    g_states[k - 1] if k else g_inputs[place],
                    *g_states[k + 1 : k + 2][: len(above)],
                ]
                parameters = list({id(p): p for p in branch.parameters() if id(p) in wanted}.values())
                undo = self._undo(step, k, states, record)
                g_leaves, g_parameters, spikes = branch.again(
                    leaves, entry, parameters, undo, arrived, g_of_neurons
                )
                if k:
                    g_states[k - 1] = g_leaves[0]
                else:
                    g_inputs[place] = g_leaves[0]
                if above:
                    g_states[k + 1] = g_leaves[1]
                g_states[k] = self._through_product(step, k, g, states[k], totals, wanted)
                if k == self.levels - 1 and step - 1 in self.tops_at:
                    g_states[k] = _sum(g_tops.pop(), g_states[k])
                for parameter, g_p in zip(parameters, g_parameters, strict=True):
                    totals.add(parameter, g_p)
                del g_parameters, g_leaves
                if self.check:
                    flips[branch.name] = flipped(branch.name, branch.spikes, spikes)
        self.columns._inspected = True
        if self.check:
            self.columns.last_rebuild = difference(states, self.original, flips)
        return totals

    def _undo(
        self, step: int, k: int, states: list[Tensor], record: Sequence[Tensor]
    ) -> Callable[[Tensor], None]:
        """Takes what the level computed away from its state, and then alpha."""

        def undo(out: Tensor) -> None:
            if not step:  # nobody reads the states before the first step
                return
            state = states[k]
            if step == self.steps - 1 and self.bits is not None:
                state = states[k] = state.clone()  # the user's until now
            if self.bits is None:
                before = (state - out) / self.alphas[step][k].detach()
            else:
                sub_snapped_(state, out, self.bits)
                name, factor = self.branches[step][k].name, self.factors[step][k]
                self._watch(f"{name}: alpha times its state before", state)
                if factor.reach is not None:
                    watch(
                        f"RevSColumns: {name}'s product with alpha", factor.reach, self.bits, lost=_OF_ROOM
                    )
                before = divide(state, factor, record, self.bits)
                self._watch(f"{name}: its state before", before)
            states[k] = with_strides(before, self.strides[step - 1][k])
            if self.check and self.bits is not None:
                self._compare(step, k, states[k])

        return undo

    def _compare(self, step: int, k: int, rebuilt: Tensor) -> None:
        if not torch.equal(checksum(rebuilt), self.checksums[step - 1][k]):
            raise RuntimeError(
                f"{self.branches[step][k].name}: its rebuilt state differs from the forward's. The level "
                "is not deterministic, reads something that has changed, or a state left the grid's range. "
                "Make it deterministic, lower its gain, or set reversible=False."
            )

    def _watch(self, name: str, state: Tensor) -> None:
        if self.bits is not None:
            watch(f"RevSColumns: {name}", reach(state), self.bits)

    def _through_product(
        self,
        step: int,
        k: int,
        g: Tensor | None,
        before: Tensor,
        totals: Totals,
        wanted: set[int],
    ) -> Tensor | None:
        """The gradient of the state before; alpha's goes to the totals."""
        alpha = self.alphas[step][k]
        if g is None:
            return None
        if id(alpha) in wanted:
            g_alpha = (
                (g * before).sum_to_size(alpha.shape).to(alpha.dtype) if step else torch.zeros_like(alpha)
            )
            totals.add(alpha, g_alpha)
        return g * alpha.detach() if step else None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        inputs = tensors[: len(tensors) - len(run.parameters)]
        with tape.paused(), tape.to_be_repeated():
            states, tops, kept = run.forward(inputs)
        ctx.run, ctx.counts = run, [len(found) for found in kept]
        ctx.save_for_backward(*states, *inputs, *(tensor for found in kept for tensor in found))
        return (*states, *tops)

    @staticmethod
    @one_by_one
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        nothing = (None,) * len(ctx.needs_input_grad)
        if all(g is None for g in grads):
            return nothing
        run.unchanged.check()
        count = len(nothing) - 1 - len(run.parameters)
        saved = list(ctx.saved_tensors)
        states = [state.detach() for state in saved[: run.levels]]
        inputs, saved = saved[run.levels : run.levels + count], saved[run.levels + count :]
        kept = [[saved.pop(0) for _ in range(length)] for length in ctx.counts]
        if hasattr(ctx, "maybe_clear_saved_tensors") and not comes_again():
            ctx.maybe_clear_saved_tensors()
        wanted = {
            id(p) for p, on in zip(run.parameters, ctx.needs_input_grad[1 + count :], strict=True) if on
        }
        g_states, g_tops = list(grads[: run.levels]), list(grads[run.levels :])
        g_inputs: list[Tensor | None] = [None] * count
        totals = run.backward(states, kept, inputs, g_states, g_tops, g_inputs, wanted)
        dtyped = (None if g is None else g.to(x.dtype) for g, x in zip(g_inputs, inputs, strict=True))
        return (None, *dtyped, *(totals.get(id(p)) for p in run.parameters))
