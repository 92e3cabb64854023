"""Sequences on a device that has a form for them: one launch there, one back.

The one idea: a form works on rows [T, n] and computes what stock's own kernel does; what is left to do here
is to lay out what it writes as stock lays it out, and to find rows in what it reads. Of a release that is
torch code, the form's operations are in autograd's order.

Source: the launches in ``_ops/{if_,lif,plif}/triton.py`` of SpikingJelly 2.0; its older releases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Gradients,
    Neuron,
    Order,
    OutputGradients,
    Wanted,
    number_pulling,
)
from snn_reversible_plugin.neurons.surrogates import in_one_pass
from snn_reversible_plugin.ops.forms import SEQUENCE, form_of
from snn_reversible_plugin.ops.layouts import (
    as_rows,
    empty_in,
    in_place_of,
    is_contiguous_in,
    is_dense,
    order_of_steps,
)

# NOTE [Layouts of a device's kernel]
#
# 1. Stock's kernels write what `empty_like` of the currents gives, whatever the layout, and read any
#    strides. Ours read rows of any strides, and write rows that are dense: so where `empty_like` of the
#    currents has contiguous or channels-last steps they are rows of it, and elsewhere stock's kernel runs.
# 2. Gradients come in any layout. What has no rows in the order of the currents is copied once.
# 3. What is torch code is launched for plain currents only, since it selects its steps; and where one of
#    its gradients isn't, the layouts on the way, which order sums, are left to the formulas.


def order_of(x_seq: Tensor, v: Tensor | float) -> tuple[int, ...] | None:
    """The order of dimensions of the rows that stock's results have; None where they have none.

    Example:
        >>> import torch
        >>> order_of(torch.empty(4, 2, 3, 5, 5), 0.0), order_of(torch.empty(2, 4, 3).transpose(0, 1), 0.0)
        ((0, 1, 2, 3, 4), None)
    """
    if x_seq.is_contiguous() and (not isinstance(v, Tensor) or v.is_contiguous()):
        return tuple(range(x_seq.dim()))
    return order_of_steps(torch.empty_like(x_seq, device="meta"), v)


def takes(neuron: Neuron, device: torch.device) -> bool:
    """Whether a device has a form for the sequences of a neuron, whose arithmetic is stock's there."""
    form: Any = form_of(SEQUENCE, device)
    if form is None:
        return False
    if neuron.rule.order == Order():
        return _name(neuron) in form.SURROGATES
    return in_one_pass(neuron.surrogate, device) is not None


