"""The coupled node's steps there and back, in place and a part of the batch at a time.

The one idea: the walk that undoes the steps meets each membrane and spike on its way, and these are what
the gradient needs, so gradients are computed in the same walk: no second forward.

Source: the "streamlined" backward of Lei et al., arXiv 2308.08649; the equations are in :mod:`.reference`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snn_reversible_plugin.grid import reach, stream_dtype
from snn_reversible_plugin.neurons.coupled.reference import Node
from snn_reversible_plugin.ops import pack_bits, unpack_bits
from snn_reversible_plugin.ops.chunks import chunk_size

# NOTE [Units]
#
# Sweeps work in units of 2^-bits, where rounding is round() and floor(). Scaling by powers of two commutes
# with every other operation in them, so results are the specification's, bit for bit. Products of which
# both factors are arbitrary are never fused with a sum.
#
# NOTE [The order of gradients]
#
# Autograd adds up what meets at a tensor in the order of arrival, which is that of creation reversed.
# With the operations of `reference.sequence` created as they are written:
#
# 1. into spikes: through alpha O, then through 1 - O, then from the output.
# 2. into S1': what came from the next step, then V2 directly, then V2 through the leak. What comes from the
#    next step is (beta S1 + V1) - V1 through the leak, in this order.
# 3. into 1 / tau: one sum over all neurons for each group and step, the last first. It is not cut.


class Undone(NamedTuple):
    """What :func:`inverse` gives back. ``reached``: the largest magnitude that it met, on its device."""

    x_seq: Tensor
    s: Tensor
    reached: Tensor


class Gradients(NamedTuple):
    """What :func:`backward` returns, and the states ``s`` before the first step that it came to."""

    x_seq: Tensor
    g_s: Tensor
    leak: Tensor | None
    s: Tensor
    reached: Tensor


Remainders = list[tuple[slice, Tensor]]
"""``shift`` bits a neuron and step, packed: for each part of the batch [T, shift, bytes]."""


class Stepped(NamedTuple):
    """What :func:`forward` returns: outputs [T, N, C, ...], last states [N, C, ...], remainders."""

    y_seq: Tensor
    s: Tensor
    remainders: Remainders


def forward(
    x_seq: Tensor, s: Tensor | None, node: Node, *, undoable: bool = True, coupled: bool = True
) -> Stepped:
    """:func:`.reference.sequence` without a graph, and the remainders that undo it.

    Args:
        x_seq, s, node: inputs [T, N, C, ...], first states [N, C, ...] (None: zeros), and whose.
        undoable: False: no remainders.
        coupled: False: spikes O instead of outputs O + beta X.
    """
    constants = node.constants
    y_seq = torch.empty_like(x_seq, dtype=stream_dtype(x_seq.dtype))
    s_out = torch.empty_like(y_seq[0])
    remainders: Remainders = []
    xs, ys, s_to = _steps(x_seq), _steps(y_seq), by_group(s_out, 1)
    s_from = None if s is None else by_group(s, 1)
    for part in _parts(y_seq, node):
        work = Work(ys[0][:, part], node)
        work.start(None if s_from is None else s_from[:, part])
        stored = work.remainder_store(len(xs)) if undoable else None
        for t, (x, y) in enumerate(zip(xs, ys, strict=True)):
            work.decay(None if stored is None else stored[t])
            work.read(x[:, part], work.x, constants.bits - constants.shift).round_()
            for group, current in enumerate((work.x[0], work.y[0])):
                work.charge(current, 0 if group else constants.shift)
                work.fire()
                torch.add(work.x[1 - group], work.o, alpha=work.unit, out=work.y[group])
                if not coupled:
                    y[group, part] = work.o
                torch.add(work.reset(), work.f[1 - group], out=work.s[group])
            if coupled:
                y[:, part] = work.y.mul_(1 / work.unit)
        s_to[:, part] = work.pair.mul_(1 / work.unit)
        if stored is not None:
            remainders.append((part, stored))
    return Stepped(y_seq, s_out, remainders)


def inverse(after: Stepped, node: Node) -> Undone:
    """Inputs (rounded to their grid) and first states from what :func:`forward` returned.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.grid import snap
        >>> from snn_reversible_plugin.neurons.coupled.reference import Constants
        >>> from snn_reversible_plugin.neurons.surrogates import Surrogate
        >>> constants = Constants(0.5, v_threshold=1.0, alpha=0.0, shift=2, bits=16, detach_reset=False)
        >>> node = Node(constants, Surrogate(lambda grad, u: grad), "node")
        >>> x_seq = torch.rand(1000, 1, 4)
        >>> undone = inverse(forward(x_seq, None, node), node)
        >>> torch.equal(undone.x_seq, snap(x_seq, 14)), undone.s.abs().max().item()
        (True, 0.0)
    """
    constants, (y_seq, s, remainders) = node.constants, after
    x_seq, s_out = torch.empty_like(y_seq), torch.empty_like(y_seq[0])
    ys, xs, s_from, s_to = _steps(y_seq), _steps(x_seq), by_group(s, 1), by_group(s_out, 1)
    reached = [reach(y_seq)]
    for part, stored in remainders:
        work = Work(ys[0][:, part], node)
        work.start(s_from[:, part])
        for t in reversed(range(len(ys))):
            work.read(ys[t][:, part], work.y, constants.bits)
            work.undo_second(stored[t])
            work.undo_first()
            torch.sub(work.y[0], work.o, alpha=work.unit, out=work.x[1])
            xs[t][:, part] = work.x.mul_(2.0**constants.shift / work.unit)
        reached.append(work.reached())
        s_to[0, part], s_to[1, part] = (state.mul_(1 / work.unit) for state in work.s)
    return Undone(x_seq, s_out, torch.stack(reached).amax())


def backward(
    after: Stepped,
    g_y: Tensor | None,
    g_s: Tensor | None,
    node: Node,
    *,
    wants_leak: bool = False,
    dtype: torch.dtype | None = None,
    owned: bool = False,
) -> Gradients:
    """Gradients in the sweep that undoes the steps: no second forward.

    Args:
        after: what :func:`forward` returned.
        g_y, g_s: gradients of outputs and last states; None for zeros.
        node: what the forward took.
        wants_leak: also compute the gradient of the node's leak.
        dtype: of the gradient of x_seq; that of the outputs by default.
        owned: the outputs may be overwritten: they become the gradient of x_seq.
    """
    constants, (y_seq, s, remainders) = node.constants, after
    reached = [reach(y_seq)]
    g_x = y_seq if owned and dtype in (None, y_seq.dtype) else torch.empty_like(y_seq, dtype=dtype)
    s_out, g_s_out = torch.empty_like(y_seq[0]), torch.empty_like(y_seq[0])
    ys, g_xs, s_from, s_to = _steps(y_seq), _steps(g_x), by_group(s, 1), by_group(s_out, 1)
    g_ys = None if g_y is None else _steps(g_y)
    g_from, g_to = None if g_s is None else by_group(g_s, 1), by_group(g_s_out, 1)
    g_leak = None
    for part, stored in remainders:
        work = Work(ys[0][:, part], node)
        work.start(s_from[:, part])
        g_states, g_in, through_leak = work.new(), work.new(), work.new()
        if g_from is not None:
            g_states.copy_(g_from[:, part])
        g1, g2 = g_states  # of S1' and S2'
        g_y1 = torch.empty_like(g1)
        nothing = torch.zeros_like(g1).expand(2, *g1.shape)
        for t in reversed(range(len(ys))):
            g_out = nothing if g_ys is None else g_ys[t][:, part]
            work.read(ys[t][:, part], work.y, constants.bits)

            work.undo_second(stored[t])
            g_v2 = work.fire_reset_vjp(g_out[1], g2)
            g_pull = torch.mul(g_v2, work.leak, out=through_leak[1])
            if wants_leak:
                g_leak = work.leak_vjp(g_v2, g_leak)
            torch.add(g_out[0], g_pull, out=g_y1)
            g1.add_(g_v2).sub_(g_pull)

            work.undo_first()
            g_v1 = work.fire_reset_vjp(g_y1, g1)
            g_pull = torch.mul(g_v1, work.leak, out=through_leak[0])
            if wants_leak:
                g_leak = work.leak_vjp(g_v1, g_leak)
            torch.mul(g_out[1], constants.beta, out=g_in[0]).add_(g_pull)
            torch.mul(g_y1, constants.beta, out=g_in[1])
            g_xs[t][:, part] = g_in
            # beta S1 went into S2', and beta S2 into S1'.
            g2.mul_(constants.beta).add_(g_v1).sub_(g_pull)
            g1.mul_(constants.beta)
            g1, g2 = g2, g1
        reached.append(work.reached())
        s_to[0, part], s_to[1, part] = (state.mul_(1 / work.unit) for state in work.s)
        g_to[0, part], g_to[1, part] = g1, g2
    return Gradients(g_x, g_s_out, g_leak, s_out, torch.stack(reached).amax())


def by_group(z: Tensor, dim: int) -> Tensor:
    """A view in which the two groups of a dimension come just before what stood before it."""
    return z.unflatten(dim, (2, z.shape[dim] // 2)).movedim(dim, dim - 1)


def _steps(z_seq: Tensor) -> tuple[Tensor, ...]:
    """Of [T, N, C, ...] views [2, N, C / 2, ...]."""
    return by_group(z_seq, 2).unbind(0)


def _parts(y_seq: Tensor, node: Node) -> list[slice]:
    """Stretches of the batch that fit the cores' caches, where a cut does not show."""
    n = y_seq.shape[1]
    if n == 0 or node.leak is not None or not node.surrogate.uniform:
        return [slice(0, n)]
    length = max(1, chunk_size(y_seq.device) // max(1, math.prod(y_seq.shape[2:])))
    return [slice(begin, min(begin + length, n)) for begin in range(0, n, length)]


class Work:
    """Buffers for a part of the batch and the operations of a step, in units of 2^-bits.

    x and y [2, n, C / 2, ...] are inputs (times beta) and outputs by group, s the list of the two
    states, f and r what beta S is rounded down to and its remainder (times 1 / beta), v and o one group's
    membrane and spikes.
    """

    def __init__(self, like: Tensor, node: Node) -> None:
        self.constants, self.surrogate = node.constants, node.surrogate
        self.leak: Any = node.constants.leak if node.leak is None else node.leak
        self.unit = 2.0**node.constants.bits
        self.one = like.new_ones(())
        # As it is where it is subtracted: a number may be too small for the dtype of the states.
        self.threshold = float(torch.tensor(node.constants.v_threshold, dtype=like.dtype)) * self.unit
        self._like = like
        self.x, self.y, self.pair, self.f, self.r, self.g = (self.new() for _ in range(6))
        self.v, self.w, self.o, self.d, self.u, self.h = (self.new()[0] for _ in range(6))
        self.s = list(self.pair)
        self.extremes: list[Tensor] = []

    def new(self) -> Tensor:
        """A buffer for both groups."""
        return torch.zeros(self._like.shape, dtype=self._like.dtype, device=self._like.device)

    def start(self, s: Tensor | None) -> None:
        """From these states, or zeros."""
        if s is not None:
            self.read(s, self.pair, self.constants.bits).round_()

    def read(self, z: Tensor, out: Tensor, bits: int) -> Tensor:
        """A tensor in units of 2^-bits."""
        if z.dtype is out.dtype:
            return torch.mul(z, 2.0**bits, out=out)
        return out.copy_(z).mul_(2.0**bits)

    def charge(self, current: Tensor, shift: int) -> None:
        """V into v, and S - X into w. Uses d."""
        torch.sub(self.s[0], current, alpha=2.0**shift, out=self.w)
        torch.mul(self.w, self.leak, out=self.d)
        torch.sub(self.s[0], self.d, out=self.v).round_()

    def fire(self) -> None:
        """O into o. Uses u."""
        if self.surrogate.fire is not None:
            u = torch.mul(self.v, 1 / self.unit, out=self.u).sub_(self.constants.v_threshold)
            self.o.copy_(self.surrogate.fire(u))
        elif self.surrogate.strict:
            torch.gt(self.v, self.threshold, out=self.o)
        else:
            torch.ge(self.v, self.threshold, out=self.o)

    def reset(self) -> Tensor:
        """(1 - O) V + alpha O, in d."""
        torch.addcmul(self.v, self.v, self.o, value=-1, out=self.d)
        return (
            self.d.add_(self.o, alpha=self.constants.alpha * self.unit) if self.constants.alpha else self.d
        )

    def remainder_store(self, steps: int) -> Tensor:
        """Empty, for the remainders of that many steps."""
        size = (self.pair.numel() + 7) // 8
        return torch.empty(steps, self.constants.shift, size, dtype=torch.uint8, device=self.pair.device)

    def decay(self, stored: Tensor | None) -> None:
        """beta S into f, rounded down, and its remainder into the store."""
        scale = 2.0**self.constants.shift
        torch.mul(self.pair, 1 / scale, out=self.f).floor_()
        if stored is None or not self.constants.shift:
            return
        torch.sub(self.pair, self.f, alpha=scale, out=self.r)
        for place in reversed(range(self.constants.shift)):
            bit = torch.ge(self.r, 2.0**place, out=self.g) if place else self.r
            stored[place] = pack_bits(bit.view(-1))
            if place:
                self.r.sub_(bit, alpha=2.0**place)

    def undo_second(self, stored: Tensor) -> None:
        """From S1', S2' and Y to V2, O2, X1 and S1; s is S1, S1' then."""
        if self.constants.shift:
            unpack_bits(stored[0], self.r.view(-1))
        for place in range(1, self.constants.shift):
            unpack_bits(stored[place], self.g.view(-1))
            self.r.add_(self.g, alpha=2.0**place)
        if self.pair.numel():
            self.extremes += torch.aminmax(self.pair)
        self.charge(self.y[0], 0)
        self.fire()
        torch.sub(self.y[1], self.o, alpha=self.unit, out=self.x[0])
        self._undo_state(self.r[0])
        self.s.reverse()

    def undo_first(self) -> None:
        """From S1, S1', X1 and Y1 to V1, O1 and S2; s is S1, S2 then."""
        self.charge(self.x[0], self.constants.shift)
        self.fire()
        self._undo_state(self.r[1])

    def _undo_state(self, remainder: Tensor) -> None:
        rounded = self.s[1].sub_(self.reset())
        torch.add(remainder, rounded, alpha=2.0**self.constants.shift, out=self.s[1])

    def fire_reset_vjp(self, g_o: Tensor, g_s: Tensor) -> Tensor:
        """The gradient of v from those of the output (or of O) and of the state after the group's step."""
        v = torch.mul(self.v, 1 / self.unit, out=self.h)
        if not self.constants.detach_reset:
            through_reset = torch.mul(g_s, v, out=self.d)
            if self.constants.alpha:
                g_o = torch.mul(g_s, self.constants.alpha, out=self.g[0]).sub_(through_reset).add_(g_o)
            else:
                g_o = torch.sub(g_o, through_reset, out=self.g[0])
        g_v = self.surrogate.vjp(g_o, torch.sub(v, self.constants.v_threshold, out=self.u))
        keep = torch.sub(self.one, self.o, out=self.d)
        return torch.addcmul(g_v, g_s, keep, out=self.g[1])

    def leak_vjp(self, g_v: Tensor, total: Tensor | None) -> Tensor:
        """The gradient of 1 / tau, added to those so far. Uses w."""
        term = self.w.mul_(-1 / self.unit).mul_(g_v).sum()
        return term if total is None else total + term

    def reached(self) -> Tensor:
        """The largest magnitude of the states so far, in units of 1."""
        if not self.pair.numel():
            return self.one * 0
        self.extremes += torch.aminmax(self.pair)
        return torch.stack(self.extremes).abs_().amax() / self.unit
