"""Classes of live modules swapped, and every mark that the package leaves on a user's modules.

The one idea: conversion swaps an instance's class and nothing else, so what is behind the swap, the stock
class, has to be found again from the instance alone: after a copy, a pickle, and through several swaps.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from snn_reversible_plugin.ops.interrupts import surely

T = TypeVar("T")


class Mark(Generic[T]):
    """An attribute of the package's own on a user's module: in copies and pickles, in no ``state_dict``."""

    def __init__(self, name: str) -> None:
        self.attribute = f"_srp_{name}"

    def of(self, module: nn.Module) -> T | None:
        """What a module is marked with."""
        return module.__dict__.get(self.attribute)

    def set(self, module: nn.Module, value: T) -> None:
        module.__dict__[self.attribute] = value

    def clear(self, module: nn.Module) -> None:
        module.__dict__.pop(self.attribute, None)


SETTINGS: Mark[Any] = Mark("settings")  # of the root of a converted model: what the conversion decided
NAME: Mark[str] = Mark("name")  # of a module on the grid: its name in the model, for errors
STRICT: Mark[bool] = Mark("strict")  # of a neuron that the user wants on the grid, and nowhere else
FUSED: Mark[bool] = Mark("fused")  # of a neuron whose states the user wants in float32, whatever comes in
ON_GRID: Mark[Any] = Mark("on_grid")  # of a neuron on the grid: what was fixed at the conversion
WRAPPED_CHAIN: Mark[Any] = Mark("wrapped_chain")  # of a residual block: the chain that it is part of
LAST_RESET: Mark[Any] = Mark("reset")  # of a snnTorch neuron: what its last reset is made of
# A class made by swapped_class says itself what it stands in front of. A public neuron type looks the
# same whether the user or the converter chose it, so there the instance carries a mark.
_STOCK_TYPE: Mark[type[nn.Module]] = Mark("stock_type")


class Parts(NamedTuple):
    """What a class is made of by :func:`swapped_class`."""

    mixin: Any
    base: type[nn.Module]


_PARTS = "_srp_parts"  # of such a class


class SwappedClass:
    """Mixin of classes made at run time to stand in front of a stock class.

    Such a class can't be found by name, so pickling and ``copy.deepcopy`` go through
    :func:`swapped_class`, which makes it again from its two parts. Where ``is_architecture`` is true, the
    class is what the network computes, and going back to stock keeps it.
    """

    is_architecture = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        parts = parts_of(cls)
        if parts is not None and reduced[0] is copyreg.__newobj__ and reduced[1][0] is cls:  # type: ignore[attr-defined]
            return (_new_swapped, (*_by_name(parts), *reduced[1][1:]), *reduced[2:])
        return reduced


_swapped: dict[Parts, type[nn.Module]] = {}


def swapped_class(mixin: type, base: type[nn.Module]) -> type[nn.Module]:
    """The class ``mixin`` in front of ``base``, made once for each pair."""
    parts = Parts(mixin, base)
    if parts not in _swapped:
        names = {_PARTS: parts, "__module__": mixin.__module__}
        _swapped[parts] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), names)
    return _swapped[parts]


def _new_swapped(mixin: Any, base: type[nn.Module], *args: Any) -> nn.Module:
    cls = base
    for one in reversed(mixin if isinstance(mixin, tuple) else (mixin,)):
        cls = swapped_class(one, cls)
    return cls.__new__(cls, *args)


def _by_name(parts: Parts) -> tuple[Any, type[nn.Module]]:
    """Classes that can be found by name: a mixin, or the mixins of several swaps, and what is behind."""
    mixins = [parts.mixin]
    while (inner := parts_of(parts.base)) is not None:
        parts = inner
        mixins.append(parts.mixin)
    return mixins[0] if len(mixins) == 1 else tuple(mixins), parts.base


def parts_of(cls: type) -> Parts | None:
    """The mixin and the class behind it, of a class that :func:`swapped_class` made."""
    return cls.__dict__.get(_PARTS)


def without(cls: type[nn.Module], is_dropped: Callable[[Any], bool]) -> type[nn.Module]:
    """A class with the swaps undone whose mixin ``is_dropped``."""
    parts = parts_of(cls)
    if parts is None:
        return cls
    base = without(parts.base, is_dropped)
    return base if is_dropped(parts.mixin) else swapped_class(parts.mixin, base)


def swap(module: nn.Module, target: type[nn.Module]) -> None:
    """Let ``target`` stand in for the class of a live instance."""
    if parts_of(target) is None:
        _STOCK_TYPE.set(module, type(module))
    module.__class__ = target


def unswap(module: nn.Module) -> None:
    """Give an instance its stock class back, through however many swaps."""
    if find_all := getattr(module.__dict__, "find_all", None):  # attributes that only the swap finds
        find_all()
    stock = stock_type(module)
    if stock is not type(module):  # a traced module breaks where its own class is set
        module.__class__ = stock
    _STOCK_TYPE.clear(module)


def stock_type(module: nn.Module) -> type[nn.Module]:
    """The class that an instance has when it is stock."""
    cls: type[nn.Module] = type(module)
    # What was parametrized before the conversion has torch's class behind the swap, else in front of it.
    parametrized = is_parametrized(module) and parts_of(cls) is None
    if parametrized:
        (cls,) = cls.__bases__
    marked = _STOCK_TYPE.of(module)
    stock = without(cls if marked is None else marked, _is_no_architecture)
    if not parametrized:
        return stock
    return type(module) if stock is cls else _parametrized(stock, type(module))


def _parametrized(stock: type[nn.Module], like: type[nn.Module]) -> type[nn.Module]:
    """A stock class with the parametrizations that torch put into a subclass of what stood in for it."""
    own = {
        name: value
        for name, value in vars(like).items()
        if name not in ("__doc__", "__dict__", "__weakref__")
    }
    return type(f"Parametrized{stock.__name__}", (stock,), own)


def _is_no_architecture(mixin: Any) -> bool:
    return not mixin.is_architecture


@contextmanager
def stock_classes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these instances have their stock classes."""
    classes = [(module, type(module), _STOCK_TYPE.of(module)) for module in modules]

    def put_back() -> None:
        for module, cls, marked in classes:
            if cls is not type(module):
                module.__class__ = cls
            _STOCK_TYPE.clear(module)
            if marked is not None:
                _STOCK_TYPE.set(module, marked)

    try:
        for module, _, _ in classes:
            unswap(module)
        yield
    finally:
        surely(put_back)


class Lent(NamedTuple):
    """An instance, its class, and one that it may have for a while."""

    module: nn.Module
    own: type[nn.Module]
    other: type[nn.Module]


@contextmanager
def lent_classes(lent: Iterable[Lent]) -> Iterator[None]:
    """Inside, these instances have the other class."""
    try:
        for module, _, other in lent:
            module.__class__ = other
        yield
    finally:
        for module, own, _ in lent:
            module.__class__ = own
