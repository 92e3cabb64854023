"""Which reversible type stands in for which stock neuron.

The one idea: the converter knows no framework. Adapters put their neuron types here, a row a type, the
converter asks here, and a neuron that nobody answers for stays stock. Conversion swaps an instance's class,
so a reversible type has to subclass the stock type of the instance it takes over and may add no state
of its own. Source: the configs of ``torchao.quantization.quantize_``, a registry from type to handler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from snn_reversible_plugin.modules.swap import Lent, SwappedClass

Chooser = Callable[[nn.Module], type[nn.Module]]
T = TypeVar("T", bound="type[nn.Module] | Chooser")

_exact: dict[type[nn.Module], Chooser] = {}
_families: dict[type[nn.Module], Chooser] = {}
_reversible: set[type[nn.Module]] = set()


class StaysStock(Exception):
    """Raised by an adapter for a neuron that it can't make reversible; the text says why."""


@dataclass(frozen=True)
class Row:
    """What an adapter knows of one neuron type.

    Attributes:
        name: of the class in its framework's namespace.
        equations: what the adapter's own step or sequence takes; None where only stock's code knows.
        stays: why neurons of this type, and of types derived from it, stay stock; empty where they don't.
        fires: the first output is the surrogate's, untouched: zeros and ones, if those are what it gives.
        graded: outputs are whole numbers, signed, or values: known not to be spikes.
        pointwise: every element goes its own way, nothing is learned, states have the input's shape.
        exponential: its own equation has an exponential, whose last bit may hang on the chunk it is in.
        family: the row also answers for types derived from this one that have no row.
        on_grid: its step is written for the grid.
    """

    name: str
    equations: Any = None
    stays: str = ""
    fires: bool = False
    graded: bool = False
    pointwise: bool = False
    exponential: bool = False
    family: bool = False
    on_grid: bool = False


def rows_of(namespace: Any, rows: Iterable[Row]) -> dict[type[nn.Module], Row]:
    """The rows by class. Releases differ in what they have: a row without a class is left out.

    Example:
        >>> list(rows_of(nn, [Row("ReLU", fires=True), Row("NotYetThere")]))
        [<class 'torch.nn.modules.activation.ReLU'>]
    """
    found = ((getattr(namespace, row.name, None), row) for row in rows)
    return {cls: row for cls, row in found if isinstance(cls, type)}


def stays_stock(why: str) -> Chooser:
    """The answer for types that stay stock, for :func:`register_reversible`."""

    def refuse(_module: nn.Module) -> type[nn.Module]:
        raise StaysStock(why)

    return refuse


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


def lean_types(modules: Iterable[nn.Module]) -> list[Lent]:
    """The stock neurons among the modules that have a lean type, and that type.

    A reversible type is lean (its attribute ``lean`` is true) if it has a backward of its own and computes
    what the stock type does, bit for bit, with or without a tape: it may stand in for a while, unasked.
    """
    lent: list[Lent] = []
    for module in modules:
        try:
            target = reversible_type(module)
        except StaysStock:
            continue
        if target not in (None, type(module)) and getattr(target, "lean", False):
            lent.append(Lent(module, type(module), target))  # type: ignore[arg-type]
    return lent
