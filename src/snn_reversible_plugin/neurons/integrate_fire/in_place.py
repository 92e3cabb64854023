"""The sequences of :mod:`.neurons.integrate_fire.reference`, in place and a chunk of neurons at a time.

The one idea: neurons don't see each other, so time is swept forth and back over as many neurons as fit
a core's cache, before the next ones. The forward writes spikes straight into its output; the backward
overwrites the rebuilt current with the charged membrane, and that with the current's gradient. What
they need beyond that is a few buffers of a chunk.

Source: the arithmetic is that of ``dynamics``, operation by operation; blocking for caches is old.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire import on_numba
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Gradients,
    Rule,
    Surrogate,
    Wanted,
    sequence,
    sequence_vjp,
)
from snn_reversible_plugin.ops.chunks import cuts
from snn_reversible_plugin.ops.layouts import as_rows, empty_in, is_contiguous_in, order_of_steps

# NOTE [Fewer operations, same bits]
#
# 1. Where the time steps of all tensors are laid out alike, contiguous or channels-last, so are all of
#    stock's, and each step is a row of a [T, n] view. Any other layout runs `dynamics`.
# 2. With spikes of 0 and 1 the products s * v and (1 - s) * h are exact, so multiplying and adding may
#    be fused. With other values they are not, nor where a scalar would be rounded to half precision
#    before it is multiplied.
# 3. `h >= v_threshold` is `h - v_threshold >= 0` in float32 and float64, unless the difference
#    underflows in a flush-to-zero mode, or is inf - inf.
# 4. `1 - s` and not `h < v_threshold`: they differ where h is NaN.


ONLY_X = Wanted(x=True, v=False, q=False)


def multi_step(
    x_seq: Tensor,
    v: Tensor | float,
    rule: Rule,
    surrogate: Surrogate,
    q: Tensor | None = None,
    store_v_seq: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`.neurons.integrate_fire.reference.sequence`, with less memory and time.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.neurons.integrate_fire.reference import Rule, Surrogate
        >>> from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step
        >>> rule = Rule(2.0, True, v_threshold=1.0, v_reset=0.0, detach_reset=True)
        >>> step_function = Surrogate(None, lambda grad, u: grad / (1 + u.abs()) ** 2)
        >>> spikes, v, _ = multi_step(torch.full((3, 1), 1.5), 0.0, rule, step_function)
        >>> spikes.squeeze(), v
        (tensor([0., 1., 0.]), tensor([0.7500]))
    """
    order = order_of_steps(x_seq, v)
    if order is None:
        return sequence(x_seq, v, rule, surrogate, q, store_v_seq)
    spikes, v_last = empty_in(x_seq, order), empty_in(x_seq, order, steps=False)
    v_seq = empty_in(x_seq, order) if store_v_seq else None
    x2, s2, v1 = as_rows(x_seq, order), as_rows(spikes, order), as_rows(v_last[None], order)[0]
    v2 = None if v_seq is None else as_rows(v_seq, order)
    start = as_rows(v[None], order)[0] if isinstance(v, Tensor) else v
    if q is None and v2 is None and on_numba.forward(x2, start, s2, v1, rule, surrogate):
        return spikes, v_last, None
    uniform = surrogate.uniform or surrogate.fire is None
    for part, work in _chunks(x2, rule, surrogate, q, uniform):
        state = _start(v1[part], start, part)
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
    g_s: Tensor | None,
    g_v: Tensor | None,
    g_v_seq: Tensor | None,
    rule: Rule,
    surrogate: Surrogate,
    q: Tensor | None = None,
    wanted: Wanted = ONLY_X,
    *,
    owned: bool = False,
    v_last: Tensor | None = None,
) -> Gradients:
    """Gradients of :func:`multi_step` from its inputs and those of its outputs (None: no gradient).

    Args:
        x_seq, v, rule, surrogate, q: what the forward took.
        g_s, g_v, g_v_seq: gradients of spikes, final membrane and membranes, not all None.
        wanted: which gradients to compute.
        owned: x_seq may be overwritten: it becomes h, then the gradient of x_seq.
        v_last: is overwritten with the final membrane. Laid out as :func:`multi_step` does.
    """
    order = order_of_steps(x_seq, v)
    if order is None or not all(
        g is None or is_contiguous_in(g, order[1:], zeros=True)
        for g in (g_s, g_v_seq, None if g_v is None else g_v[None])
    ):
        if v_last is not None:
            v_last.copy_(multi_step(x_seq, v, rule, surrogate, q)[1])
        return sequence_vjp(x_seq, v, g_s, g_v, g_v_seq, rule, surrogate, q, wanted)
    learns_leak = q is not None and wanted.q
    if learns_leak and rule.decay_input:
        owned = False  # x is needed once more
    owned = owned and (x_seq.shape[0] == 1 or x_seq.stride(0) == math.prod(x_seq.shape[1:]))
    g_x = x_seq if owned else empty_in(x_seq, order) if wanted.x else None
    x2 = as_rows(x_seq, order)
    h2 = None if g_x is None else as_rows(g_x, order)  # None: h lives in a chunk
    gs2, gvs2 = (None if g is None else as_rows(g, order) for g in (g_s, g_v_seq))
    gv1 = None if g_v is None else as_rows(g_v[None], order)[0]
    last = None if v_last is None else as_rows(v_last[None], order)[0]
    start = as_rows(v[None], order)[0] if isinstance(v, Tensor) else v
    simple = q is None and gs2 is not None and gvs2 is None and h2 is not None and not wanted.v
    if simple and on_numba.backward(x2, start, gs2, gv1, last, h2, rule, surrogate):  # type: ignore[arg-type]
        return Gradients(g_x, (None, None), [])
    leaky = q is not None or rule.tau is not None
    g_start = [empty_in(x_seq, order, steps=False) for _ in range(1 + leaky)] if wanted.v else []
    starts = [as_rows(g[None], order)[0] for g in g_start]
    g_q: list[Tensor] = []
    # A sum over neurons must not be cut (dynamics, note on order, 4).
    chunks = _chunks(x2, rule, surrogate, q, surrogate.uniform, whole=learns_leak)
    for part, work in chunks:
        xs = x2[:, part].unbind(0)
        hs = xs if owned else (torch.empty_like(x2[:, part]) if h2 is None else h2[:, part]).unbind(0)
        state = _start(work.state, start, part)
        for t, (x, h) in enumerate(zip(xs, hs, strict=True)):
            work.charge(x, state, h)
            if t + 1 < len(xs):
                work.fire(h, work.s)
                work.reset(h, work.s, state)
        if last is not None:
            work.fire(hs[-1], work.s)
            work.reset(hs[-1], work.s, last[part])
        gs = None if gs2 is None else gs2[:, part].unbind(0)
        gvs = None if gvs2 is None else gvs2[:, part].unbind(0)
        carry = None if gv1 is None else gv1[part]
        if gvs is not None:
            carry = gvs[-1] if carry is None else torch.add(carry, gvs[-1], out=work.carry)
        for t in reversed(range(len(hs))):
            if learns_leak:
                work.previous(hs[t - 1] if t else None, start, part)
            g_h = work.fire_reset_vjp(hs[t], None if gs is None else gs[t], carry)
            if learns_leak:
                g_q.append(work.leak_vjp(g_h, xs[t], work.state))
            if t:
                above = None if gvs is None else gvs[t - 1]
                carry = work.charge_vjp(g_h, hs[t], above)
            else:
                work.first_vjp(g_h, hs[0], [g[part] for g in starts])
    parts = (*g_start, None, None)
    return Gradients(g_x if wanted.x else None, (parts[0], parts[1]), g_q)


