"""Which reversible type stands in for which stock neuron.

The one idea: the converter knows no framework. Adapters put their neuron types here, the converter
asks here, and a neuron that nobody answers for stays stock. Conversion swaps an instance's class, so
a reversible type has to subclass the stock type of the instance it takes over and may add no state
of its own.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

Chooser = Callable[[nn.Module], type[nn.Module]]
T = TypeVar("T", bound="type[nn.Module] | Chooser")

_exact: dict[type[nn.Module], Chooser] = {}
_families: dict[type[nn.Module], Chooser] = {}
_reversible: set[type[nn.Module]] = set()


class StaysStock(Exception):
    """Raised by an adapter for a neuron that it can't make reversible; the text says why."""


def register_reversible(stock_type: type[nn.Module], *, subclasses: bool = False) -> Callable[[T], T]:
    """Teach :func:`convert_to_reversible` a neuron type.

    Args:
        stock_type: the neuron class to look for. Matched exactly, so that a subclass with dynamics of
            its own is never mistaken for it.
        subclasses: also match every subclass that has no nearer registration. The decorated object
            then answers for dynamics it has not seen, and refuses with :class:`StaysStock`.

    The decorated object is a class that subclasses ``stock_type``, or a function from a module to
    such a class.

    Raises:
        TypeError: ``stock_type`` is no ``nn.Module`` class, or the class does not subclass it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import snn_reversible_plugin as srp
        >>> class Gate(nn.Module):
        ...     def forward(self, x):
        ...         return (x > 0).to(x)
        >>> @srp.register_reversible(Gate)
        ... class RevGate(Gate):
        ...     pass
        >>> type(srp.convert_to_reversible(nn.Sequential(Gate()))[0]).__name__
        'RevGate'
    """
    if not (isinstance(stock_type, type) and issubclass(stock_type, nn.Module)):
        raise TypeError(f"register_reversible takes an nn.Module class, not {stock_type!r}")

    def register(target: T) -> T:
        if isinstance(target, type):
            if not issubclass(target, stock_type):
                raise TypeError(
                    f"{target.__name__} must subclass {stock_type.__name__}: conversion swaps the "
                    "class of a live instance, which has that class's attributes"
                )
            chosen = target
            _reversible.add(target)

            def chooser(_module: nn.Module) -> type[nn.Module]:
                return chosen
        else:
            chooser = target  # type: ignore[assignment]
        (_families if subclasses else _exact)[stock_type] = chooser
        return target

    return register


_on_grid: dict[type[nn.Module], Chooser] = {}


def register_on_grid(stock_type: type[nn.Module]) -> Callable[[Chooser], Chooser]:
    """Register a function from a neuron stepped one time step at a time to its class on the grid.

    It is asked after the swap to the reversible type, about subclasses too, and refuses with
    :class:`StaysStock`.
    """

    def register(chooser: Chooser) -> Chooser:
        _on_grid[stock_type] = chooser
        return chooser

    return register


def type_on_grid(module: nn.Module) -> type[nn.Module] | None:
    """The class that runs this instance on the grid; None where nobody registered one.

    Raises:
        StaysStock: it can't run there as it is set.
    """
    for base in type(module).__mro__:
        if base in _on_grid:
            return _on_grid[base](module)
    return None


def reversible_type(module: nn.Module) -> type[nn.Module] | None:
    """The reversible class for this instance, or None where nobody registered its type.

    Raises:
        StaysStock: its adapter knows the type and can't take this instance.
    """
    stock_type = type(module)
    if stock_type in _reversible or issubclass(stock_type, SwappedClass):
        return stock_type
    if stock_type in _exact:
        return _exact[stock_type](module)
    for base in stock_type.__mro__:
        if base in _families:
            return _families[base](module)
    return None


