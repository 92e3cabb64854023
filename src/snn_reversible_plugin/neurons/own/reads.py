"""What a user's forward reads beside its input, found in its code: the condition under which a graph holds.

The one idea: a graph that was recorded once stands for a forward only as long as everything that the code
reads is what it was. So the code may read numbers, functions and torch's operations, each of which is looked
at again before every call (:meth:`Reads.hold`), and nothing else: code that could set anything, or read what
can't be looked at again, has no graph. What can't be told from the code is refused.

Source: the ``dis`` module of the standard library; guards as in Ansel et al., "PyTorch 2", ASPLOS 2024.
"""

from __future__ import annotations

import builtins
import dis
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.neurons.witness import element_wise

# NOTE [What code may do]
#
# 1. Read: numbers, strings and tuples of them, from the module, its class, the globals, a closure, a default;
#    functions and autograd functions, whose code is looked through as well; torch's functions on tensors.
# 2. A name behind a dot is looked up where that can be told (`self.x`, `torch.x`, `Function.x`). Behind
#    anything else it has to be one of `_METHODS`: what a tensor, a list or a context has, and is harmless.
# 3. Set: entries of what it made itself, and attributes of an autograd function's context. Nothing else:
#    no attribute, no global. So a counter, a stored spike, a state in the module are refused.
# 4. Catch nothing, for a recording that fails is an exception; no `with`, which is the same bytecode.
# 5. Random numbers, and what depends on values, show in the recording (`graph`).
_SCALARS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format)
_BUILTINS = {"range", "len", "enumerate", "zip", "float", "int", "bool", "abs", "min", "max", "sum", "list",
             "tuple", "reversed", "super"}  # fmt: skip
