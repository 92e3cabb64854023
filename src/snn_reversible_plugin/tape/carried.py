"""What recipes keep alive in place of what autograd would have: a debt that is paid when it saves one.

The one idea: a recipe may newly keep as many bytes as its output has, and so may the next one that it leads
to. Where autograd saves nothing between, the chain would come to hold more than stock, which lets all of
it go. So each value knows what is kept for it since something was last saved.

For example, ``u = v * d + x; save(u - 1)`` with a product ``x`` that is kept: the first recipe keeps v, the
second would keep x as well, two tensors for the one that autograd saves. So u is kept, and v and x go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from snn_reversible_plugin.tape.handles import Handle, Kept

Carried = Mapping[Kept, float]
"""Tensors that are kept for a value, with the bytes of each that this value accounts for."""

NOTHING: Carried = {}


def unpaid(carried: Carried) -> float:
    """Bytes among what is carried that are held for recipes alone."""
    return sum(min(kept.unpaid, size) for kept, size in carried.items())


def together(some: Carried, more: Carried, part: float = 1.0) -> Carried:
    """What both carry, of the second a part, as far as it is not paid."""
    owed = {kept: size * part for kept, size in more.items() if kept.unpaid}
    if not some or not owed:
        return owed or some
    return {**owed, **{kept: max(size, owed.get(kept, 0.0)) for kept, size in some.items()}}


def owe(handles: Iterable[Handle], carried: Carried) -> Carried:
    """Note that tensors are kept for a recipe that carries these already."""
    more = {one: float(one.tensor.untyped_storage().nbytes()) for one in handles if isinstance(one, Kept)}
    for kept, size in more.items():
        kept.unpaid = size
    return together(carried, more)


def pay(carried: Carried, size: float) -> None:
    """Autograd saves a value of this size that carries these."""
    for kept in carried:
        paid = min(kept.unpaid, size)
        kept.unpaid -= paid
        size -= paid
