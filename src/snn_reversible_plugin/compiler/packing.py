"""Codes of a few bits, packed into bytes and unpacked, as nodes of a graph that the compiler fuses.

The one idea: a byte is made of elements that lie far apart: of one tensor at equal distances along
its outermost dimension that fits, or of several tensors, the spikes of eight time steps. So both
directions are element-wise operations over long rows, in whatever layout the compiler gives to the
rest. (Neighbours in a byte, as :mod:`...ops.bits` has them, would need a reduction over eight
elements of one layout. Only a backward that the compiler writes reads these, so the order is free.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from snn_reversible_plugin.compiler.graph import tensor_of
from snn_reversible_plugin.compiler.levels import Levels

aten, prims = torch.ops.aten, torch.ops.prims

# NOTE [A byte]
#
# With `bits` a code, a byte takes `8 // bits` of them.
# 1. Of a dimension of length n, code k of row r is element k * rows + r, with rows = ceil(n /
#    codes). Spikes of shape [T * N, C, H, W] = [16, 2, 3, 3]: rows = 2, and byte [1, c, h, w] holds
#    the spikes of images 1, 3, 5, ... 15 at bits 0, 1, 2, ... 7.
# 2. Of tensors of one shape, code k is the k-th tensor's. A loop over 20 time steps gives three
#    bytes a neuron, of 8, 8 and 4 steps.


@dataclass(frozen=True)
class Code:
    """Where a value's codes are: in ``stored``, at bit ``at``, or along ``dim``, or a byte each."""

    stored: fx.Node
    value: torch.Tensor
    levels: Levels
    at: int | None = None
    dim: int | None = None


