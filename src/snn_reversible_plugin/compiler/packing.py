"""Codes of a few bits, packed into bytes and unpacked, as nodes of a graph that the compiler fuses.

The one idea: a byte is made of elements that lie far apart, at equal distances along one dimension, the
outermost that fits. So both directions are element-wise operations over long rows, in whatever layout
the compiler gives to the other dimensions. (Neighbours in a byte, as :mod:`...ops.bits` has them, would
need a reduction over eight elements of one layout. Only a backward that the compiler writes reads
these, so the order is free.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from snn_reversible_plugin.compiler.graph import tensor_of
from snn_reversible_plugin.compiler.levels import Levels

aten, prims = torch.ops.aten, torch.ops.prims

# NOTE [A byte]
#
# With `bits` a code, a byte takes `per_byte = 8 // bits` of them. Of a dimension of length n, code k of
# row r is element k * rows + r, with rows = ceil(n / per_byte). Spikes of shape [T * N, C, H, W] = [16,
# 2, 3, 3], one bit each: rows = 2, and byte [1, c, h, w] holds the spikes of images 1, 3, 5, ... 15 at
# bits 0, 1, 2, ... 7.


class Packing:
    """Writes pack and unpack into a graph; one for each graph, as it makes each table of shifts once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._tables: dict[tuple[int, int, torch.device], fx.Node] = {}
        self._behind: fx.Node | None = None  # where the next call is written

    def pack(self, node: fx.Node, levels: Levels) -> tuple[fx.Node, fx.Node]:
        """The node that holds a value's codes, and one that gives the value again from them."""
        value, bits = tensor_of(node), levels.bits
        assert value is not None and bits is not None
        self._behind = node
        with value.fake_mode:  # type: ignore[attr-defined]
            code = self._coded(node, value, levels)
            dim = packed_dim(value, 8 // bits)
            if dim is None:
                return code, self._decoded(code, value, levels)
            stored = self._packed(code, value, bits, dim)
            return stored, self._decoded(self._unpacked(stored, value, bits, dim), value, levels)

    def _packed(self, code: fx.Node, value: torch.Tensor, bits: int, dim: int) -> fx.Node:
        codes, size = 8 // bits, value.shape[dim]
        rows = math.ceil(size / codes)
        if size != rows * codes:
            padding = [0, 0] * (value.dim() - dim - 1) + [0, rows * codes - size]
            code = self._call(aten.constant_pad_nd.default, code, padding, 0)
        while codes > 1:  # the upper half goes on top of the lower one
            codes //= 2
            lower = self._call(aten.slice.Tensor, code, dim, 0, codes * rows)
            upper = self._call(aten.slice.Tensor, code, dim, codes * rows, 2 * codes * rows)
            upper = self._call(aten.mul.Tensor, upper, 1 << (codes * bits))
            code = self._call(aten.bitwise_or.Tensor, lower, upper)
        return code

    def _unpacked(self, stored: fx.Node, value: torch.Tensor, bits: int, dim: int) -> fx.Node:
        codes, size = 8 // bits, value.shape[dim]
        rows = math.ceil(size / codes)
        if all(isinstance(length, int) for length in value.shape):
            code = self._call(aten.unsqueeze.default, stored, dim)
            shifts = self._shifts(bits, value.dim() - dim + 1, value.device)
            code = self._call(aten.bitwise_right_shift.Tensor, code, shifts)
            shape = [*value.shape[:dim], codes * rows, *value.shape[dim + 1 :]]
            code = self._call(aten.reshape.default, code, shape)
        else:
            code = self._call(
                aten.cat.default,
                [
                    self._call(aten.bitwise_right_shift.Tensor_Scalar, stored, place * bits)
                    for place in range(codes)
                ],
                dim,
            )
        if size != rows * codes:
            code = self._call(aten.slice.Tensor, code, dim, 0, size)
        return self._call(aten.bitwise_and.Scalar, code, (1 << bits) - 1)

    def _coded(self, node: fx.Node, value: torch.Tensor, levels: Levels) -> fx.Node:
        """Counted from zero, as ``uint8``; NaN is one more."""
        if value.dtype is torch.bool:
            return self._call(prims.convert_element_type.default, node, torch.uint8)
        code = self._call(aten.sub.Tensor, node, levels.lowest) if levels.lowest else node
        if levels.nan:
            is_nan = self._call(aten.ne.Tensor, node, node)
            code = self._call(aten.masked_fill.Scalar, code, is_nan, levels.highest - levels.lowest + 1)
        return self._call(prims.convert_element_type.default, code, torch.uint8)

    def _decoded(self, code: fx.Node, value: torch.Tensor, levels: Levels) -> fx.Node:
        if value.dtype is torch.bool:
            return self._call(aten.ne.Scalar, code, 0)
        result = self._call(prims.convert_element_type.default, code, value.dtype)
        if levels.lowest:
            result = self._call(aten.add.Tensor, result, levels.lowest)
        if levels.nan:
            is_nan = self._call(aten.eq.Scalar, code, int(levels.highest - levels.lowest) + 1)
            result = self._call(aten.masked_fill.Scalar, result, is_nan, math.nan)
        return result

    def _shifts(self, bits: int, dims: int, device: torch.device) -> fx.Node:
        """Where each code of a byte stands, along the first of some dimensions."""
        key = (bits, dims, device)
        if key not in self._tables:
            behind, self._behind = self._behind, _last_input(self._graph)
            places = self._call(
                prims.iota.default,
                8 // bits, start=0, step=bits, dtype=torch.int32, device=device, requires_grad=False,
            )  # fmt: skip
            places = self._call(prims.convert_element_type.default, places, torch.uint8)
            places = self._call(aten.reshape.default, places, [8 // bits, *[1] * (dims - 1)])
            self._tables[key], self._behind = places, behind
        return self._tables[key]

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call behind the last one that was written, with the fake tensor that stands for its value."""
        assert self._behind is not None
        with self._graph.inserting_after(self._behind):
            node = self._behind = self._graph.call_function(operation, args, kwargs)
        arguments = fx.node.map_arg(node.args, lambda one: one.meta["val"])
        named = fx.node.map_arg(node.kwargs, lambda one: one.meta["val"])
        node.meta["val"] = operation(*arguments, **named)
        node.meta["partitioner_tag"] = "is_forward"
        return node


def _last_input(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def packed_dim(value: torch.Tensor, per_byte: int) -> int | None:
    """The outermost of the dimensions along which packing wastes least, among those whose length is known.

    None where a byte takes one code, or no length is.
    """
    lengths = {dim: length for dim, length in enumerate(value.shape) if isinstance(length, int)}
    if per_byte == 1 or not lengths:
        return None
    return min(lengths, key=lambda dim: (math.ceil(lengths[dim] / per_byte) / lengths[dim], dim))
