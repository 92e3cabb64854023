"""A sequence's backward on a slice of the batch at a time: of an input that is rebuilt that way, or where
the input's gradient takes the place of the one that came in.

The one idea: neurons don't see each other, so all time steps of some samples make a sequence of their own.
What stands whole is the gradient that comes in and the one that goes out, which may be one tensor. Source:
this package's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

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
from snn_reversible_plugin.tape.sliced.cut import is_few_slices, step_of

_Input = tuple[slice, Tensor, dict[Any, Tensor]]  # of which samples, and what was found on the way to it


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
    parts = cut.parts(way) if (way := (cut.size[0], cut.size[1])) in cut.exact else []
    if len(parts) < 2:  # one part of all may be a view of what others hold
        x_seq, owned = cut.whole(), not cut.stands()
        cut.release()
        wanted = wanted._replace(sums_chunks=True)
        return multi_step_vjp(x_seq, v, grads, neuron, wanted, owned=owned, v_last=v_last)
    g_x = None
    if wanted.x:
        g_x = grads.s if overwrites and grads.s is not None and cut.is_like(grads.s) else cut.empty()

    sums = None if g_x is None else tape.sums_for_norm(cut.handle)

    def inputs() -> Iterator[_Input]:
        for part in parts:
            found: dict[Any, Tensor] = {}
            yield (
                slice(part.start, part.stop),
                cut.rows(part, found).reshape(part.outer, -1, *cut.size[2:]),
                found,
            )

    whole = _Whole(cut.size[1], g_x, v_last, sums)
    gradients = _put_together(inputs(), v, grads, neuron, wanted, whole)
    if sums is not None and g_x is not None:
        sums.leave(g_x)
    cut.release()
    return gradients


def sequence_vjp_over(
    x_seq: Tensor,
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    wanted: Wanted,
    v_last: Tensor | None = None,
) -> Gradients:
    """As :func:`.in_place.multi_step_vjp`, with the input's gradient in place of that of the spikes.

    That one :func:`may_be_written_over`. A leak's gradients are sums.
    """
    count = x_seq.shape[1]
    each = max(1, step_of(x_seq.nbytes, x_seq.device) * count // x_seq.nbytes)
    parts = [slice(start, min(start + each, count)) for start in range(0, count, each)]
    inputs: Iterator[_Input] = (
        (part, x_seq[:, part].contiguous() if neuron.launched else x_seq[:, part], {}) for part in parts
    )
    return _put_together(inputs, v, grads, neuron, wanted, _Whole(count, grads.s, v_last))


def may_be_written_over(x_seq: Tensor, g_s: Tensor | None, neuron: Neuron) -> bool:
    """Whether the gradient of an input may take the place of that of the spikes, by their layouts; and if
    it is large and of several samples, so that anything is won."""
    if g_s is None or x_seq.shape[1] < 2 or is_few_slices(x_seq):
        return False
    alike = (g_s.shape, g_s.stride(), g_s.dtype) == (x_seq.shape, x_seq.stride(), x_seq.dtype)
    return alike and (x_seq.is_contiguous() or not neuron.launched)


def _put_together(
    inputs: Iterable[_Input],
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    wanted: Wanted,
    whole: _Whole,
) -> Gradients:
    """The gradients of all samples; ``inputs``: which, theirs, and what was found on the way to that, some
    at a time."""
    wanted = wanted._replace(sums_chunks=True)
    for samples, x_seq, on_the_way in inputs:
        start = v[samples] if isinstance(v, Tensor) else v
        of_part = OutputGradients(
            *(None if g is None else g[:, samples] if steps else g[samples]
              for g, steps in zip(grads, (True, False, True), strict=True))
        )  # fmt: skip
        last = whole.last(x_seq)
        owned = x_seq.untyped_storage().nbytes() == x_seq.nbytes  # and no view of what others hold
        found = multi_step_vjp(x_seq, start, of_part, neuron, wanted, owned=owned, v_last=last)
        whole.put(samples, found, last, on_the_way)
        on_the_way.clear()
        del x_seq, of_part, found, last  # before the next ones are made
    return whole.gradients()


class _Whole:
    """The gradients of all samples, and their final membrane where that is asked for, put together.

    Args:
        samples: how many there are.
        g_x: where the input's gradient goes, if it is wanted.
        v_last: where the final membrane goes.
        sums: for the norm in front, which are taken on the way.
    """

    def __init__(
        self,
        samples: int,
        g_x: Tensor | None,
        v_last: Tensor | None,
        sums: tape.SumsForNorm | None = None,
    ) -> None:
        self._samples, self._g_x, self._v_last, self._sums = samples, g_x, v_last, sums
        self._g_v: list[Tensor | None] = [None, None]
        self._g_q = SumsOfSteps()

    def last(self, x_seq: Tensor) -> Tensor | None:
        """Room for the final membrane of some samples."""
        return None if self._v_last is None else torch.empty_like(x_seq[0], dtype=self._v_last.dtype)

    def put(
        self, samples: slice, of_part: Gradients, last: Tensor | None, on_the_way: dict[Any, Tensor]
    ) -> None:
        """What was found of some."""
        g_x, g_v, g_q = of_part
        if self._g_x is not None and g_x is not None:
            self._g_x[:, samples] = g_x
            if self._sums is not None:
                self._sums.add(g_x, on_the_way)
        if self._v_last is not None and last is not None:
            self._v_last[samples] = last
        for at, g in enumerate(g_v):
            if g is None:
                continue
            whole = self._g_v[at]
            if whole is None:
                whole = self._g_v[at] = g.new_empty((self._samples, *g.shape[1:]))
            whole[samples] = g
        self._g_q.add(g_q)

    def gradients(self) -> Gradients:
        """All of it."""
        return Gradients(self._g_x, (self._g_v[0], self._g_v[1]), self._g_q.values())
