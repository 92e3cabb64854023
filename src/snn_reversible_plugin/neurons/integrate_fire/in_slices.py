"""A sequence's backward where its input is rebuilt a slice of the batch at a time.

The one idea: neurons don't see each other, so all time steps of some samples make a sequence of their own.
What stands whole is the gradient that comes in and the one that goes out. Source: this package's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step_vjp
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Gradients,
    Neuron,
    OutputGradients,
    Wanted,
)


def sequence_vjp_in_slices(
    cut: tape.Cut,
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    wanted: Wanted,
    v_last: Tensor | None = None,
) -> Gradients:
    """As :func:`.in_place.multi_step_vjp`, for an input that is cut; a leak's gradients are sums over slices.

    Args:
        cut: of the input [T, N, ...]. Where it can't be cut by samples, it is put together.
        v, grads, neuron, wanted, v_last: as there.
    """
    if cut.size[0] not in cut.exact:
        x_seq = cut.whole()
        cut.release()
        return multi_step_vjp(x_seq, v, grads, neuron, wanted, owned=True, v_last=v_last)
    parts = cut.parts(outer=cut.size[0])
    g_x = cut.empty() if wanted.x else None
    g_v: list[Tensor | None] = [None, None]
    g_q: list[Tensor] = []
    for part in parts:
        samples = slice(part.start, part.stop)
        x_seq = cut.rows(part).unflatten(0, (part.outer, -1))
        whole = [
            None if v_last is None else torch.empty_like(v_last[samples]),
            *(None if g is None else g[:, samples] for g in (grads.s, grads.v_seq)),
        ]
        found = multi_step_vjp(
            x_seq,
            v[samples] if isinstance(v, Tensor) else v,
            OutputGradients(whole[1], None if grads.v is None else grads.v[samples], whole[2]),
            neuron,
            wanted,
            owned=x_seq.untyped_storage().nbytes() == x_seq.nbytes,  # and no view of what others hold
            v_last=whole[0],
        )
        if g_x is not None and found.x is not None:
            g_x[:, samples] = found.x
        if v_last is not None and whole[0] is not None:
            v_last[samples] = whole[0]
        for at, g in enumerate(found.v):
            if g is not None:
                if g_v[at] is None:
                    g_v[at] = torch.empty((cut.size[1], *g.shape[1:]), dtype=g.dtype, device=g.device)
                g_v[at][samples] = g  # type: ignore[index]
        g_q = [one + other for one, other in zip(g_q, found.q, strict=True)] if g_q else list(found.q)
    cut.release()
    return Gradients(g_x, (g_v[0], g_v[1]), g_q)
