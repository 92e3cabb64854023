"""Which values are taken for small integers, and which never are."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from snn_reversible_plugin.compiler.levels import ANYTHING, TRUTH, Levels, levels_of


def levels_after(function, *inputs):
    """The levels of what a function returns; every value that it really has must lie in them."""
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    result = next(iter(reversed(graph.nodes))).args[0]
    levels = levels_of(graph).get(result, ANYTHING)
    values = function(*inputs).double()
    numbers = values[~values.isnan()]
    assert levels.nan or len(numbers) == values.numel()
    assert (numbers >= levels.lowest).all() and (numbers <= levels.highest).all()
    assert not levels.whole or (numbers == numbers.round()).all()
    return levels


X = torch.tensor([-3.0, -0.5, -0.0, 0.2, 0.5, 1.5, 2.5, 9.0, math.nan, math.inf])


@pytest.mark.parametrize(
    ("function", "bits"),
    [
        (lambda x: (x > 0.3).float(), 1),
        (lambda x: x.ge(0).half(), 1),
        (lambda x: 1.0 - (x > 0).float(), 1),
        (lambda x: torch.stack([(x > 0).float(), (x > 1).float()]), 1),
        (lambda x: torch.cat([(x > 0).float(), torch.zeros(4)])[2:].view(2, -1), 1),
        (lambda x: torch.where(x > 0, 1.0, 0.0), 1),
        (lambda x: torch.zeros(2, 10).index_copy(0, torch.tensor([1]), x[None]), None),
        (lambda x: torch.select_scatter(torch.zeros(2, 10), (x > 0).float(), 0, 1), 1),
        (lambda x: (x > 0).float() + (x > 1).float(), 2),
        (lambda x: (x > 0).float() - (x > 1).float(), 2),
        (lambda x: ((x > 0).float() + (x > 1).float()) * 3 + (x > 2), 4),
        (lambda x: torch.round(torch.clamp(x, 0, 4)), 4),
        (lambda x: torch.floor(x.clamp(0, 8)), 4),
        (lambda x: x.clamp(0, 2.5).round(), 2),
        (lambda x: torch.nn.functional.max_pool1d((x > 0).float()[None, None], 2), 1),
        (lambda x: ((x > 0).float() + 1).int(), 1),
        (lambda x: torch.round(x.clamp(0, 3)).int(), None),
        (lambda x: (x > 0).float() * 0.5, None),
        (lambda x: torch.round(x), None),
        (lambda x: x.clamp(0, 1), None),
        (lambda x: torch.relu(x), None),
        (lambda x: (x > 0).float() * x, None),
        (lambda x: (x > 0).float().cumsum(0), None),
        (lambda x: (x > 0).float() / 3, None),
        (lambda x: (x > 0).float() * 300, None),
    ],
)
def test_bits(function, bits):
    assert levels_after(function, X).bits == bits


def test_nan_takes_a_code_of_its_own():
    levels = levels_after(lambda x: torch.round(torch.clamp(x, 0, 3)), X)
    assert levels == Levels(0, 3, whole=True, nan=True) and levels.count == 5 and levels.bits == 4
    assert not levels_after(lambda x: (x > 0).float(), X).nan


def test_arithmetic_of_intervals():
    assert Levels(0, 2, whole=True) == TRUTH + TRUTH
    assert TRUTH * Levels(-2, 3, whole=True) == Levels(-2, 3, whole=True)
    assert TRUTH | Levels(0.5, 0.5) == Levels(0, 1)
    assert (ANYTHING + TRUTH).bits is None and TRUTH * ANYTHING == ANYTHING
    assert (Levels(0, math.inf) + Levels(-math.inf, 0)).nan