class Writer:
    """Writes calls into a graph, one behind the other, with the fake tensors that stand for values."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._shifts: dict[tuple[int, int, torch.device], fx.Node] = {}
        self.behind = [node for node in graph.nodes if node.op == "placeholder"][-1]

    def pack(self, nodes: list[fx.Node], levels: Levels) -> list[Code]:
        """Store the values of some nodes of one shape, packed where the last of them is computed."""
        values = [_value_of(node) for node in nodes]
        bits = levels.bits
        assert bits is not None
        codes = []
        for node in nodes:
            self.behind = node
            codes.append(self._coded(node, levels))
        if len(nodes) > 1:
            stored = codes[0]
            for at, code in enumerate(codes[1:], 1):
                stored = self.call(
                    aten.bitwise_or.Tensor, stored, self.call(aten.mul.Tensor, code, 1 << (at * bits))
                )
            return [Code(stored, value, levels, at=at * bits) for at, value in enumerate(values)]
        dim = packed_dim(values[0], 8 // bits)
        stored = codes[0] if dim is None else self._packed(codes[0], values[0], bits, dim)
        return [Code(stored, values[0], levels, dim=dim)]

    def unpack(self, code: Code) -> fx.Node:
        """The value again."""
        bits = code.levels.bits
        assert bits is not None
        codes = code.stored
        if code.at is not None:
            if code.at and code.value.dtype is not torch.bool:  # any bit is a truth, wherever it stands
                codes = self.call(aten.bitwise_right_shift.Tensor_Scalar, codes, code.at)
                codes = self.call(aten.bitwise_and.Scalar, codes, (1 << bits) - 1)
            else:
                codes = self.call(aten.bitwise_and.Scalar, codes, ((1 << bits) - 1) << code.at)
        elif code.dim is not None:
            codes = self._unpacked(codes, code.value, bits, code.dim)
        return self._decoded(codes, code.value, code.levels)

    def _packed(self, code: fx.Node, value: torch.Tensor, bits: int, dim: int) -> fx.Node:
        codes, size = 8 // bits, value.shape[dim]
        rows = math.ceil(size / codes)
        if size != rows * codes:
            padding = [0, 0] * (value.dim() - dim - 1) + [0, rows * codes - size]
            code = self.call(aten.constant_pad_nd.default, code, padding, 0)
        while codes > 1:  # the upper half goes on top of the lower one
            codes //= 2
            lower = self.call(aten.slice.Tensor, code, dim, 0, codes * rows)
            upper = self.call(aten.slice.Tensor, code, dim, codes * rows, 2 * codes * rows)
            upper = self.call(aten.mul.Tensor, upper, 1 << (codes * bits))
            code = self.call(aten.bitwise_or.Tensor, lower, upper)
        return code

    def _unpacked(self, stored: fx.Node, value: torch.Tensor, bits: int, dim: int) -> fx.Node:
        codes, size = 8 // bits, value.shape[dim]
        rows = math.ceil(size / codes)
        if all(isinstance(length, int) for length in value.shape):
            code = self.call(aten.unsqueeze.default, stored, dim)
            shifts = self._places(bits, value.dim() - dim + 1, value.device)
            code = self.call(aten.bitwise_right_shift.Tensor, code, shifts)
            code = self.call(
                aten.reshape.default, code, [*value.shape[:dim], codes * rows, *value.shape[dim + 1 :]]
            )
        else:
            shifted = [
                self.call(aten.bitwise_right_shift.Tensor_Scalar, stored, place * bits)
                for place in range(codes)
            ]
            code = self.call(aten.cat.default, shifted, dim)
        if size != rows * codes:
            code = self.call(aten.slice.Tensor, code, dim, 0, size)
        return self.call(aten.bitwise_and.Scalar, code, (1 << bits) - 1)

    def _coded(self, node: fx.Node, levels: Levels) -> fx.Node:
        """Counted from zero, as ``uint8``; NaN is one more."""
        if _value_of(node).dtype is torch.bool:
            return self.call(prims.convert_element_type.default, node, torch.uint8)
        code = self.call(aten.sub.Tensor, node, levels.lowest) if levels.lowest else node
        if levels.nan:
            is_nan = self.call(aten.ne.Tensor, node, node)
            code = self.call(aten.masked_fill.Scalar, code, is_nan, levels.highest - levels.lowest + 1)
        return self.call(prims.convert_element_type.default, code, torch.uint8)

    def _decoded(self, code: fx.Node, value: torch.Tensor, levels: Levels) -> fx.Node:
        if value.dtype is torch.bool:
            return self.call(aten.ne.Scalar, code, 0)
        result = self.call(prims.convert_element_type.default, code, value.dtype)
        if levels.lowest:
            result = self.call(aten.add.Tensor, result, levels.lowest)
        if levels.nan:
            is_nan = self.call(aten.eq.Scalar, code, int(levels.highest - levels.lowest) + 1)
            result = self.call(aten.masked_fill.Scalar, result, is_nan, math.nan)
        return result

    def _places(self, bits: int, dims: int, device: torch.device) -> fx.Node:
        """Where each code of a byte stands, along the first of some dimensions."""
        key = (bits, dims, device)
        if key not in self._shifts:
            places = self.call(
                prims.iota.default,
                8 // bits, start=0, step=bits, dtype=torch.int32, device=device, requires_grad=False,
            )  # fmt: skip
            places = self.call(prims.convert_element_type.default, places, torch.uint8)
            self._shifts[key] = self.call(aten.reshape.default, places, [8 // bits, *[1] * (dims - 1)])
        return self._shifts[key]

    def call(self, operation: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call behind the last one that was written."""
        with self._graph.inserting_after(self.behind):
            node = self.behind = self._graph.call_function(operation, args, kwargs)
        arguments = fx.node.map_arg(node.args, lambda one: one.meta["val"])
        named = fx.node.map_arg(node.kwargs, lambda one: one.meta["val"])
        node.meta["val"] = operation(*arguments, **named)
        return node

    def copy(self, node: fx.Node, values: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same call again, on other values, behind the last one that was written."""
        with self._graph.inserting_after(self.behind):
            self.behind = self._graph.node_copy(node, lambda one: values.get(one, one))
        return self.behind


def _value_of(node: fx.Node) -> torch.Tensor:
    value = tensor_of(node)
    assert value is not None
    return value


def packed_dim(value: torch.Tensor, per_byte: int) -> int | None:
    """The outermost of the dimensions along which packing wastes least, among those whose length is known.

    None where a byte takes one code, or no length is.
    """
    lengths = {dim: length for dim, length in enumerate(value.shape) if isinstance(length, int) and length}
    if per_byte == 1 or not lengths:
        return None
    return min(lengths, key=lambda dim: (math.ceil(lengths[dim] / per_byte) / lengths[dim], dim))
