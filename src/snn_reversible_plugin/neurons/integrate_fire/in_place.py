"""The sequences of :mod:`.neurons.integrate_fire.reference`, in place and a chunk of neurons at a time.

The one idea: neurons don't see each other, so time is swept forth and back over as many neurons as fit
a core's cache, before the next ones. The forward writes spikes straight into its output; the backward
overwrites the rebuilt current with the charged membrane, and that with the current's gradient. What
they need beyond that is a few buffers of a chunk.

Source: the arithmetic is that of ``reference``, operation by operation; blocking for caches is old.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire import on_device, on_numba
from snn_reversible_plugin.neurons.integrate_fire.chunk import Chunk, fill
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Gradients,
    Neuron,
    Order,
    OutputGradients,
    Wanted,
    sequence,
    sequence_vjp,
)
from snn_reversible_plugin.ops.chunks import cuts
from snn_reversible_plugin.ops.layouts import (
    as_rows,
    empty_in,
    in_place_of,
    is_contiguous_in,
    order_of_steps,
)

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
#
# NOTE [Neurons at a time on a device]
#
# A step is a dozen operations and more, each launched once a chunk: two chunks make 2.5 times stock's
# launches of convolution, batch norm and LIF already, all neurons at once 1.3 times. So all at once they
# are. The buffers are then some eight of a step, with those of a surrogate, beside the 2 T that stand.
# The peak of a training step is elsewhere from two steps on; with one it is a little higher. Mode "minimal"
# asks for small buffers, and has chunks.


ONLY_X = Wanted(x=True, v=False, q=False)


def multi_step(
    x_seq: Tensor,
    v: Tensor | float,
    neuron: Neuron,
    store_v_seq: bool = False,
    *,
    drops_last: bool = False,
    in_chunks: bool = False,
    over: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`.neurons.integrate_fire.reference.sequence`, with less memory and time.

    ``drops_last``: of the final membrane only the layout is asked for; it may come on the device "meta".
    ``in_chunks``: a device has small buffers and many launches, as a CPU has anyway. ``over``: spikes may
    take the place of x_seq.

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
    if neuron.launched:
        return on_device.multi_step(x_seq, v, neuron, store_v_seq, over=over)
    if neuron.wide and x_seq.dtype is not torch.float32:
        how: Any = {"drops_last": drops_last, "in_chunks": in_chunks}
        spikes, v_last, v_seq = multi_step(x_seq.float(), v, neuron, store_v_seq, **how)
        return spikes.to(x_seq.dtype), v_last, v_seq
    order = _order_of(x_seq, v, neuron)
    if order is None:
        return sequence(x_seq, v, neuron, store_v_seq)
    drops_last = drops_last and not store_v_seq and x_seq.numel() > on_numba.MOST
    over = over and is_contiguous_in(x_seq, order) and x_seq.numel() > on_numba.MOST
    spikes = in_place_of(x_seq) if over else empty_in(x_seq, order)
    v_last = empty_in(x_seq.to("meta") if drops_last else x_seq, order, steps=False)
    v_seq = empty_in(x_seq, order) if store_v_seq else None
    x2, s2, v1 = as_rows(x_seq, order), as_rows(spikes, order), as_rows(v_last[None], order)[0]
    v2 = None if v_seq is None else as_rows(v_seq, order)
    start = as_rows(v[None], order)[0] if isinstance(v, Tensor) else v
    if v2 is None and on_numba.forward(x2, start, s2, v1, neuron):
        return spikes, v_last, None
    uniform = neuron.surrogate.uniform or neuron.surrogate.fire is None
    at_once = not (in_chunks or x2.device.type == "cpu")
    for part, work in _chunks(x2, neuron, uniform, at_once):
        state = fill(work.state if drops_last else v1[part], _cut(start, part))
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
    if neuron.launched:
        if neuron.rule.order == Order() or _are_laid_out(grads, tuple(range(x_seq.dim()))):
            return on_device.multi_step_vjp(x_seq, v, grads, neuron, wanted, owned, v_last)
        neuron = neuron._replace(launched=False)
    if neuron.wide and x_seq.dtype is not torch.float32:
        wide = grads._replace(s=None if grads.s is None else grads.s.float())
        found = multi_step_vjp(x_seq.float(), v, wide, neuron, wanted, owned=True, v_last=v_last)
        return found._replace(x=None if found.x is None else found.x.to(x_seq.dtype))
    order = _order_of(x_seq, v, neuron)
    if order is None or not _are_laid_out(grads, order):
        if v_last is not None:
            v_last.copy_(multi_step(x_seq, v, neuron)[1])
        return sequence_vjp(x_seq, v, grads, neuron, wanted)
    learns_leak = neuron.q is not None and wanted.q
    again = learns_leak and neuron.rule.decay_input  # x is needed once more
    owned = owned and (wanted.sums_chunks or not again)
    owned = owned and (x_seq.shape[0] == 1 or x_seq.stride(0) == math.prod(x_seq.shape[1:]))
    g_x = x_seq if owned else empty_in(x_seq, order) if wanted.x else None
    x2 = as_rows(x_seq, order)
    h2 = None if g_x is None else as_rows(g_x, order)  # None: h lives in a chunk
    rows = _rows_of(grads, order)
    last = None if v_last is None else as_rows(v_last[None], order)[0]
    start = as_rows(v[None], order)[0] if isinstance(v, Tensor) else v
    if h2 is not None and not wanted.v and on_numba.backward(x2, start, rows, h2, last, neuron):
        return Gradients(g_x, (None, None), [])
    g_start = [empty_in(x_seq, order, steps=False) for _ in range(neuron.parts)] if wanted.v else []
    starts = [as_rows(g[None], order)[0] for g in g_start]
    g_q = SumsOfSteps()
    # A sum over neurons must not be cut (reference, note on order, 4), where bits are promised.
    at_once = not wanted.sums_chunks and (learns_leak or x2.device.type != "cpu")
    for part, work in _chunks(x2, neuron, neuron.surrogate.uniform, at_once):
        hs = (torch.empty_like(x2[:, part]) if h2 is None else h2[:, part]).unbind(0)
        xs = (x2[:, part].clone() if owned and again else x2[:, part]).unbind(0)
        before = _cut(start, part)
        work.charge_again(xs, hs, before)
        if last is not None:
            work.fire(hs[-1], work.s)
            work.reset(hs[-1], work.s, last[part])
        g_q.add(work.back(xs, hs, _part_of(rows, part), [g[part] for g in starts], before, learns_leak))
    parts = (*g_start, None, None)
    return Gradients(g_x if wanted.x else None, (parts[0], parts[1]), g_q.values())


class SumsOfSteps:
    """A learned leak's gradients, one a step, over parts of the neurons; added up in float32 at least."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._total: Tensor | None = None

    def add(self, of_part: list[Tensor]) -> None:
        if not self._first:
            self._first = of_part
        elif of_part:
            if self._total is None:
                wide = torch.promote_types(self._first[0].dtype, torch.float32)
                self._total = torch.stack(self._first).to(wide)
            self._total += torch.stack(of_part)

    def values(self) -> list[Tensor]:
        if self._total is None:
            return self._first
        return [*self._total.to(self._first[0].dtype).unbind()]


def _order_of(x_seq: Tensor, v: Tensor | float, neuron: Neuron) -> tuple[int, ...] | None:
    order = order_of_steps(x_seq, v)
    # What selects its steps, or cats them, changes layouts on the way, unless they are plain.
    return None if neuron.rule.order.selects and order != tuple(range(x_seq.dim())) else order


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


def _chunks(x2: Tensor, neuron: Neuron, uniform: bool, at_once: bool) -> Iterator[tuple[slice, Chunk]]:
    """Slices of the neurons, each with a working set of its length."""
    n = x2.shape[1]
    parts = [slice(0, n)] if at_once else cuts(n, x2.device, uniform)
    work = Chunk(x2, max(part.stop - part.start for part in parts), neuron)
    for part in parts:
        work.resize(part.stop - part.start)
        yield part, work