def multi_step(
    x_seq: Tensor, v: Tensor | float, neuron: Neuron, store_v_seq: bool, *, over: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`.neurons.integrate_fire.reference.sequence`: the membranes are float32. ``over``: spikes may
    take the place of x_seq."""
    form: Any = form_of(SEQUENCE, x_seq.device)
    order = order_of(x_seq, v)
    assert order is not None  # others are left to stock
    spikes = in_place_of(x_seq) if over and is_contiguous_in(x_seq, order) else None
    if neuron.rule.order == Order():
        spikes = torch.empty_like(x_seq) if spikes is None else spikes
        v_last = torch.empty_like(_one_step(x_seq, v), dtype=torch.float32)
        v_seq = torch.empty_like(x_seq, dtype=torch.float32) if store_v_seq else None
    else:
        spikes = empty_in(x_seq, order) if spikes is None else spikes
        v_last = empty_in(x_seq, order, False, torch.float32)
        v_seq = empty_in(x_seq, order, dtype=torch.float32) if store_v_seq else None
    made = form.Made(
        as_rows(spikes, order), _row(v_last, order), None if v_seq is None else as_rows(v_seq, order)
    )
    form.forward(as_rows(x_seq, order), _start(v, order), neuron.rule, neuron.q, made)
    return spikes, v_last, v_seq


def multi_step_vjp(
    x_seq: Tensor,
    v: Tensor | float,
    grads: OutputGradients,
    neuron: Neuron,
    wanted: Wanted,
    owned: bool,
    v_last: Tensor | None,
) -> Gradients:
    """Its gradients, by name and meaning those of :func:`.neurons.integrate_fire.in_place.multi_step_vjp`.

    The gradient of the first membrane is one term, and so is that of q.
    """
    order = order_of(x_seq, v)
    if order is None:  # a slice of a batch
        x_seq, v = x_seq.contiguous(), v.contiguous() if isinstance(v, Tensor) else v
        order, owned = tuple(range(x_seq.dim())), True
    form: Any = form_of(SEQUENCE, x_seq.device)
    x2, of_step = as_rows(x_seq, order), _one_step(x_seq, v)
    learns = neuron.q is not None and wanted.q
    owned = owned and is_dense(x_seq) and is_contiguous_in(x_seq, order[1:])
    g_s, g_v, g_v_seq = grads
    given = form.Given(
        None if g_s is None else as_rows(g_s, order),
        None if g_v is None else _row(g_v, order),
        None if g_v_seq is None else as_rows(g_v_seq, order),
    )
    if neuron.rule.order != Order():
        return _as_autograd(x_seq, v, given, neuron, (wanted, learns), owned, v_last)
    g_x = x_seq if owned and not (learns and neuron.rule.decay_input) else torch.empty_like(x_seq)
    g_start = torch.empty_like(of_step, dtype=torch.float32) if wanted.v else None
    g_q = torch.empty_like(of_step, dtype=torch.float32) if learns else None
    places = (None if place is None else _row(place, order) for place in (g_start, g_q, v_last))
    surrogate = _name(neuron), dict(neuron.surrogate.parameters)["alpha"]
    form.backward(
        x2,
        _start(v, order),
        neuron.rule,
        neuron.q,
        surrogate,
        given,
        form.Wanted(as_rows(g_x, order), *places),
    )
    return Gradients(g_x if wanted.x else None, (g_start, None), [] if g_q is None else [g_q.sum()])


_ALIGNED = 32  # a row's beginning, in elements: torch adds up what lies at another place in another order


def _as_autograd(
    x_seq: Tensor,
    v: Tensor | float,
    given: Any,
    neuron: Neuron,
    wanted: tuple[Wanted, bool],
    owned: bool,
    v_last: Tensor | None,
) -> Gradients:
    """Of a release that is torch code, in plain layouts: w gets a gradient of every step."""
    form: Any = form_of(SEQUENCE, x_seq.device)
    (of, learns), order, of_step = wanted, tuple(range(x_seq.dim())), x_seq[0]
    g_x = x_seq if owned else empty_in(x_seq, order)
    starts = [empty_in(x_seq, order, False, torch.float32) for _ in range(neuron.parts if of.v else 0)]
    start, leak = (*(_row(one, order) for one in starts), None, None)[:2]
    steps, n = len(x_seq), of_step.numel()
    products = None
    if learns:
        products = x_seq.new_empty(steps, -(-n // _ALIGNED) * _ALIGNED, dtype=torch.float32)[:, :n]
    last = None if v_last is None else _row(v_last, order)
    places = form.Wanted(as_rows(g_x, order), start, products, last, leak)
    form.backward_as_autograd(as_rows(x_seq, order), _start(v, order), neuron, given, places)
    g_q = [] if products is None else [_of_leak(row, neuron) for row in reversed(products.unbind(0))]
    if g_q and (number := number_pulling(v, neuron.rule)) is not None:
        assert products is not None
        g_q[-1] = -(products[0].sum() * number)
    parts = (*starts, None, None)
    return Gradients(g_x if of.x else None, (parts[0], parts[1]), g_q)


def _of_leak(products: Tensor, neuron: Neuron) -> Tensor:
    total = products.sum()
    return -total if neuron.rule.scales else total


def _name(neuron: Neuron) -> str:
    return (neuron.surrogate.name or "").removeprefix("spikingjelly.")


def _one_step(x_seq: Tensor, v: Tensor | float) -> Tensor:
    return v if isinstance(v, Tensor) else x_seq[0]


def _row(v: Tensor, order: tuple[int, ...]) -> Tensor:
    return as_rows(v[None], order)[0]


def _start(v: Tensor | float, order: tuple[int, ...]) -> Tensor | float:
    return _row(v, order) if isinstance(v, Tensor) else v
