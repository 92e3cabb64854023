"""RevSBlock and RevSSequence: blocks that are rebuilt from their output, bit for bit, at any depth.

The one idea: the state is two streams, each updated by a function of the other, so each update can be
subtracted again. On the dyadic grid (:mod:`snn_reversible_plugin.grid`) the subtraction is exact, so a
chain of any length keeps its last output and nothing else.

Source: Zhang and Zhang, "Memory-Efficient Reversible Spiking Neural Networks", AAAI 2024 (arXiv
2312.07922), after Gomez et al., "The Reversible Residual Network", NeurIPS 2017. Both rebuild in floating
point; the grid is this package's.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.chain_function import Update
from snn_reversible_plugin.blocks.chain_nodes import run_reversibly
from snn_reversible_plugin.blocks.coupling import Streams, entered, plain, split
from snn_reversible_plugin.blocks.parallel import Group
from snn_reversible_plugin.blocks.undo import Rebuild
from snn_reversible_plugin.grid import check_bits
from snn_reversible_plugin.modules.states import fresh_states
from snn_reversible_plugin.ops.interrupts import put_back_interrupted

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
        split_up = isinstance(x, Tensor)
        x1, x2 = entered(*split(x, self.dim, "RevSBlock"), self.bits)
        branches = [(_where(0, self, name), getattr(self, name)) for name in BRANCHES]
        y1, y2 = plain(branches, x1, x2, self.bits)
        return torch.cat((y1, y2), self.dim) if split_up else (y1, y2)


class RevSSequence(nn.Module):
    """A chain of reversible blocks that keeps only its last output for the backward.

    Each branch runs twice a training step. Outputs, gradients, states and running statistics are, bit for
    bit, those of the same blocks run plainly (``reversible = False``), which is also what happens without
    grad mode, in a compiled region and under ``torch.func``. (Where one parameter is used several times,
    its terms may be summed in another order.) Forward hooks inside the branches fire in both runs.

    Args:
        blocks: :class:`RevSBlock`, at least one, all with one ``dim`` and ``bits``.
        states: ``"carry"`` hands neuron states from call to call as the frameworks do; ``"reset"`` starts
            the neurons fresh in each call and leaves them fresh. Either way no final membrane is held,
            unless it is read or the next call starts from it. The spikes that reset a snnTorch neuron
            last (its attribute ``reset``) are not left.
        parallel: run so many consecutive blocks at once: a group computes ``y1 = x1 + snap(sum of f(x2))``,
            ``y2 = x2 + snap(sum of g(y1))`` over its blocks, which is **another function** than the same
            blocks one after another. Branches that are alike are batched into one call of wider layers
            (:mod:`...blocks.parallel`).
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

    may_write_over_input = True  # it lets go of it

    def __init__(
        self,
        blocks: Iterable[RevSBlock],
        *,
        states: str = "carry",
        parallel: int = 1,
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
        if not isinstance(parallel, int) or parallel < 1:
            raise ValueError(f"parallel must be a number of blocks, at least 1, not {parallel!r}")
        self.states, self.mode, self.check, self.reversible = states, mode, check, True
        self.parallel = parallel
        self.last_rebuild: Rebuild | None = None
        self._inspected = False

    def extra_repr(self) -> str:
        return f"states={self.states!r}" + (f", parallel={self.parallel}" if self.parallel > 1 else "")

    @property
    def bits(self) -> int | None:
        """Of the grid that the streams live on."""
        return self.blocks[0].bits  # type: ignore[return-value]

    def forward(self, x: Tensor | Streams) -> Tensor | Streams:
        put_back_interrupted()
        split_up = isinstance(x, Tensor)
        dim: int = self.blocks[0].dim  # type: ignore[assignment]
        x1, x2 = split(x, dim, "RevSSequence")
        del x
        updates = self._updates()
        with fresh_states(self) if self.states == "reset" else nullcontext():
            if self.reversible and tape.may_record():
                outs = run_reversibly(self, updates, x1, x2, dim if split_up else None)
                return outs[0] if split_up else outs  # type: ignore[return-value]
            # Through the blocks, whose hooks may gather parameters.
            branches = [(where, partial(block, branch=name)) for where, block, name in updates]
            y1, y2 = plain(branches, *entered(x1, x2, self.bits), self.bits)
            return torch.cat((y1, y2), dim) if split_up else (y1, y2)

    def try_out(self, way: object) -> None:
        """Learn how a gradient that nobody else holds comes to a chain: in its backward."""
        tape.try_out(way, _tried)

    def _updates(self) -> list[Update]:
        blocks: list[RevSBlock] = list(self.blocks)  # type: ignore[arg-type]
        if self.parallel == 1:
            return [
                (_where(index, block, name), block, name)
                for index, block in enumerate(blocks)
                for name in BRANCHES
            ]
        updates: list[Update] = []
        for first in range(0, len(blocks), self.parallel):
            group = Group(blocks[first : first + self.parallel])
            where = f"blocks {first} to {first + len(group.blocks) - 1}"
            updates += [(f"{where}: {name}", group, name) for name in BRANCHES]
        return updates


def _tried(x: Tensor) -> Tensor:
    return RevSSequence([RevSBlock(nn.ReLU(), nn.ReLU())], states="reset", mode="minimal")(x)  # type: ignore[return-value]


def check_states(states: str) -> None:
    """Refuse what is neither of the two ways with neuron states."""
    if states not in ("carry", "reset"):
        raise ValueError(f"states must be 'carry' or 'reset', not {states!r}")


def _where(index: int, block: RevSBlock, name: str) -> str:
    return f"block {index}: {name} ({getattr(block, name)._get_name()})"
