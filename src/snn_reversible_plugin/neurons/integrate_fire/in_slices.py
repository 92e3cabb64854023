"""A sequence's backward where its input is rebuilt a slice of the batch at a time.

The one idea: neurons don't see each other, so all time steps of some samples make a sequence of their own.
What stands whole is the gradient that comes in and the one that goes out. Source: this package's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.integrate_fire.in_place import SumsOfSteps, multi_step_vjp
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Gradients,
    Neuron,
    OutputGradients,
    Wanted,
)
from snn_reversible_plugin.tape.sliced.rows import Part


def sequence_vjp_in_slices(
    cut: tape.Cut,
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    wanted: Wanted,
    v_last: Tensor | None = None,
    *,
    overwrites: bool = False,
) -> Gradients:
    """As :func:`.in_place.multi_step_vjp`, of an input that is cut. A leak's gradients are sums.

    Args:
        cut: of the input [T, N, ...]. Where it can't be cut by samples, it is put together.
        v, grads, neuron, wanted, v_last: as there.
        overwrites: the gradient of the spikes may be overwritten with that of the input.
    """
    wanted = wanted._replace(sums_chunks=True)
    way = cut.size[0], cut.size[1]
    parts = cut.parts(way) if way in cut.exact else []
    if len(parts) < 2:  # one part of all may be a view of what others hold
        x_seq = cut.whole()
        cut.release()
        return multi_step_vjp(x_seq, v, grads, neuron, wanted, owned=True, v_last=v_last)
    whole = _Whole(cut, v_last, wanted, grads.s if overwrites else None)
    for part in parts:
        samples = slice(part.start, part.stop)
        start = v[samples] if isinstance(v, Tensor) else v
        of_part = OutputGradients(
            *(None if g is None else g[:, samples] if steps else g[samples]
              for g, steps in zip(grads, (True, False, True), strict=True))
        )  # fmt: skip
        whole.put(samples, _of_part(cut, part, start, of_part, neuron, (wanted, v_last)))
    cut.release()
    return Gradients(whole.x, (whole.v[0], whole.v[1]), whole.q.values())


def _of_part(
    cut: tape.Cut,
    part: Part,
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    how: tuple[Wanted, Tensor | None],
) -> tuple[Gradients, Tensor | None]:
    """The gradients of some samples, and their final membrane if that of all is asked for."""
    x_seq = cut.rows(part).reshape(part.outer, part.stop - part.start, *cut.size[2:])
    wanted, v_last = how
    last = None if v_last is None else torch.empty_like(x_seq[0], dtype=v_last.dtype)
    owned = x_seq.untyped_storage().nbytes() == x_seq.nbytes  # and no view of what others hold
    found = multi_step_vjp(x_seq, v, grads, neuron, wanted, owned=owned, v_last=last)
    return found, last


class _Whole:
    """The gradients of all samples, put together."""

    def __init__(self, cut: tape.Cut, v_last: Tensor | None, wanted: Wanted, spare: Tensor | None) -> None:
        self._samples, self._v_last = cut.size[1], v_last
        self.x = None
        if wanted.x:
            self.x = spare if spare is not None and cut.is_like(spare) else cut.empty()
        self.v: list[Tensor | None] = [None, None]
        self.q = SumsOfSteps()

    def put(self, samples: slice, of_part: tuple[Gradients, Tensor | None]) -> None:
        (g_x, g_v, g_q), last = of_part
        if self.x is not None and g_x is not None:
            self.x[:, samples] = g_x
        if self._v_last is not None and last is not None:
            self._v_last[samples] = last
        for at, g in enumerate(g_v):
            if g is None:
                continue
            whole = self.v[at]
            if whole is None:
                whole = self.v[at] = g.new_empty((self._samples, *g.shape[1:]))
            whole[samples] = g
        self.q.add(g_q)