_METHODS = {
    "shape", "size", "dim", "ndim", "numel", "dtype", "device", "is_cuda", "float", "double", "half", "to",
    "type_as", "view", "view_as", "reshape", "flatten", "contiguous", "unbind", "select", "squeeze",
    "unsqueeze", "transpose", "permute", "expand", "expand_as", "chunk", "split", "new_zeros", "new_ones",
    "new_full", "item", "append", "save_for_backward", "saved_tensors", "needs_input_grad", "sum", "mean",
}  # fmt: skip
_CONTEXT = ("forward", "backward", "setup_context")
_MODULES = (torch, torch.nn, torch.nn.functional, torch.autograd, math)
_MISSING = object()
_DOTS = ("LOAD_ATTR", "LOAD_METHOD")
_CATCHES = ("PUSH_EXC_INFO", "SETUP_FINALLY", "SETUP_WITH", "BEFORE_WITH", "IMPORT_NAME", "YIELD_VALUE",
            "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "DELETE_NAME", "STORE_NAME")  # fmt: skip


class Unprovable(Exception):
    """Raised for what can't be proved; the text says why."""


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

    def hold(self) -> bool:
        """Whether everything is as it was read."""
        return all(_same(look(), value) for look, value in self._looks)

    @property
    def key(self) -> tuple[Any, ...]:
        """What was read, for other modules of which the same holds. Objects go by identity."""
        return tuple(
            (type(v), repr(v)) if isinstance(v, (*_SCALARS, tuple)) else id(v) for _, v in self._looks
        )

    def _read(self, look: Callable[[], Any], where: str) -> Any:
        """Remember a value that code reads, and go through it where it is code."""
        value = look()
        self._looks.append((look, value))
        function = getattr(value, "__self__", None) if getattr(value, "__name__", "") == "apply" else None
        if _is_number(value) or _is_torchs(value):
            pass
        elif isinstance(value, types.FunctionType):
            self._function(value, None, where)
        elif isinstance(function, type) and issubclass(function, torch.autograd.Function):
            self._looks[-1] = (lambda: look().__self__, function)  # a bound `apply` is made anew each time
            self._autograd_function(function)
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            self._autograd_function(value)
        elif isinstance(value, torch.jit.ScriptFunction):
            pass  # reads nothing but its arguments
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
            for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
                self._looks.append((lambda table=table: len(getattr(module, table)), 0))  # type: ignore[misc]
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
        self._looks.append((lambda: module.__dict__.get("forward", _MISSING), _MISSING))
        for name, value in module.__dict__.items():
            if _is_number(value):
                self._looks.append((lambda name=name: module.__dict__.get(name, _MISSING), value))  # type: ignore[misc]

    def _method(self, module: nn.Module, cls: type, name: str) -> None:
        found = _in_class(cls, name)
        function = getattr(found, "__func__", found)
        if not isinstance(function, types.FunctionType):
            raise Unprovable(f"its {name} is a {type(found).__name__}")
        self._looks.append((lambda: module.__dict__.get(name, _MISSING), _MISSING))
        self._looks.append((lambda: _in_class(_stock(type(module)), name), found))
        owner = None if isinstance(found, staticmethod) else (module, cls)
        self._function(function, owner, f"its {name}")

    def _attribute(self, module: nn.Module, cls: type, name: str) -> Any:
        """``self.name``, read by code."""
        for table in (module.__dict__, module.__dict__.get("_modules", {})):
            if name in table:
                return self._read(lambda table=table: table.get(name, _MISSING), f"self.{name}")  # type: ignore[misc]
        found = _in_class(cls, name)
        if found is _MISSING:
            raise Unprovable(f"it reads self.{name}, which it does not have yet")
        if isinstance(found, (types.FunctionType, staticmethod)):
            self._method(module, cls, name)
            return getattr(found, "__func__", found)
        self._looks.append((lambda: module.__dict__.get(name, _MISSING), _MISSING))
        return self._read(lambda: _in_class(_stock(type(module)), name), f"self.{name}")

    def _autograd_function(self, function: type) -> None:
        if function in self._seen:
            return
        self._seen.add(function)
        for name in _CONTEXT:
            found = _in_class(function, name)
            raw = getattr(found, "__func__", found)
            self._looks.append((lambda name=name: _in_class(function, name), found))  # type: ignore[misc]
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
            if not _is_number(value):
                raise Unprovable(f"{where} has a {type(value).__name__} as a default")
            self._looks.append((lambda at=at: (function.__defaults__ or ())[at], value))  # type: ignore[misc]
        if function.__kwdefaults__:
            raise Unprovable(f"{where} has keyword-only defaults")
        for part in _codes(code):
            _Code(
                self, function, part, owner if part is code else None, where, context and part is code
            ).walk()


class _Code:
    """One code object that is looked through."""

    def __init__(self, *of: Any) -> None:
        self.reads, self.function, self.code, self.owner, self.where, self.context = of
        arguments = self.code.co_varnames[: self.code.co_argcount]
        self.first = arguments[0] if arguments else None

    @property
    def _is_bound(self) -> bool:
        """Whether the first argument is what it was called of: a module, or a context."""
        return self.owner is not None or self.context

    def walk(self) -> None:
        if self.owner is not None and self.first in self.code.co_cellvars:
            raise Unprovable(f"{self.where} hands itself to a function inside")
        steps = [
            one for one in dis.get_instructions(self.code) if one.opname not in ("CACHE", "EXTENDED_ARG")
        ]
        for at, one in enumerate(steps):
            later = steps[at + 1 :]
            if one.opname in _CATCHES:
                raise Unprovable(f"{self.where} has code that can't be followed ({one.opname})")
            if one.opname == "STORE_DEREF" and one.argval in self.code.co_freevars:
                raise Unprovable(f"{self.where} sets {one.argval}, which is not its own")
            if one.opname.startswith("STORE_FAST") and self.first in _stored(one) and self._is_bound:
                raise Unprovable(f"{self.where} sets {self.first}")
            if one.opname == "STORE_ATTR":
                self._set(one, steps[at - 1] if at else None)
            elif one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(one, later)
            elif one.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
                self._closure(one.argval, later)
            elif self._is_self(one):
                self._self(one, later)
            elif one.opname in _DOTS and not self._is_known(steps[:at]):
                if not _is_method(one.argval):
                    raise Unprovable(f"{self.where} reads .{one.argval} of something")
            elif one.opname == "LOAD_SUPER_ATTR":
                raise Unprovable(f"{self.where} calls what it derives from")

    def _set(self, one: dis.Instruction, before: dis.Instruction | None) -> None:
        on_context = self.context and before is not None and _last_local(before) == self.first
        if not on_context:
            raise Unprovable(f"{self.where} sets an attribute, {one.argval}")

    def _is_self(self, one: dis.Instruction) -> bool:
        return self.owner is not None and self.first is not None and self.first in _locals(one)

    def _self(self, one: dis.Instruction, later: list[dis.Instruction]) -> None:
        if _last_local(one) != self.first or len(_locals(one)) != len({*_locals(one)}):
            raise Unprovable(f"{self.where} hands itself on")
        if not later or later[0].opname not in _DOTS:
            raise Unprovable(f"{self.where} hands itself on")
        name = later[0].argval
        value = self.reads._attribute(*self.owner, name)
        if isinstance(value, (nn.Module, types.FunctionType)) and not _calls(later[0]):
            raise Unprovable(f"{self.where} hands self.{name} on")

    def _is_known(self, before: list[dis.Instruction]) -> bool:
        """Whether what a name is read of was looked at: self, a module, an autograd function, a context."""
        names: list[str] = []
        for one in reversed(before):
            if one.opname in _DOTS:
                names.append(one.argval)
                continue
            if self._is_self(one):
                return not names
            if self.context and _last_local(one) == self.first:
                return not names
            if one.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
                value = self._value(one)
                if isinstance(value, type):
                    return not names
                return isinstance(value, types.ModuleType) and self._dotted(value, names[::-1])
            return False
        return False

    def _dotted(self, value: Any, names: list[str]) -> bool:
        for name in names:
            value = getattr(value, name, None)
        return isinstance(value, types.ModuleType)

    def _value(self, one: dis.Instruction) -> Any:
        if one.opname == "LOAD_DEREF":
            cells = dict(zip(self.code.co_freevars, self.function.__closure__ or (), strict=False))
            return cells[one.argval].cell_contents if one.argval in cells else None
        return self.function.__globals__.get(one.argval)

    def _global(self, one: dis.Instruction, later: list[dis.Instruction]) -> None:
        name, table = one.argval, self.function.__globals__
        if name not in table:
            if name not in _BUILTINS or not hasattr(builtins, name):
                raise Unprovable(f"{self.where} reads {name}")
            if name == "super":
                raise Unprovable(f"{self.where} calls what it derives from")
            self.reads._looks.append((lambda: table.get(name, _MISSING), _MISSING))
            return
        value = self._outside(lambda: table.get(name, _MISSING), name, later)
        if isinstance(value, (nn.Module, types.FunctionType)) and not one.arg & 1:  # type: ignore[operator]
            raise Unprovable(f"{self.where} hands {name} on")

    def _closure(self, name: str, later: list[dis.Instruction]) -> None:
        cells = dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))
        if name not in cells:
            return  # a local of its own, shared with a function inside
        cell = cells[name]
        value = self._outside(lambda: cell.cell_contents, name, later)
        if isinstance(value, (nn.Module, types.FunctionType)):
            raise Unprovable(f"{self.where} has {name} from a function around it")

    def _outside(self, look: Callable[[], Any], name: str, later: list[dis.Instruction]) -> Any:
        """A global, or what a closure holds."""
        value = look()
        if isinstance(value, types.ModuleType):
            self.reads._looks.append((look, value))
            self._of_module(value, name, later)
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            self.reads._read(look, name)
            attribute = later[0].argval if later and later[0].opname in _DOTS else None
            if attribute is None:
                raise Unprovable(f"{self.where} hands {name} on")
            if attribute != "apply":
                self.reads._read(lambda: _in_class(value, attribute), f"{name}.{attribute}")
        else:
            self.reads._read(look, name)
        return value

    def _of_module(self, value: Any, name: str, later: list[dis.Instruction]) -> None:
        for one in later:
            if one.opname not in _DOTS:
                raise Unprovable(f"{self.where} hands the module {name} on")
            name = f"{name}.{one.argval}"
            if not any(value is known for known in _MODULES):
                raise Unprovable(f"{self.where} reads {name}")
            holder, value = value, getattr(value, one.argval, _MISSING)
            if isinstance(value, types.ModuleType):
                continue
            self.reads._looks.append((lambda: getattr(holder, one.argval, _MISSING), value))  # noqa: B023
            if not (_is_number(value) or _is_torchs(value)):
                raise Unprovable(f"{self.where} reads {name}")
            return


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _locals(one: dis.Instruction) -> tuple[str, ...]:
    """The locals that an instruction loads, the last one on top."""
    if one.opname == "STORE_FAST_LOAD_FAST":
        return (one.argval[1],)
    if not one.opname.startswith("LOAD_FAST"):
        return ()
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


