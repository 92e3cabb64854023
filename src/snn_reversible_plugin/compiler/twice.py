"""Spikes unpacked a second time, so that they don't wait as floats while their layer is undone.

The one idea: a layer's backward reads its input spikes at its two ends, to compute the current again and
for the weight's gradient; between them lies the neuron's backward, where memory is at its peak. Codes take
a thirty-second of it and are unpacked in no time, so each end unpacks for itself, as the tape's do.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import fx

from snn_reversible_plugin.compiler.graph import Joint, is_product, is_random, name_of, tensor_of
from snn_reversible_plugin.compiler.packing import Code, Writer

# NOTE [Not before]
#
# Two calls that unpack the same codes would be fused into one kernel that writes both. So the second one
# reads a byte that depends on the gradient which its reader takes, and is zero: whether an element of it is
# greater than infinity.

MOST_CALLS = 256  # of a value that is computed twice: the spikes of so many time steps, put together

aten, prims = torch.ops.aten, torch.ops.prims


def unpack_late(
    joint: Joint, codes: Mapping[fx.Node, Code], again: Collection[fx.Node], writer: Writer
) -> None:
    """Give products of the backward, which read what the backward also computes layers from, their own."""
    for reader in [node for node in joint.graph.nodes if node in joint.of_tangents]:
        if not is_product(reader) and "convolution_backward" not in name_of(reader):
            continue
        gradient = next((one for one in reader.all_input_nodes if _is_gradient(one, joint)), None)
        if gradient is None:
            continue
        for source in reader.all_input_nodes:
            if source not in again or not any(is_product(user) for user in _readers(source, again)):
                continue
            calls = _calls_of(source, codes, again)
            if calls:
                _compute_late(calls, codes, writer, (gradient, reader))


def _is_gradient(node: fx.Node, joint: Joint) -> bool:
    value = tensor_of(node)
    return node in joint.of_tangents and value is not None and value.is_floating_point() and value.dim() > 0


def _readers(source: fx.Node, again: Collection[fx.Node]) -> list[fx.Node]:
    """The calls that are computed again from a value, through those that take it as it is."""
    found, waiting = [], [source]
    while waiting:
        for user in waiting.pop().users:
            if user in again:
                found.append(user)
                if not is_product(user):
                    waiting.append(user)
    return found


def _calls_of(source: fx.Node, codes: Mapping[fx.Node, Code], again: Collection[fx.Node]) -> list[fx.Node]:
    """The calls that lead from codes to a value, in order; none where a product or a long way does."""
    found: dict[fx.Node, None] = {}
    waiting, has_codes = [source], False
    while waiting:
        node = waiting.pop()
        if node in found or node not in again:
            continue
        found[node] = None
        if node in codes:
            has_codes = True
            continue
        if is_product(node) or is_random(node) or len(found) > MOST_CALLS:
            return []
        waiting += node.all_input_nodes
    return [node for node in source.graph.nodes if node in found] if has_codes else []


def _compute_late(
    calls: list[fx.Node],
    codes: Mapping[fx.Node, Code],
    writer: Writer,
    between: tuple[fx.Node, fx.Node],
) -> None:
    gradient, reader = between
    writer.behind = reader.prev
    zero = _zero_from(gradient, writer)
    late: dict[fx.Node, fx.Node] = {}
    stored: dict[fx.Node, fx.Node] = {}
    for node in calls:
        if node in codes:
            code = codes[node]
            if code.stored not in stored:
                stored[code.stored] = writer.call(aten.bitwise_or.Tensor, code.stored, zero)
            late[node] = writer.unpack(code, stored[code.stored])
        else:
            late[node] = writer.copy(node, late)
    reader.replace_input_with(calls[-1], late[calls[-1]])


def _zero_from(gradient: fx.Node, writer: Writer) -> fx.Node:
    value, node = tensor_of(gradient), gradient
    assert value is not None
    for _ in range(value.dim()):
        node = writer.call(aten.select.int, node, 0, 0)
    return writer.call(
        prims.convert_element_type.default, writer.call(aten.gt.Scalar, node, math.inf), torch.uint8
    )
