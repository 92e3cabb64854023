"""What is written into a graph packs and unpacks: every value comes back, NaN too."""

import math

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from snn_reversible_plugin.compiler.levels import TRUTH, Levels
from snn_reversible_plugin.compiler.packing import Writer, packed_dim


def there_and_back(tensors, levels):
    """Values that went through codes, and the codes."""
    graph, fakes = fx.Graph(), FakeTensorMode()
    inputs = []
    for index, tensor in enumerate(tensors):
        node = graph.placeholder(f"x{index}")
        node.meta["val"] = fakes.from_tensor(tensor)
        inputs.append(node)
    with fakes:
        writer = Writer(graph)
        # A call each, since packing starts behind the call that made a value.
        values = [writer.call(torch.ops.aten.clone.default, node) for node in inputs]
        codes = writer.pack(values, levels)
        results = [writer.unpack(code) for code in codes]
    graph.output([*results, codes[0].stored])
    graph.lint()
    *back, stored = fx.GraphModule({}, graph)(*tensors)
    for result, node in zip(back, results, strict=True):
        assert result.shape == node.meta["val"].shape and result.dtype is node.meta["val"].dtype
    return back, stored


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (8,), (17,), (5, 3), (16, 2, 3), (3, 16, 2), (2, 3, 5, 7), (0, 4)]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("highest", [1, 2, 4, 200])
def test_every_value_comes_back(shape, dtype, highest):
    if dtype is torch.bool:
        highest = 1
    levels = Levels(0, highest, whole=True)
    x = torch.randint(0, highest + 1, shape).to(dtype)
    (back,), stored = there_and_back([x], levels)
    assert torch.equal(back, x) and stored.dtype is torch.uint8
    if shape == (16, 2, 3):
        assert stored.nbytes * 8 == x.numel() * levels.bits


def test_negative_levels_and_nan():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, math.nan] * 5)
    (back,), _ = there_and_back([x], Levels(-2, 1, whole=True, nan=True))
    assert torch.equal(back.isnan(), x.isnan())
    assert torch.equal(back.nan_to_num(9), x.nan_to_num(9))


@pytest.mark.parametrize("count", [2, 5, 8])
def test_time_steps_share_bytes(count):
    steps = [torch.rand(3, 5) > 0.5 for _ in range(count)]
    back, stored = there_and_back(steps, TRUTH)
    assert all(map(torch.equal, back, steps)) and stored.nbytes == 15
    steps = [torch.randint(0, 4, (3, 5)).float() for _ in range(min(count, 4))]
    back, stored = there_and_back(steps, Levels(0, 3, whole=True))
    assert all(map(torch.equal, back, steps)) and stored.nbytes == 15


def test_the_dimension_that_wastes_least():
    assert packed_dim(torch.empty(16, 8), 8) == 0
    assert packed_dim(torch.empty(3, 8), 8) == 1
    assert packed_dim(torch.empty(12, 9), 8) == 0
    assert packed_dim(torch.empty(4), 1) is None and packed_dim(torch.empty(()), 8) is None
