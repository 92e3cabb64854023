"""What a user's forward reads beside its input, found in its code: the condition under which a graph holds.

The one idea: a graph that was recorded once stands for a forward only as long as everything that the code
reads is what it was. So each value that is read is looked at again before every call (:meth:`Reads.hold`);
what the code may read and do is in :mod:`.code`.

Source: guards as in Ansel et al., "PyTorch 2", ASPLOS 2024.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.neurons.own.code import (
    MISSING,
    SCALARS,
    Code,
    Unprovable,
    in_class,
    is_number,
    is_torchs,
)

_TABLES = ("_modules", "_parameters", "_buffers")


class Reads:
    """All that the forward of a module reads beside its input.

    Raises:
        Unprovable: its code does, or may do, more than that.

    Example:
        >>> class Halve(nn.Module):
        ...     by = 2.0
        ...     def forward(self, x):
        ...         return x / self.by
        >>> halve = Halve()
        >>> reads = Reads(halve, Halve)
        >>> halve.by = 3.0
        >>> reads.hold()
        False
    """

    def __init__(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self._looks: list[tuple[Callable[[], Any], Any]] = []
        self._seen: set[Any] = set()
        self._module(module, cls, called=False)
        self.finish()

    def finish(self) -> None:
        """Once all was read.

        Raises:
            Unprovable: the module has something in place of what its class has.
        """
        self._seen.clear()  # what is looked at must not keep the module, which it is known by
        if not self.hold():
            raise Unprovable("a part of its code was replaced")

    def hold(self) -> bool:
        """Whether everything is as it was read."""
        try:
            return all(_same(look(), value) for look, value in self._looks)
        except (AttributeError, IndexError, TypeError, ValueError):  # it isn't there any more
            return False

    def is_state(self, module: nn.Module, name: str) -> bool:
        """Whether an attribute is read as it was handed in, and may be set."""
        return False

    @property
    def key(self) -> tuple[Any, ...]:
        """What was read, for other modules of which the same holds. Objects go by identity."""
        return tuple(
            (type(v), repr(v)) if isinstance(v, (*SCALARS, tuple)) else id(v) for _, v in self._looks
        )

    @property
    def values(self) -> list[Any]:
        """What was read."""
        return [value for _, value in self._looks]

    def look(self, look: Callable[[], Any], value: Any) -> None:
        """Remember to look at something again."""
        self._looks.append((look, value))

    def read(self, look: Callable[[], Any], where: str) -> Any:
        """Remember a value that code reads, and go through it where it is code."""
        value = look()
        self._looks.append((look, value))
        function = getattr(value, "__self__", None) if getattr(value, "__name__", "") == "apply" else None
        if is_number(value) or is_torchs(value):
            pass
        elif isinstance(value, types.FunctionType):
            self._function(value, None, where)
        elif isinstance(function, type) and issubclass(function, torch.autograd.Function):
            self._looks[-1] = (
                lambda: look().__self__ if look().__name__ == "apply" else None,
                function,
            )  # a bound `apply` is made anew each time
            self._autograd_function(function)
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            self._autograd_function(value)
        elif isinstance(value, nn.Module):
            self._module(value, type(value))
        else:
            raise Unprovable(f"it reads {where}, a {type(value).__name__}")
        return value

    def _module(self, module: nn.Module, cls: type[nn.Module], called: bool = True) -> None:
        if module in self._seen:
            return
        self._seen.add(module)
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            raise Unprovable("it has parameters or buffers")
        if called:  # with what is hung on it
            ref = weakref.ref(module)
            for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                self._looks.append((lambda table=table: len(getattr(ref(), table)), 0))  # type: ignore[misc]
            if not self.hold():
                raise Unprovable(f"its {cls.__name__} has hooks")
        if cls.__module__.startswith("torch.nn."):
            self._all_of(module)
            return
        if "__call__" in {name for base in cls.__mro__ if base is not nn.Module for name in vars(base)}:
            raise Unprovable(f"{cls.__name__} has a __call__ of its own")
        forbidden = {"__getattr__", "__getattribute__", "__setattr__"}
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            if own := forbidden & vars(base).keys():
                raise Unprovable(f"{base.__name__} has a {min(own)} of its own")
        self._method(module, cls, "forward")

    def _all_of(self, module: nn.Module) -> None:
        """torch's own modules read no more than their numbers."""
        if module._modules:
            raise Unprovable(f"its {type(module).__name__} has parts")
        self.look(entry(module, "forward"), MISSING)
        for name, value in module.__dict__.items():
            if is_number(value):
                self.look(entry(module, name), value)

    def _method(self, module: nn.Module, cls: type, name: str) -> None:
        found = in_class(cls, name)
        function = getattr(found, "__func__", found)
        if not isinstance(function, types.FunctionType):
            raise Unprovable(f"its {name} is a {type(found).__name__}")
        self.in_class_alone(module, name, found)
        owner = None if isinstance(found, staticmethod) else (module, cls)
        self._function(function, owner, f"its {name}")

    def attribute(self, module: nn.Module, cls: type, name: str) -> Any:
        """``self.name``, read by code."""
        found = in_class(cls, name)
        if hasattr(type(found), "__set__"):  # it comes before what the module has
            raise Unprovable(f"it reads self.{name}, a {type(found).__name__}")
        # What a class has comes before the tables that `nn.Module.__getattr__` looks in.
        for table in ("", *(_TABLES if found is MISSING else ())):
            look = entry(module, name, table)
            if look() is not MISSING:
                self.look_in_class(module, name, found)
                return self.read(look, f"self.{name}")
        if found is MISSING:
            raise Unprovable(f"it reads self.{name}, which it does not have yet")
        if isinstance(found, (types.FunctionType, staticmethod)):
            self._method(module, cls, name)
            return getattr(found, "__func__", found)
        self.in_class_alone(module, name, found)
        return self.read(lambda: found, f"self.{name}")

    def in_class_alone(self, module: nn.Module, name: str, found: Any) -> None:
        """Remember that a name stands for what the class has under it."""
        self.look(entry(module, name), MISSING)
        self.look_in_class(module, name, found)

    def look_in_class(self, module: nn.Module, name: str, found: Any) -> None:
        """Remember what the class has under a name."""
        ref = weakref.ref(module)
        self.look(lambda: in_class(behind(type(ref())), name), found)  # type: ignore[arg-type]

    def _autograd_function(self, function: type) -> None:
        if function in self._seen:
            return
        self._seen.add(function)
        for name in ("apply", "setup_context"):
            if in_class(function, name) is not in_class(torch.autograd.Function, name):
                raise Unprovable(f"{function.__name__} has a {name} of its own")
        for name in ("forward", "backward"):
            found = in_class(function, name)
            raw = getattr(found, "__func__", found)
            self._looks.append((lambda name=name: in_class(function, name), found))  # type: ignore[misc]
            if isinstance(raw, types.FunctionType) and not raw.__module__.startswith("torch."):
                self._function(raw, None, f"{function.__name__}.{name}", context=True)

    def _function(
        self, function: types.FunctionType, owner: Any, where: str, context: bool = False
    ) -> None:
        if (function, id(owner and owner[0])) in self._seen:
            return
        self._seen.add((function, id(owner and owner[0])))
        code = function.__code__
        self._looks.append((lambda: function.__code__, code))
        for at, value in enumerate(function.__defaults__ or ()):
            if not is_number(value):
                raise Unprovable(f"{where} has a {type(value).__name__} as a default")
            self._looks.append((lambda at=at: (function.__defaults__ or ())[at], value))  # type: ignore[misc]
        if function.__kwdefaults__:
            raise Unprovable(f"{where} has keyword-only defaults")
        self.look(lambda: function.__kwdefaults__, None)
        for part in _codes(code):
            Code(
                self, function, part, owner if part is code else None, where, context and part is code
            ).walk()


def entry(module: nn.Module, name: str, table: str = "") -> Callable[[], Any]:
    """What looks for an entry of a module's attributes, or of a table among them, and doesn't keep it."""
    ref = weakref.ref(module)

    def look() -> Any:
        own: dict[str, Any] = ref().__dict__
        return (own.get(table, {}) if table else own).get(name, MISSING)

    return look


def behind(cls: type[nn.Module]) -> type[nn.Module]:
    """The class behind the package's own."""
    return next(
        base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, SwappedClass)
    )


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and is_number(a) and repr(a) == repr(b))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
