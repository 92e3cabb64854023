"""The sequences of :mod:`.neurons.integrate_fire.reference`, in place and a chunk of neurons at a time.

The one idea: neurons don't see each other, so time is swept forth and back over as many neurons as fit
a core's cache, before the next ones. The forward writes spikes straight into its output; the backward
overwrites the rebuilt current with the charged membrane, and that with the current's gradient. What
they need beyond that is a few buffers of a chunk.

Source: the arithmetic is that of ``reference``, operation by operation; blocking for caches is old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire import on_numba
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Gradients,
    Neuron,
    OutputGradients,
    Wanted,
    sequence,
    sequence_vjp,
)
from snn_reversible_plugin.ops.chunks import cuts
from snn_reversible_plugin.ops.layouts import as_rows, empty_in, is_contiguous_in, order_of_steps

# NOTE [Fewer operations, same bits]
#
# 1. Where the time steps of all tensors are laid out alike, contiguous or channels-last, so are all of
#    stock's, and each step is a row of a [T, n] view. Any other layout runs `reference`.
# 2. With spikes of 0 and 1 the products s * v and (1 - s) * h are exact, so multiplying and adding may
#    be fused. With other values they are not, nor where a scalar would be rounded to half precision
#    before it is multiplied.
# 3. `h >= v_threshold` is `h - v_threshold >= 0` in float32 and float64, unless the difference
#    underflows in a flush-to-zero mode, or is inf - inf.
# 4. `1 - s` and not `h < v_threshold`: they differ where h is NaN.


ONLY_X = Wanted(x=True, v=False, q=False)


def multi_step(
    x_seq: Tensor, v: Tensor | float, neuron: Neuron, store_v_seq: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`.neurons.integrate_fire.reference.sequence`, with less memory and time.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step
        >>> from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, Rule
        >>> from snn_reversible_plugin.neurons.surrogates import Surrogate
        >>> rule = Rule(2.0, True, v_threshold=1.0, v_reset=0.0, detach_reset=True)
        >>> neuron = Neuron(rule, Surrogate(lambda grad, u: grad / (1 + u.abs()) ** 2))
        >>> spikes, v, _ = multi_step(torch.full((3, 1), 1.5), 0.0, neuron)
        >>> spikes.squeeze(), v
        (tensor([0., 1., 0.]), tensor([0.7500]))
    """
    order = order_of_steps(x_seq, v)
    if order is None:
        return sequence(x_seq, v, neuron, store_v_seq)
    spikes, v_last = empty_in(x_seq, order), empty_in(x_seq, order, steps=False)
    v_seq = empty_in(x_seq, order) if store_v_seq else None
    x2, s2, v1 = as_rows(x_seq, order), as_rows(spikes, order), as_rows(v_last[None], order)[0]
    v2 = None if v_seq is None else as_rows(v_seq, order)
    start = as_rows(v[None], order)[0] if isinstance(v, Tensor) else v
    if v2 is None and on_numba.forward(x2, start, s2, v1, neuron):
        return spikes, v_last, None
    uniform = neuron.surrogate.uniform or neuron.surrogate.fire is None
    for part, work in _chunks(x2, neuron, uniform):
        state = _fill(v1[part], _cut(start, part))
        targets = None if v2 is None else v2[:, part].unbind(0)
        for t, (x, s) in enumerate(zip(x2[:, part].unbind(0), s2[:, part].unbind(0), strict=True)):
            work.charge(x, state, work.h)
            work.fire(work.h, s)
            state = state if targets is None else targets[t]
            work.reset(work.h, s, state)
        if targets is not None:
            v1[part].copy_(state)
    return spikes, v_last, v_seq


