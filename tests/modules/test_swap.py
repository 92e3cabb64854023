"""Swapped classes and marks: what is behind them is found from the instance, after copies too."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from snn_reversible_plugin.modules import swap
from snn_reversible_plugin.modules.swap import (
    NAME,
    Mark,
    SwappedClass,
    lent_classes,
    parts_of,
    stock_classes,
    stock_type,
    swapped_class,
    unswap,
    without,
)


class Front(SwappedClass):
    pass


class Other(SwappedClass):
    pass


class Kept(SwappedClass):
    is_architecture = True


class Public(nn.Linear):
    """A reversible type that users may choose by themselves."""


def stacked():
    """Every kind of swap on one instance, one over the other."""
    module = nn.Linear(2, 2)
    swap.swap(module, Public)
    swap.swap(module, swapped_class(Front, Public))
    return module


def test_the_stock_class_is_found_through_every_swap():
    module = stacked()
    assert stock_type(module) is nn.Linear
    assert type(module) is swapped_class(Front, Public)
    unswap(module)
    assert type(module) is nn.Linear
    assert stock_type(module) is nn.Linear
    assert module.__dict__.keys() == nn.Linear(2, 2).__dict__.keys()


def test_a_public_type_that_the_user_chose_is_stock():
    module = Public(2, 2)
    assert stock_type(module) is Public
    swap.swap(module, swapped_class(Front, Public))
    unswap(module)
    assert type(module) is Public


def test_going_back_keeps_what_the_network_computes():
    cls = swapped_class(Front, swapped_class(Kept, swapped_class(Other, nn.Linear)))
    module = nn.Linear(2, 2)
    swap.swap(module, cls)
    assert stock_type(module) is swapped_class(Kept, nn.Linear)
    once = without(cls, lambda mixin: mixin is Kept)
    assert once is swapped_class(Front, swapped_class(Other, nn.Linear))
    assert parts_of(nn.Linear) is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_swapped_and_marked_alike(again):
    module = stacked()
    NAME.set(module, "layer")
    twin = again(module)
    assert type(twin) is type(module)
    assert (stock_type(twin), NAME.of(twin)) == (nn.Linear, "layer")
    assert twin.state_dict().keys() == nn.Linear(2, 2).state_dict().keys()


def test_a_mark_that_is_not_there():
    mark, module = Mark("of_a_test"), nn.Linear(2, 2)
    assert mark.of(module) is None
    mark.clear(module)
    mark.set(module, 3)
    assert mark.of(module) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_classes_are_given_back_whatever_happens(fails):
    module, other = stacked(), nn.Linear(2, 2)
    own = type(module)
    try:
        with stock_classes([module]), lent_classes([swap.Lent(other, nn.Linear, Public)]):
            assert (type(module), type(other)) == (nn.Linear, Public)
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert (type(module), type(other), stock_type(module)) == (own, nn.Linear, nn.Linear)


def test_a_class_that_was_parametrized_before_the_swap():
    module = weight_norm(nn.Linear(2, 2))
    parametrized = type(module)
    swap.swap(module, swapped_class(Front, parametrized))
    assert stock_type(module) is parametrized
    with stock_classes([module]):
        assert type(module) is parametrized
    unswap(module)
    assert type(module) is parametrized


def test_a_traced_module_goes_unharmed_through_going_back():
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    unswap(traced)
    with stock_classes([traced]):
        pass
    assert traced(torch.ones(1, 2)).shape == (1, 2)
