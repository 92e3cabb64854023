"""RevSColumns: one sub-network a time step, whose levels remember, undone over time, bit for bit.

The one idea: a level's state is its product with alpha plus what the level computes from states that are
known, so it can be taken apart again. On the grid (:mod:`...grid.products`) that is exact for any alpha;
held are the last states, and of each product the digit that rounding lost.

Source: Hu et al., "High-Performance Temporal Reversible Spiking Neural Networks with O(L) Training Memory
and O(1) Inference Cost", ICML 2024 (arXiv 2405.16466), after Cai et al., "Reversible Column Networks", ICLR
2023 (arXiv 2212.11696). Both divide in floating point; the grid is this package's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.columns_function import States, next_state, run_reversibly
from snn_reversible_plugin.blocks.undo import Rebuild
from snn_reversible_plugin.grid import check_bits
from snn_reversible_plugin.grid.products import Room
from snn_reversible_plugin.modules.states import fresh_states


class Columns(NamedTuple):
    """What :class:`RevSColumns` returns.

    Attributes:
        states: of every level after the last time step, from the first level to the top one.
        tops: of the top level after each of the time steps in ``tops_at``.

    Example:
        >>> import torch
        >>> found = Columns((torch.zeros(2, 3),), ())
        >>> states, tops = found
        >>> states[-1].shape, tops
        (torch.Size([2, 3]), ())
    """

    states: tuple[Tensor, ...]
    tops: tuple[Tensor, ...]


class RevSColumns(nn.Module):
    """Temporal reversible columns: sub-network t computes the states of step t, and keeps none of them.

    With levels k = 0, ..., K - 1, and c[-1](t) = x(t)::

        c[k](t) = snap(level[k](c[k-1](t), c[k+1](t-1))) + round(alpha[k] * c[k](t-1))

    where the top level, and every level at the first time step, is called with its first input alone. Held
    between forward and backward are the K last states and, where \\|alpha\\| is below 1, digits: a bit an
    element and time step where it is 1/2 or more. Outputs and gradients are, bit for bit, those of the same
    sub-networks run plainly (``reversible = False``), which is also what happens without grad mode, in a
    compiled region and under ``torch.func``.

    Args:
        subnets: for each time step its levels, from the first one to the top one. A level is any module
            that takes ``(below)`` and ``(below, above)`` and returns its state. It may draw random numbers;
            its neurons start fresh in each call, and may be shared between time steps.
        alphas: for each time step the factors of its levels: parameters that broadcast to the level's
            state, or numbers, which are fixed. Learned ones may become negative, exceed 1, and pass 0.
            Those of the first time step meet a state of zeros: their gradient is 0.
        tops_at: time steps, from 0, after which the top level's state is returned too.
        bits: of the grid; states must stay below 2^(24 - bits). None for plain floating point, which
            drifts: for comparison.
        mode: of the tape inside a level that is run again, as in :class:`RevSSequence`.
        check: compare each rebuilt state and each spike with the forward's, as in :class:`RevSSequence`.

    Shape:
        Input: what the first level takes, one tensor for all time steps, or a sequence with one for each.

    Raises:
        ValueError: numbers of levels or factors that don't go together, an input for another number of time
            steps, a level whose state changes its shape from step to step.
        TypeError: what is no module, float64 states on the grid.
        OverflowError: from the backward, where a state left the grid's range.
        RuntimeError: from the backward, as in :class:`RevSSequence`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Level(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.below, self.above = nn.Linear(3, 3), nn.Linear(3, 3)
        ...     def forward(self, below, above=None):
        ...         out = self.below(below)
        ...         return out if above is None else out + self.above(above)
        >>> subnets = [[Level(), Level()] for _ in range(4)]
        >>> alphas = [[nn.Parameter(torch.full((3,), 0.5)) for _ in range(2)] for _ in range(4)]
        >>> columns = RevSColumns(subnets, alphas)
        >>> states, tops = columns(torch.randn(5, 3))
        >>> [tuple(state.shape) for state in states], tops
        ([(5, 3), (5, 3)], ())
    """

    def __init__(
        self,
        subnets: Iterable[Iterable[nn.Module]],
        alphas: Iterable[Iterable[nn.Parameter | float]],
        *,
        tops_at: Sequence[int] = (),
        bits: int | None = 16,
        mode: str = "speed",
        check: bool = False,
    ) -> None:
        super().__init__()
        self.subnets = nn.ModuleList(nn.ModuleList(levels) for levels in subnets)
        factors = [[_parameter(alpha) for alpha in of_step] for of_step in alphas]
        self.alphas = nn.ModuleList(nn.ParameterList(of_step) for of_step in factors)
        counts = [len(levels) for levels in self.subnets], [len(of_step) for of_step in factors]  # type: ignore[arg-type]
        if not counts[0] or len(set(counts[0])) != 1 or not counts[0][0] or counts[0] != counts[1]:
            raise ValueError(
                "RevSColumns takes at least one sub-network, all with the same number of levels, and as "
                f"many alphas for each; there are levels {counts[0]} and alphas {counts[1]}"
            )
        if not all(0 <= step < len(counts[0]) for step in tops_at):
            raise ValueError(f"tops_at must name time steps from 0 to {len(counts[0]) - 1}, not {tops_at}")
        if bits is not None:
            check_bits(bits)
        if mode not in tape.MODES:
            raise ValueError(f"mode must be one of {tape.MODES}, not {mode!r}")
        self.tops_at, self.bits, self.mode, self.check = tuple(tops_at), bits, mode, check
        self.reversible = True
        self.last_rebuild: Rebuild | None = None
        self._inspected = False
        self._room = Room()
        self.register_load_state_dict_post_hook(_forget)

    def extra_repr(self) -> str:
        return f"tops_at={self.tops_at}, bits={self.bits}"

    def forward(self, x: Tensor | Sequence[Tensor]) -> Columns:
        steps = len(self.subnets)
        xs = [x] * steps if isinstance(x, Tensor) else list(x)
        if len(xs) != steps:
            raise ValueError(
                f"RevSColumns has {steps} sub-networks, and got inputs for {len(xs)} time steps"
            )
        with fresh_states(self):
            if self.reversible and tape.may_record():
                states, tops = run_reversibly(self, xs)
            else:
                states, tops = self._plainly(xs)
        # One tensor, where it is both.
        found = dict(zip(self._tops_before_the_end(), tops, strict=True))
        found[steps - 1] = states[-1]
        return Columns(states, tuple(found[step] for step in self.tops_at))

    def _tops_before_the_end(self) -> list[int]:
        return sorted(set(self.tops_at) - {len(self.subnets) - 1})

    def _plainly(self, xs: Sequence[Tensor]) -> tuple[States, States]:
        states: list[Tensor] = []
        tops = []
        for step, (levels, x) in enumerate(zip(self.subnets, xs, strict=True)):
            below, new = x, []
            for k, level in enumerate(levels.children()):
                above = states[k + 1 : k + 2]
                out = level(below, *above)
                name = f"step {step}: level {k} ({level._get_name()})"
                before = states[k] if states else None
                below = next_state(name, before, self.alphas[step][k], out, self.bits)  # type: ignore[index]
                new.append(below)
            states = new
            if step in self._tops_before_the_end():
                tops.append(states[-1])
        return tuple(states), tuple(tops)


def _forget(columns: RevSColumns, _keys: Any) -> None:
    columns._room = Room()  # other factors


def _parameter(alpha: nn.Parameter | float) -> nn.Parameter:
    if isinstance(alpha, nn.Parameter):
        return alpha
    return nn.Parameter(torch.full((1,), float(alpha)), requires_grad=False)