def multi_step_vjp(
    x_seq: Tensor,
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    wanted: Wanted = ONLY_X,
    *,
    owned: bool = False,
    v_last: Tensor | None = None,
) -> Gradients:
    """Gradients of :func:`multi_step` from its inputs and those of its outputs.

    Args:
        x_seq, v, neuron: what the forward took.
        grads: gradients of what it returned.
        wanted: which gradients to compute.
        owned: x_seq may be overwritten: it becomes h, then the gradient of x_seq.
        v_last: is overwritten with the final membrane. Laid out as :func:`multi_step` does.
    """
    order = order_of_steps(x_seq, v)
    if order is None or not _are_laid_out(grads, order):
        if v_last is not None:
            v_last.copy_(multi_step(x_seq, v, neuron)[1])
        return sequence_vjp(x_seq, v, grads, neuron, wanted)
    learns_leak = neuron.q is not None and wanted.q
    if learns_leak and neuron.rule.decay_input:
        owned = False  # x is needed once more
    owned = owned and (x_seq.shape[0] == 1 or x_seq.stride(0) == math.prod(x_seq.shape[1:]))
    g_x = x_seq if owned else empty_in(x_seq, order) if wanted.x else None
    x2 = as_rows(x_seq, order)
    h2 = None if g_x is None else as_rows(g_x, order)  # None: h lives in a chunk
    rows = _rows_of(grads, order)
    last = None if v_last is None else as_rows(v_last[None], order)[0]
    start = as_rows(v[None], order)[0] if isinstance(v, Tensor) else v
    if h2 is not None and not wanted.v and on_numba.backward(x2, start, rows, h2, last, neuron):
        return Gradients(g_x, (None, None), [])
    g_start = [empty_in(x_seq, order, steps=False) for _ in range(1 + neuron.leaky)] if wanted.v else []
    starts = [as_rows(g[None], order)[0] for g in g_start]
    g_q: list[Tensor] = []
    # A sum over neurons must not be cut (reference, note on order, 4).
    for part, work in _chunks(x2, neuron, neuron.surrogate.uniform, whole=learns_leak):
        xs = x2[:, part].unbind(0)
        hs = xs if owned else (torch.empty_like(x2[:, part]) if h2 is None else h2[:, part]).unbind(0)
        before = _cut(start, part)
        work.charge_again(xs, hs, before)
        if last is not None:
            work.fire(hs[-1], work.s)
            work.reset(hs[-1], work.s, last[part])
        g_q += work.back(xs, hs, _part_of(rows, part), [g[part] for g in starts], before, learns_leak)
    parts = (*g_start, None, None)
    return Gradients(g_x if wanted.x else None, (parts[0], parts[1]), g_q)


def _are_laid_out(grads: OutputGradients, order: tuple[int, ...]) -> bool:
    g_s, g_v, g_v_seq = grads
    given = (g_s, g_v_seq, None if g_v is None else g_v[None])
    return all(g is None or is_contiguous_in(g, order[1:], zeros=True) for g in given)


def _rows_of(grads: OutputGradients, order: tuple[int, ...]) -> OutputGradients:
    """The gradients [T, n], and [n] of the final membrane."""
    g_s, g_v, g_v_seq = grads
    return OutputGradients(
        None if g_s is None else as_rows(g_s, order),
        None if g_v is None else as_rows(g_v[None], order)[0],
        None if g_v_seq is None else as_rows(g_v_seq, order),
    )


def _part_of(rows: OutputGradients, part: slice) -> OutputGradients:
    return OutputGradients(*(None if g is None else g[..., part] for g in rows))


def _cut(v: Tensor | float, part: slice) -> Tensor | float:
    return v[part] if isinstance(v, Tensor) else v


def _fill(buffer: Tensor, v: Tensor | float) -> Tensor:
    return buffer.copy_(v) if isinstance(v, Tensor) else buffer.fill_(v)


def _chunks(
    x2: Tensor, neuron: Neuron, uniform: bool, whole: bool = False
) -> Iterator[tuple[slice, _Work]]:
    """Slices of the neurons, each with a working set of its length."""
    n = x2.shape[1]
    parts = [slice(0, n)] if whole else cuts(n, x2.device, uniform)
    work = _Work(x2, max(part.stop - part.start for part in parts), neuron)
    for part in parts:
        work.resize(part.stop - part.start)
        yield part, work