def _stored(one: dis.Instruction) -> tuple[str, ...]:
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


def _calls(one: dis.Instruction) -> bool:
    """Whether what an instruction reads behind a dot is called, and not handed on."""
    return one.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((one.arg or 0) & 1))


def _last_local(one: dis.Instruction) -> str | None:
    return (_locals(one) or (None,))[-1]


def _stock(cls: type) -> type:
    """The class behind the package's own."""
    return next(base for base in cls.__mro__ if not issubclass(base, SwappedClass))


def _in_class(cls: type, name: str) -> Any:
    """What a class has under a name, unbound."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return _MISSING


def _is_number(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, tuple) and all(map(_is_number, value)))


def _is_torchs(value: Any) -> bool:
    """Whether it is one of torch's functions on tensors, which read nothing but their arguments."""
    name = getattr(value, "__name__", "")
    if isinstance(value, types.BuiltinFunctionType):
        known = getattr(torch, name, None) is value and hasattr(torch._C._VariableFunctions, name)
        known = known and not name.startswith(("from", "is_", "get_"))
        return known or getattr(torch._C._nn, name, None) is value or getattr(math, name, None) is value
    plain = isinstance(value, types.FunctionType) and value.__module__ == "torch.nn.functional"
    return plain and element_wise(name)


def _is_method(name: str) -> bool:
    return name in _METHODS or (element_wise(name.rstrip("_")) and hasattr(Tensor, name))


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and _is_number(a) and repr(a) == repr(b))