def _start(buffer: Tensor, v: Tensor | float, part: slice) -> Tensor:
    return buffer.copy_(v[part]) if isinstance(v, Tensor) else buffer.fill_(v)


def _chunks(
    x2: Tensor,
    rule: Rule,
    surrogate: Surrogate,
    q: Tensor | None,
    uniform: bool,
    whole: bool = False,
) -> Iterator[tuple[slice, _Work]]:
    """Slices of the neurons, each with a working set of its length."""
    n = x2.shape[1]
    parts = [slice(0, n)] if whole else cuts(n, x2.device, uniform)
    work = _Work(x2, max(part.stop - part.start for part in parts), rule, surrogate, q)
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

    def __init__(self, x2: Tensor, size: int, rule: Rule, surrogate: Surrogate, q: Tensor | None) -> None:
        self.rule, self.surrogate, self.q = rule, surrogate, q
        self.leaky = q is not None or rule.tau is not None
        self.unrounded = x2.dtype in (torch.float32, torch.float64)
        self.binary = surrogate.fire is None
        self.compares = (
            self.binary
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
            torch.ge(h, self.rule.v_threshold, out=out)
        else:
            self._fire_at(torch.sub(h, self.rule.v_threshold, out=self.u), out)

    def _fire_at(self, u: Tensor, out: Tensor) -> None:
        if self.surrogate.fire is None:
            torch.ge(u, 0, out=out)
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

    def previous(self, h: Tensor | None, start: Tensor | float, part: slice) -> None:
        """The membrane after the step that charged to h (None: before all) into state. Uses s u k."""
        if h is None:
            _start(self.state, start, part)
        else:
            self.fire(h, self.s)
            self.reset(h, self.s, self.state)

    def fire_reset_vjp(self, h: Tensor, g_s: Tensor | None, g_v: Tensor | None) -> Tensor:
        """:func:`dynamics.fire_reset_vjp`; the result must not be written to. Uses h s u k."""
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
        return (total if self.rule.decay_input else total.neg_()).to(self.q.dtype)

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