class _Work:
    """One chunk's buffers ``h s u k carry state``, made when first used, and a step's operations."""

    h: Tensor
    s: Tensor
    u: Tensor
    k: Tensor
    carry: Tensor
    state: Tensor

    def __init__(self, x2: Tensor, size: int, neuron: Neuron) -> None:
        self.rule, self.surrogate, self.q = rule, surrogate, _ = neuron
        self.leaky = neuron.leaky
        self.unrounded = x2.dtype in (torch.float32, torch.float64)
        self.binary = surrogate.spikes
        self.compare = torch.gt if surrogate.strict else torch.ge
        self.compares = (
            surrogate.fire is None
            and self.unrounded
            and math.isfinite(rule.v_threshold)
            and (rule.v_threshold == 0 or abs(rule.v_threshold) > 1e-30)
        )
        self.one, self.zero = x2.new_ones(()), x2.new_zeros(())
        self.size = self.length = size
        self._new: Callable[[int], Tensor] = x2.new_empty
        self._rows: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Tensor:
        if name not in _Work.__annotations__:
            raise AttributeError(name)
        row = self._rows.setdefault(name, self._new(self.size))[: self.length]
        self.__dict__[name] = row
        return row

    def resize(self, length: int) -> None:
        if length != self.length:
            self.length = length
            for name in self._rows:
                self.__dict__.pop(name, None)

    def _leak(self, x: Tensor, out: Tensor) -> Tensor:
        if self.q is not None:
            return torch.mul(x, self.q, out=out)
        return torch.div(x, self.rule.tau, out=out)  # type: ignore[arg-type]

    def _from_rest(self, v: Tensor) -> Tensor:
        return torch.sub(v, self.rule.rest, out=self.k) if self.rule.rest else v

    def charge(self, x: Tensor, v: Tensor, out: Tensor) -> None:
        """h into out, which may be x. Uses k."""
        if not self.leaky:
            torch.add(v, x, out=out)
        elif self.rule.decay_input:
            torch.sub(x, self._from_rest(v), out=out)
            self._leak(out, out).add_(v)
        else:
            leak = self._leak(self._from_rest(v), self.k)
            torch.add(torch.sub(v, leak, out=self.k), x, out=out)

    def fire(self, h: Tensor, out: Tensor) -> None:
        """Spikes into out. Uses u."""
        if self.compares:
            self.compare(h, self.rule.v_threshold, out=out)
        else:
            self._fire_at(torch.sub(h, self.rule.v_threshold, out=self.u), out)

    def _fire_at(self, u: Tensor, out: Tensor) -> None:
        if self.surrogate.fire is None:
            self.compare(u, 0, out=out)
        else:
            out.copy_(self.surrogate.fire(u))

    def reset(self, h: Tensor, s: Tensor, out: Tensor) -> None:
        """The membrane after the step into out. Uses k."""
        rule = self.rule
        if rule.v_reset is None:
            if self.binary and self.unrounded:
                torch.sub(h, s, alpha=rule.v_threshold, out=out)
            else:
                torch.sub(h, torch.mul(s, rule.v_threshold, out=self.k), out=out)
            return
        keep = torch.sub(self.one, s, out=self.k)
        if self.binary and rule.v_reset == 0:
            torch.addcmul(self.zero, keep, h, out=out)
        elif self.binary:
            torch.mul(s, rule.v_reset, out=out).addcmul_(keep, h)
        else:
            torch.mul(s, rule.v_reset, out=out).add_(keep.mul_(h))

    def charge_again(self, xs: Sequence[Tensor], hs: Sequence[Tensor], before: Tensor | float) -> None:
        """The charged membranes of all steps into hs, which may be xs. Uses s k state."""
        state = _fill(self.state, before)
        for t, (x, h) in enumerate(zip(xs, hs, strict=True)):
            self.charge(x, state, h)
            if t + 1 < len(xs):
                self.fire(h, self.s)
                self.reset(h, self.s, state)

    def back(
        self,
        xs: Sequence[Tensor],
        hs: Sequence[Tensor],
        grads: OutputGradients,
        starts: list[Tensor],
        before: Tensor | float,
        learns_leak: bool,
    ) -> list[Tensor]:
        """Gradients of the currents over the charged membranes hs; those of q, the last step's first.

        ``starts``: for the two terms of the membrane ``before``, if wanted.
        """
        g_s, carry, g_v_seq = grads
        gs = None if g_s is None else g_s.unbind(0)
        gvs = None if g_v_seq is None else g_v_seq.unbind(0)
        if gvs is not None:
            carry = gvs[-1] if carry is None else torch.add(carry, gvs[-1], out=self.carry)
        g_q: list[Tensor] = []
        for t in reversed(range(len(hs))):
            if learns_leak:
                self.previous(hs[t - 1] if t else None, before)
            g_h = self.fire_reset_vjp(hs[t], None if gs is None else gs[t], carry)
            if learns_leak:
                g_q.append(self.leak_vjp(g_h, xs[t], self.state))
            if t:
                carry = self.charge_vjp(g_h, hs[t], None if gvs is None else gvs[t - 1])
            else:
                self.first_vjp(g_h, hs[0], starts)
        return g_q

    def previous(self, h: Tensor | None, before: Tensor | float) -> None:
        """The membrane after the step that charged to h (None: before all) into state. Uses s u k."""
        if h is None:
            _fill(self.state, before)
        else:
            self.fire(h, self.s)
            self.reset(h, self.s, self.state)

    def fire_reset_vjp(self, h: Tensor, g_s: Tensor | None, g_v: Tensor | None) -> Tensor:
        """:func:`.reference.fire_reset_vjp`; the result must not be written to. Uses h s u k."""
        rule = self.rule
        u = torch.sub(h, rule.v_threshold, out=self.u)
        if g_v is None:
            assert g_s is not None
            return self.surrogate.vjp(g_s, u)
        keep = None
        if rule.v_reset is not None:
            self._fire_at(u, self.s)
            keep = torch.sub(self.one, self.s, out=self.k)
        if not rule.detach_reset:
            factor = rule.v_threshold if rule.v_reset is None else h
            term = torch.mul(g_v, factor, out=self.s)
            g_s = term.neg_() if g_s is None else torch.sub(g_s, term, out=term)
            if rule.v_reset == 0:
                g_s.add_(g_v, alpha=0)  # not nothing where g_v is infinite
            elif rule.v_reset is not None:
                g_s.add_(torch.mul(g_v, rule.v_reset, out=self.h))
        if g_s is None:
            return u.copy_(g_v) if keep is None else torch.mul(keep, g_v, out=u)
        through_spike = self.surrogate.vjp(g_s, u)
        if keep is None:
            return torch.add(g_v, through_spike, out=u)
        if self.binary:
            return torch.addcmul(through_spike, keep, g_v, out=u)
        return torch.add(keep.mul_(g_v), through_spike, out=u)

    def leak_vjp(self, g_h: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """The gradient of q at the step that charged v with x. Uses s k."""
        assert self.q is not None
        pull = self._from_rest(v)
        if self.rule.decay_input:
            pull = torch.sub(x, pull, out=self.k)
        total = torch.mul(g_h, pull, out=self.s).sum()
        # Stock adds up negative terms, and no sum of zeros is -0.
        return (total if self.rule.decay_input else total.neg_().add_(0.0)).to(self.q.dtype)

    def charge_vjp(self, g_h: Tensor, out: Tensor, above: Tensor | None) -> Tensor:
        """x's gradient into out; returns that of the membrane before the step. Uses k carry.

        ``above`` is what that membrane gets from v_seq.
        """
        if not self.leaky:
            out.copy_(g_h)
            return out if above is None else torch.add(above, out, out=self.carry)
        leak = self._leak_vjp(g_h, out)
        total = g_h if above is None else torch.add(above, g_h, out=self.carry)
        return torch.sub(total, leak, out=self.carry)

    def first_vjp(self, g_h: Tensor, out: Tensor, starts: list[Tensor]) -> None:
        """x's gradient into out, and the two terms of the first membrane's into starts, if wanted."""
        for start in starts[:1]:
            start.copy_(g_h)
        if not self.leaky:
            out.copy_(g_h)
            return
        leak = self._leak_vjp(g_h, out)
        for start in starts[1:]:
            torch.neg(leak, out=start)

    def _leak_vjp(self, g_h: Tensor, out: Tensor) -> Tensor:
        if self.rule.decay_input:
            return self._leak(g_h, out)
        out.copy_(g_h)
        return self._leak(out, self.k)
