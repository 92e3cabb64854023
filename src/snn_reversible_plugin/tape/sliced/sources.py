"""What a value comes from, by operations that give the forward's bits in slices.

The one idea: from a neuron's current down through the batch norm to the product, each operation was proved
or noted when the forward ran; what leads on is its first operand. Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch._ops import OpOverload

from snn_reversible_plugin.tape.handles import Handle
from snn_reversible_plugin.tape.operators import Kind, operator_of
from snn_reversible_plugin.tape.replayed import PLAIN, Replayed
from snn_reversible_plugin.tape.sliced.noted import noted_of
from snn_reversible_plugin.tape.sliced.rows import is_by_element, is_reshape


def _sources(handle: Handle) -> Iterator[Replayed]:
    """A value and what it comes from, one after another, as long as operations are exact in slices."""
    while handle.__class__ in PLAIN:
        assert isinstance(handle, Replayed)
        yield handle
        noted = noted_of(handle)
        if noted is None or not noted.exact or not handle.args or not isinstance(handle.args[0], Handle):
            return
        if not isinstance(handle.func, OpOverload) and not is_by_element(handle.func):
            return
        if any(isinstance(arg, Handle) and noted_of(arg) is not None for arg in handle.args[1:]):
            return  # a sum of two: what is made of both would have to stand
        if isinstance(handle.func, OpOverload) and operator_of(handle.func).name in ("repeat", "expand"):
            return  # what is repeated has other rows
        handle = handle.args[0]


def last_product(handle: Handle) -> Replayed | None:
    """The convolution or matrix product that a value comes from by operations that are exact in slices."""
    products = (one for one in _sources(handle) if isinstance(one.func, OpOverload))
    return next((one for one in products if operator_of(one.func).work), None)


def given_to_norm(handle: Handle) -> Replayed | None:
    """What a batch norm of the batch's statistics was given, where a value comes from its result by
    operations that are exact in slices.

    None where that is stored, or where others use what comes after it: their gradients are added up before
    the norm's turn comes.
    """
    was_normalized = False
    for one in _sources(handle):
        if was_normalized and not one.cheap:
            return one
        if not was_normalized and _users(one) > 1:
            return None
        is_norm = isinstance(one.func, OpOverload) and operator_of(one.func).kind is Kind.NORM
        was_normalized = was_normalized or (is_norm and bool(one.args[5]))
    return None


def norm_before(handle: Handle) -> Replayed | None:
    """The result of a batch norm of the batch's statistics that a value is, reshaped or as it is, where
    nobody else uses that: its gradient is the value's."""
    for one in _sources(handle):
        if _users(one) > 1 or not isinstance(one.func, OpOverload):
            return None
        operator = operator_of(one.func)
        if operator.kind is Kind.NORM:
            noted = noted_of(one)
            return one if one.args[5] and noted is not None and noted.statistics is not None else None
        if not is_reshape(operator):
            return None
    return None


def _users(handle: Replayed) -> int:
    noted = noted_of(handle)
    return handle.packs + (0 if noted is None else noted.taken)
