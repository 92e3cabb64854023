"""One chunk of neurons, for :mod:`.neurons.integrate_fire.in_place`: its buffers, and a step's operations.

The one idea: every operation writes into a buffer that the chunk keeps, so a step allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, OutputGradients, number_pulling


def fill(buffer: Tensor, v: Tensor | float) -> Tensor:
    """A buffer with a membrane, or one number for all, written into it."""
    return buffer.copy_(v) if isinstance(v, Tensor) else buffer.fill_(v)


class Chunk:
    """One chunk's buffers ``h s u k carry state``, made when first used, and a step's operations."""

    h: Tensor
    s: Tensor
    u: Tensor
    k: Tensor
    carry: Tensor
    state: Tensor

    def __init__(self, x2: Tensor, size: int, neuron: Neuron) -> None:
        self.rule, self.surrogate, self.q = rule, surrogate, _ = neuron.rule, neuron.surrogate, neuron.q
        self.leaky, self.parts = neuron.leaky, neuron.parts
        self.kept = neuron.kept if self.leaky and self.rule.scales else 1.0
        self.signs = self.rule.order.selects and len(x2) > 1  # no zero of x's gradient is negative
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
        if name not in Chunk.__annotations__:
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
        elif self.rule.scales:
            torch.add(torch.mul(v, self.kept, out=self.k), x, out=out)
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
        state = fill(self.state, before)
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
                number = None if t else number_pulling(before, self.rule)
                g_q.append(self.leak_vjp(g_h, xs[t], self.state, number))
            if t:
                carry = self.charge_vjp(g_h, hs[t], None if gvs is None else gvs[t - 1])
            else:
                self.first_vjp(g_h, hs[0], starts)
        return g_q

    def previous(self, h: Tensor | None, before: Tensor | float) -> None:
        """The membrane after the step that charged to h (None: before all) into state. Uses s u k."""
        if h is None:
            fill(self.state, before)
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
            g_s = self._spike_gradient(h, g_s, g_v)
        if g_s is None:
            return u.copy_(g_v) if keep is None else torch.mul(keep, g_v, out=u)
        through_spike = self.surrogate.vjp(g_s, u)
        if keep is None:
            return torch.add(g_v, through_spike, out=u)
        if self.binary:
            return torch.addcmul(through_spike, keep, g_v, out=u)
        return torch.add(keep.mul_(g_v), through_spike, out=u)

    def _spike_gradient(self, h: Tensor, g_s: Tensor | None, g_v: Tensor) -> Tensor:
        """That of the spikes and of the reset. Uses h s."""
        rule = self.rule
        term = torch.mul(g_v, rule.v_threshold if rule.v_reset is None else h, out=self.s)
        if rule.v_reset is None:
            return term.neg_() if g_s is None else torch.sub(g_s, term, out=term)
        # A multiple of zero is not nothing where g_v is infinite.
        if rule.v_reset == 0 or g_s is None or not (rule.order.v_reset_first or rule.order.reset_together):
            g_s = term.neg_() if g_s is None else torch.sub(g_s, term, out=term)
            if rule.v_reset == 0:
                return g_s.add_(g_v, alpha=0)
            return g_s.add_(torch.mul(g_v, rule.v_reset, out=self.h))
        value = torch.mul(g_v, rule.v_reset, out=self.h)
        if rule.order.v_reset_first:
            return torch.sub(value.add_(g_s), term, out=term)
        return value.sub_(term).add_(g_s)

    def leak_vjp(self, g_h: Tensor, x: Tensor, v: Tensor, number: float | None) -> Tensor:
        """The gradient of q at the step that charged v with x. ``number``: of which it made no tensor.
        Uses s k."""
        assert self.q is not None
        if number is not None:
            return (-g_h.sum() * number if not self.rule.scales else -(g_h.sum() * number)).to(self.q.dtype)
        pull = v if self.rule.scales else self._from_rest(v)
        if self.rule.decay_input:
            pull = torch.sub(x, pull, out=self.k)
        total = torch.mul(g_h, pull, out=self.s).sum()
        if self.rule.scales:
            return total.neg_().to(self.q.dtype)
        # Stock adds up negative terms, and no sum of zeros is -0.
        return (total if self.rule.decay_input else total.neg_().add_(0.0)).to(self.q.dtype)

    def charge_vjp(self, g_h: Tensor, out: Tensor, above: Tensor | None) -> Tensor:
        """x's gradient into out; returns that of the membrane before the step. Uses k carry.

        ``above`` is what that membrane gets from v_seq.
        """
        if not self.leaky or self.rule.scales:
            through = torch.mul(g_h, self.kept, out=self.carry) if self.leaky else g_h
            out.copy_(g_h)
            self._sign(out)
            if above is not None:
                return torch.add(above, through, out=self.carry)
            if self.leaky:
                return through
            return self.carry.copy_(g_h) if self.signs else out
        leak = self._leak_vjp(g_h, out)
        order = self.rule.order
        if above is None or order.charge_together or order.v_seq_last:
            total = torch.sub(g_h, leak, out=self.carry)
            total = total if above is None else total.add_(above)
        else:
            total = torch.add(above, g_h, out=self.carry).sub_(leak)
        self._sign(out)
        return total

    def first_vjp(self, g_h: Tensor, out: Tensor, starts: list[Tensor]) -> None:
        """x's gradient into out, and the terms of the first membrane's into starts, if wanted."""
        if not self.leaky or self.rule.scales:
            for start in starts:
                torch.mul(g_h, self.kept, out=start)
            out.copy_(g_h)
        else:
            leak = self._leak_vjp(g_h, out)
            if len(starts) == self.parts == 1:
                torch.sub(g_h, leak, out=starts[0])
            elif starts:
                starts[0].copy_(g_h)
                torch.neg(leak, out=starts[1])
        self._sign(out)

    def _sign(self, g_x: Tensor) -> None:
        if self.signs:
            g_x.add_(0.0)

    def _leak_vjp(self, g_h: Tensor, out: Tensor) -> Tensor:
        if self.rule.decay_input:
            return self._leak(g_h, out)
        out.copy_(g_h)
        return self._leak(out, self.k)
