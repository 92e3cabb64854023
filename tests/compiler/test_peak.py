"""The guessed peak of a backward counts each thing as it is stored."""

import pytest
import torch
from torch import fx

from snn_reversible_plugin.compiler.graph import Joint
from snn_reversible_plugin.compiler.levels import TRUTH, Levels
from snn_reversible_plugin.compiler.peak import peak_of

aten = torch.ops.aten
SIZE = 256  # elements of each value


def joint_of(dtype):
    """``x > 0``, which the backward multiplies a gradient by, as the compiler has it."""
    graph = fx.Graph()

    def valued(node, dtype):
        node.meta["val"] = torch.empty(SIZE, dtype=dtype, device="meta")
        return node

    x = valued(graph.placeholder("primals_1"), torch.float32)
    tangent = valued(graph.placeholder("tangents_1"), torch.float32)
    code = valued(graph.call_function(aten.gt.Scalar, (x, 0)), dtype)
    gradient = valued(graph.call_function(aten.mul.Tensor, (tangent, code)), torch.float32)
    graph.output((code, gradient))
    return Joint(graph), code


@pytest.mark.parametrize(
    ("dtype", "levels"),
    [
        (torch.bool, TRUTH),
        (torch.bfloat16, TRUTH),
        (torch.float32, TRUTH),
        (torch.float32, Levels(0, 4, whole=True)),
    ],
)
def test_codes_count_by_their_bits(dtype, levels):
    joint, code = joint_of(dtype)
    packed = SIZE * levels.bits // 8
    unpacked, gradient = SIZE * dtype.itemsize, SIZE * 4
    assert peak_of(joint, {code}, {code: levels}) == packed + unpacked + gradient
