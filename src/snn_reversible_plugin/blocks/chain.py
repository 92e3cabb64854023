"""RevSBlock and RevSSequence: blocks that are rebuilt from their output, bit for bit, at any depth.

The one idea: the state is two streams, each updated by a function of the other, so each update can be
subtracted again. On the dyadic grid (:mod:`snn_reversible_plugin.grid`) the subtraction is exact, so a
chain of any length keeps its last output and nothing else.

Source: Zhang and Zhang, "Memory-Efficient Reversible Spiking Neural Networks", AAAI 2024 (arXiv
2312.07922), after Gomez et al., "The Reversible Residual Network", NeurIPS 2017. Both rebuild in floating
point; the grid is this package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.second_run import BranchRun, How
from snn_reversible_plugin.blocks.undo import Flips, Rebuild, Undo, difference, flipped
from snn_reversible_plugin.grid import add_snapped, check_bits, reach, snap, watch
from snn_reversible_plugin.modules.kinds import load_adapters
from snn_reversible_plugin.modules.states import Key, fresh_states, state_tensors
from snn_reversible_plugin.ops.batched import comes_again, one_by_one
from snn_reversible_plugin.ops.layouts import with_strides
from snn_reversible_plugin.tape.handles import checksum

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

Streams = tuple[Tensor, Tensor]
BRANCHES = ("f", "g")


class RevSBlock(nn.Module):
    """A reversible spiking block: ``y1 = x1 + snap(f(x2))``, ``y2 = x2 + snap(g(y1))``.

    Called by itself it is an ordinary module that keeps what autograd keeps; in a
    :class:`RevSSequence` it keeps nothing.

    Args:
        f, g: branches, any modules that map one stream to a tensor of the same shape.
        dim: the dimension that splits into the two streams, 2 for ``[T, N, C, ...]``, 1 for ``[N, C]``.
        bits: of the grid that the streams live on, so that they must stay below 2^(24 - bits); None for
            streams in plain floating point, which drift: for comparison.

    Shape:
        Input ``[T, N, C, ...]`` with even C, or a pair of streams of one shape; output the same. Streams
        are float32 (float64 for float64), under autocast too.

    Raises:
        ValueError: an odd number of channels, streams of unequal shapes, a branch that changes the shape.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> block = RevSBlock(nn.Linear(3, 3), nn.Linear(3, 3), dim=-1)
        >>> block(torch.randn(2, 6)).shape
        torch.Size([2, 6])
    """

    def __init__(self, f: nn.Module, g: nn.Module, dim: int = 2, bits: int | None = 16) -> None:
        super().__init__()
        for name, branch in (("f", f), ("g", g)):
            if not isinstance(branch, nn.Module):
                raise TypeError(f"RevSBlock: {name} must be an nn.Module, not {type(branch).__name__}")
        if bits is not None:
            check_bits(bits)
        self.f, self.g, self.dim, self.bits = f, g, dim, bits

    def extra_repr(self) -> str:
        return f"dim={self.dim}, bits={self.bits}"

    def forward(self, x: Tensor | Streams, branch: str | None = None) -> Tensor | Streams:
        if branch is not None:  # a chain undoes a block branch by branch
            return getattr(self, branch)(x)  # type: ignore[no-any-return]
        split = isinstance(x, Tensor)
        x1, x2 = _entered(*_split(x, self.dim, "RevSBlock"), self.bits)
        branches = [(_where(0, self, name), getattr(self, name)) for name in BRANCHES]
        y1, y2 = _plain(branches, x1, x2, self.bits)
        return torch.cat((y1, y2), self.dim) if split else (y1, y2)


class RevSSequence(nn.Module):
    """A chain of reversible blocks that keeps only its last output for the backward.

    Each branch runs twice a training step. Outputs, gradients, states and running statistics are, bit for
    bit, those of the same blocks run plainly (``reversible = False``), which is also what happens without
    grad mode, in a compiled region and under ``torch.func``. (Where one parameter is used several times,
    its terms may be summed in another order.) Forward hooks inside the branches fire in both runs.

    Args:
        blocks: :class:`RevSBlock`, at least one, all with one ``dim`` and ``bits``.
        states: ``"carry"`` hands neuron states from call to call as the frameworks do; ``"reset"`` starts
            the neurons fresh in each call and leaves them fresh, so that no final membrane is held either.
        mode: of the tape inside a rebuilt branch: ``"memory"`` runs its convolutions and matrix products
            once more for a lower peak, ``"speed"`` does not.
        check: compare each rebuilt block input and each spike with the forward's: raises where a branch
            isn't deterministic, and counts in ``last_rebuild`` what flipped. Slow; keeps the chain's input,
            and a bit a spike. See :func:`counting_flips` for whole models.

    Attributes:
        reversible: False runs the blocks plainly.
        last_rebuild: in check mode, a :class:`Rebuild` after each backward.

    Raises:
        ValueError: as :class:`RevSBlock`; from the constructor for blocks that don't go together.
        OverflowError: from the backward, where a stream left the grid's range.
        RuntimeError: from the backward, where the output, a parameter or a state was changed in place; in
            check mode where a branch gave another value in its second run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from spikingjelly.activation_based import layer, neuron
        >>> def branch():
        ...     conv = layer.Conv2d(4, 4, 3, padding=1, step_mode="m")
        ...     return nn.Sequential(neuron.LIFNode(step_mode="m"), conv)
        >>> chain = RevSSequence([RevSBlock(branch(), branch()) for _ in range(3)], states="reset")
        >>> x = torch.randn(2, 1, 8, 5, 5, requires_grad=True)
        >>> chain(x).sum().backward()
        >>> x.grad.shape
        torch.Size([2, 1, 8, 5, 5])
    """

    def __init__(
        self,
        blocks: Iterable[RevSBlock],
        *,
        states: str = "carry",
        mode: str = "speed",
        check: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for index, block in enumerate(self.blocks):
            if not isinstance(block, RevSBlock):
                raise TypeError(f"RevSSequence: block {index} is a {type(block).__name__}, not a RevSBlock")
        if len({(block.dim, block.bits) for block in self.blocks}) != 1:
            found = sorted({str((block.dim, block.bits)) for block in self.blocks})
            raise ValueError(
                f"RevSSequence takes blocks, at least one, that share dim and bits, not {found}"
            )
        check_states(states)
        if mode not in tape.MODES:
            raise ValueError(f"mode must be one of {tape.MODES}, not {mode!r}")
        self.states, self.mode, self.check, self.reversible = states, mode, check, True
        self.last_rebuild: Rebuild | None = None
        self._inspected = False

    def extra_repr(self) -> str:
        return f"states={self.states!r}"

    def forward(self, x: Tensor | Streams) -> Tensor | Streams:
        blocks: list[RevSBlock] = list(self.blocks)  # type: ignore[arg-type]
        split, dim = isinstance(x, Tensor), blocks[0].dim
        x1, x2 = _split(x, dim, "RevSSequence")
        del x
        with fresh_states(self) if self.states == "reset" else nullcontext():
            if self.reversible and tape.may_record():
                outs = self._reversibly(blocks, x1, x2, dim if split else None)
                return outs[0] if split else outs  # type: ignore[return-value]
            # Through the blocks, whose hooks may gather parameters.
            branches = [
                (_where(index, block, name), partial(block, branch=name))
                for index, block in enumerate(blocks)
                for name in BRANCHES
            ]
            y1, y2 = _plain(branches, *_entered(x1, x2, blocks[0].bits), blocks[0].bits)
            return torch.cat((y1, y2), dim) if split else (y1, y2)

    def _reversibly(
        self, blocks: list[RevSBlock], x1: Tensor, x2: Tensor, dim: int | None
    ) -> tuple[Tensor, ...]:
        parameters = [p for p in self.parameters() if p.requires_grad]
        states = [] if self.states == "reset" else state_tensors(self)
        run = _Run(self, blocks, dim, parameters, [key for key, _ in states])
        inputs = (x1, x2, *parameters, *(state for _, state in states))
        outs = _Chain.apply(run, *inputs)  # type: ignore[no-untyped-call]
        streams = 2 if dim is None else 1
        tape.mark_opaque(*outs)
        for (table, key), state in zip(run.exits, outs[streams:], strict=True):
            table[key] = state
        return outs[:streams]  # type: ignore[no-any-return]


class _Run:
    """One forward of a chain: what its backward needs besides tensors."""

    def __init__(
        self,
        chain: RevSSequence,
        blocks: list[RevSBlock],
        dim: int | None,
        parameters: list[nn.Parameter],
        state_keys: list[Key],
    ) -> None:
        self.chain, self.dim, self.parameters, self.state_keys = chain, dim, parameters, state_keys
        self.bits, self.check = blocks[0].bits, chain.check
        load_adapters()
        how = How(chain.mode, observe=chain.check, inspect=chain.check or not chain._inspected)
        self.branches = [
            BranchRun(_where(index, block, name), block, name, how)
            for index, block in enumerate(blocks)
            for name in BRANCHES
        ]
        self.strides: list[tuple[int, ...]] = []
        self.checksums: list[Tensor] = []
        self.exits: list[tuple[dict[str, Any], str]] = []
        self.original: Streams | None = None

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Streams, list[list[Tensor]]]:
        """Run every branch: a and b are the streams, and take turns."""
        a, b = _entered(x1, x2, self.bits)
        if self.check:
            self.original = (a.detach().clone(), b.detach().clone())
        kept = []
        wanted = set(self.state_keys) if self.chain.states == "carry" else set()
        exits: dict[Key, tuple[dict[str, Any], str]] = {}
        for branch in self.branches:
            branch.wanted = set(wanted)
            self.strides.append(a.stride())
            if self.check:
                self.checksums.append(checksum(a))
            a, b = b, _couple(branch.name, a, branch.first(b), self.bits)
            kept.append(branch.tensors())
            if self.chain.states == "carry":
                exits.update({(id(table), key): (table, key) for table, key in branch.exits()})
                wanted |= set(exits)
        self.strides.append(a.stride())
        self.exits = list(exits.values())
        self.versions = self._read_by_reference()
        return (a, b), kept

    def _read_by_reference(self) -> list[tuple[str, Tensor, int]]:
        names = [*self.chain.named_parameters()]
        for where, module in self.chain.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and not module.training:
                names += [(f"{where}.{key}", value) for key, value in module.named_buffers(recurse=False)]  # type: ignore[misc]
        return [(name, tensor, tensor._version) for name, tensor in names]

    def check_unchanged(self) -> None:
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"RevSSequence: {name} was modified by an inplace operation after the forward (version "
                    f"{tensor._version}, was {version}), and the backward needs it to rebuild the blocks. "
                    "Call backward before the optimizer's step and before loading weights."
                )


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x1: Tensor, x2: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with tape.paused(), tape.to_be_repeated():
            streams, kept = run.forward(x1, x2)
            outs = streams if run.dim is None else (torch.cat(streams, run.dim),)
        ctx.run, ctx.counts, ctx.dtype = run, [len(tensors) for tensors in kept], x1.dtype
        ctx.save_for_backward(*outs, *(tensor for tensors in kept for tensor in tensors))
        given = {id(tensor) for tensor in (*outs, x1, x2, *_)}
        states = []
        for table, key in run.exits:
            state = table[key]
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
        run.check_unchanged()
        saved = list(ctx.saved_tensors)
        if run.dim is None:
            (a, b), saved = saved[:2], saved[2:]
            g_a, g_b, *g_exits = grads
        else:
            a, b = (stream.clone() for stream in saved.pop(0).chunk(2, run.dim))  # the output may go
            g, *g_exits = grads
            g_a, g_b = (None, None) if g is None else g.chunk(2, run.dim)
        g_states: dict[Key, Tensor] = {
            (id(table), key): g for (table, key), g in zip(run.exits, g_exits, strict=True) if g is not None
        }
        if hasattr(ctx, "maybe_clear_saved_tensors") and not comes_again():
            ctx.maybe_clear_saved_tensors()  # the output's last use is soon over
        kept = [[saved.pop(0) for _ in range(count)] for count in ctx.counts]
        wanted = {id(p) for p, on in zip(run.parameters, ctx.needs_input_grad[3:], strict=False) if on}
        totals: dict[int, Tensor] = {}
        a = with_strides(a, run.strides[-1])
        for name, output in (("first", a), ("second", b)):
            _watch(run, f"the output's {name} stream", output)
        flips: dict[str, Flips] = {}
        for index in range(len(run.branches) - 1, -1, -1):
            branch = run.branches[index]
            # Forward: b = before + snap(branch(a)), where `before` and `a` were the streams.
            parameters = list({id(p): p for p in branch.parameters() if id(p) in wanted}.values())
            # The first two undone are the outputs themselves, if those were a pair.
            owned = run.dim is not None or index < len(run.branches) - 2
            undo = Undo(run.strides[index], run.bits, owned, partial(_see, run, index))
            if index or run.check:  # nobody reads the chain's first input stream
                undo.stream = b
            streams = [g_b, g_a]
            del b, g_a
            g_total, g_parameters, spikes = branch.again(a, kept.pop(), parameters, undo, streams, g_states)
            for parameter, g_p in zip(parameters, g_parameters, strict=True):
                if g_p is not None:
                    total = totals.get(id(parameter))
                    totals[id(parameter)] = g_p if total is None else total + g_p
            a, b = undo.rebuilt, a
            g_a, g_b = g_b, g_total
            if run.check:
                flips[branch.name] = flipped(branch.name, branch.spikes, spikes)
        run.chain._inspected = True
        if run.original is not None:
            run.chain.last_rebuild = difference((a, b), run.original, flips)
        g_streams = (None if g is None else g.to(ctx.dtype) for g in (g_a, g_b))
        g_inputs = [totals.get(id(p)) for p in run.parameters]
        return (None, *g_streams, *g_inputs, *(g_states.get(key) for key in run.state_keys))


def check_states(states: str) -> None:
    """Refuse what is neither of the two ways with neuron states."""
    if states not in ("carry", "reset"):
        raise ValueError(f"states must be 'carry' or 'reset', not {states!r}")


def _plain(
    branches: Iterable[tuple[str, Callable[[Tensor], Tensor]]], x1: Tensor, x2: Tensor, bits: int | None
) -> Streams:
    for name, branch in branches:
        x1, x2 = x2, _couple(name, x1, branch(x2), bits)
    return x1, x2


def _where(index: int, block: RevSBlock, name: str) -> str:
    return f"block {index}: {name} ({getattr(block, name)._get_name()})"


def _couple(name: str, stream: Tensor, out: Tensor, bits: int | None) -> Tensor:
    if out.shape != stream.shape:
        raise ValueError(
            f"{name} returned a tensor of shape {tuple(out.shape)} for a stream of shape "
            f"{tuple(stream.shape)}: a branch must keep the shape. What changes it goes between two chains."
        )
    if bits is None or torch.is_grad_enabled():
        out = out if bits is None else snap(out, bits)  # the branch's own output may go
        return stream + out
    return add_snapped(stream, out, bits)


def _split(x: Tensor | Streams, dim: int, name: str) -> Streams:
    """The two streams of an input."""
    if isinstance(x, Tensor):
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"{name}: dim={dim}, and the input has shape {tuple(x.shape)}")
        if x.shape[dim] % 2:
            raise ValueError(
                f"{name}: {x.shape[dim]} channels (dimension {dim} of {tuple(x.shape)}) don't split into "
                "two streams: give an even number, or a pair of streams."
            )
        x1, x2 = x.chunk(2, dim)
        return x1, x2
    x1, x2 = x
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        raise ValueError(
            f"{name}: the streams must have one shape and type, not {tuple(x1.shape)} ({x1.dtype}) and "
            f"{tuple(x2.shape)} ({x2.dtype})"
        )
    return x1, x2


def _entered(x1: Tensor, x2: Tensor, bits: int | None) -> Streams:
    """The streams as the first block gets them: each a tensor of its own, on the grid."""
    return (x1.clone(), x2.clone()) if bits is None else (snap(x1, bits), snap(x2, bits))


def _watch(run: _Run, name: str, stream: Tensor) -> None:
    if run.bits is not None:
        watch(f"RevSSequence: {name}", reach(stream), run.bits)


def _see(run: _Run, index: int, rebuilt: Tensor) -> None:
    _watch(run, f"the stream that {run.branches[index].name} is added to", rebuilt)
    if not run.check or run.bits is None:
        return
    if not torch.equal(checksum(rebuilt), run.checksums[index]):
        raise RuntimeError(
            f"{run.branches[index].name}: the rebuilt input differs from the forward's. The branch is not "
            "deterministic, reads something that has changed, or a stream left the grid's range."
        )