class SwappedClass:
    """Mixin of classes made at run time to stand in front of a stock class.

    Such a class can't be found by name, so pickling and ``copy.deepcopy`` go through
    :func:`swapped_class`, which makes it again from its two halves. Where ``is_architecture`` is true, the
    class is what the network computes, and going back to stock keeps it.
    """

    is_architecture = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is cls:  # type: ignore[attr-defined]
            mixin, stock_type = cls._srp_halves
            return (_new_swapped, (mixin, stock_type, *reduced[1][1:]), *reduced[2:])
        return reduced


_swapped: dict[tuple[type, type], type[nn.Module]] = {}


def swapped_class(mixin: type, stock_type: type[nn.Module]) -> type[nn.Module]:
    """The class ``mixin`` in front of ``stock_type``, made once for each pair."""
    halves = (mixin, stock_type)
    if halves not in _swapped:
        _swapped[halves] = type(
            f"{mixin.__name__}{stock_type.__name__}",
            (mixin, stock_type),
            {"_srp_halves": (mixin, stock_type), "__module__": mixin.__module__},
        )
    return _swapped[halves]


# A class made by swapped_class says itself what it stands in front of. A public neuron type looks the
# same whether the user or the converter chose it, so there the instance carries a mark.
_MARK = "_srp_stock_type"


def marked_stock_type(module: nn.Module) -> type[nn.Module] | None:
    """The stock class that an instance of a public reversible type was converted from."""
    return module.__dict__.get(_MARK)


def mark_stock_type(module: nn.Module, stock_type: type[nn.Module] | None) -> None:
    """Set or clear that mark."""
    module.__dict__.pop(_MARK, None)
    if stock_type is not None:
        module.__dict__[_MARK] = stock_type


def swap(module: nn.Module, target: type[nn.Module]) -> None:
    """Let ``target`` stand in for the class of a live instance."""
    if "_srp_halves" not in target.__dict__:
        mark_stock_type(module, type(module))
    module.__class__ = target


def unswap(module: nn.Module) -> None:
    """Give an instance its stock class back, through however many swaps."""
    while True:
        stock_type = _unswapped(type(module))
        if stock_type is not type(module):
            module.__class__ = stock_type
        elif (marked := marked_stock_type(module)) is not None:
            module.__class__ = marked
            mark_stock_type(module, None)
        else:
            return


def _unswapped(cls: type[nn.Module]) -> type[nn.Module]:
    halves = cls.__dict__.get("_srp_halves")
    if halves is None:
        return cls
    mixin, stock_type = halves
    return swapped_class(mixin, _unswapped(stock_type)) if mixin.is_architecture else _unswapped(stock_type)


@contextmanager
def stock_classes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these instances have their stock classes."""
    classes = [(module, type(module), marked_stock_type(module)) for module in modules]
    for module, _, _ in classes:
        unswap(module)
    try:
        yield
    finally:
        for module, cls, marked in classes:
            module.__class__ = cls
            mark_stock_type(module, marked)


Lent = tuple[nn.Module, type[nn.Module], type[nn.Module]]  # an instance, its class, and another one


def lean_types(modules: Iterable[nn.Module]) -> list[Lent]:
    """The stock neurons among the modules that have a type with an analytic backward, and that type."""
    lean: list[Lent] = []
    for module in modules:
        try:
            target = reversible_type(module)
        except StaysStock:
            continue
        if target not in (None, type(module)) and getattr(target, "treatment", None) == "analytic":
            lean.append((module, type(module), target))  # type: ignore[arg-type]
    return lean


@contextmanager
def lent_classes(swaps: Iterable[Lent]) -> Iterator[None]:
    """Inside, these instances have another class."""
    try:
        for module, _, target in swaps:
            module.__class__ = target
        yield
    finally:
        for module, stock_type, _ in swaps:
            module.__class__ = stock_type


def _new_swapped(mixin: type, stock_type: type[nn.Module], *args: Any) -> nn.Module:
    cls = swapped_class(mixin, stock_type)
    return cls.__new__(cls, *args)
