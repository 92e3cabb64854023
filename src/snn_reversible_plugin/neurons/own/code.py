"""A piece of a user's code, looked through for what it reads, and refused where it may do anything else.

The one idea: code may read numbers, functions and torch's operations, and set nothing that outlives it.
What can't be told from its instructions is refused: a proof must not rest on what somebody probably means.

Source: the ``dis`` module of the standard library.
"""

from __future__ import annotations

import builtins
import dis
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.neurons.witness import element_wise

# NOTE [What code may do]
#
# 1. Read: numbers, strings and tuples of them, from the module, its class, globals, a closure, a default;
#    functions and autograd functions, whose code is looked through as well; torch's functions on tensors.
# 2. A name behind a dot is looked up where that can be told (`self.x`, `torch.x`, `Function.x`). Behind
#    anything else it has to be one of `_METHODS`: what a tensor, a list or a context has, and is harmless.
# 3. Set: entries of what it made itself, and attributes of an autograd function's context. Nothing else:
#    no attribute, no global. So a counter, a stored spike, a state in the module are refused, but for the
#    states (`Reads.is_state`) that whoever records it hands in and takes out.
# 4. Catch nothing, for a recording that fails is an exception; no `with`, which is the same bytecode.
# 5. Random numbers, and what depends on values, show in the recording (`graph`).
SCALARS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format)
_BUILTINS = {"range", "len", "enumerate", "zip", "float", "int", "bool", "abs", "min", "max", "sum", "list",
             "tuple", "reversed", "isinstance", "super"}  # fmt: skip
_METHODS = {
    "shape", "size", "dim", "ndim", "numel", "dtype", "device", "is_cuda", "float", "double", "half", "to",
    "type_as", "view", "view_as", "reshape", "flatten", "contiguous", "unbind", "select", "squeeze",
    "unsqueeze", "transpose", "permute", "expand", "expand_as", "chunk", "split", "new_zeros", "new_ones",
    "new_full", "item", "append", "save_for_backward", "saved_tensors", "needs_input_grad", "sum", "mean",
    "set_materialize_grads", "mark_non_differentiable",
}  # fmt: skip
_MODULES = (torch, torch.nn, torch.nn.functional, torch.autograd, math)
MISSING = object()
_DOTS = ("LOAD_ATTR", "LOAD_METHOD")
# What is looked at one by one below.
_READS = {
    "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF", "LOAD_ATTR",
    "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "STORE_DEREF",
}  # fmt: skip
# What works on locals and on what it computes from them alone, from Python 3.11 to 3.14; a name of a later
# one is not among them. A RERAISE without what catches ends a comprehension.
_OF_LOCALS = {
    "NOP", "RESUME", "NOT_TAKEN", "PUSH_NULL", "PRECALL", "KW_NAMES", "COPY_FREE_VARS", "MAKE_CELL",
    "LOAD_CLOSURE", "POP_TOP", "COPY", "SWAP", "LOAD_CONST", "LOAD_SMALL_INT", "LOAD_ASSERTION_ERROR",
    "LOAD_COMMON_CONSTANT", "LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_AND_CLEAR",
    "LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_BORROW_LOAD_FAST_BORROW", "STORE_FAST",
    "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "DELETE_FAST", "BINARY_OP", "BINARY_SUBSCR",
    "BINARY_SLICE", "STORE_SUBSCR", "STORE_SLICE", "COMPARE_OP", "CONTAINS_OP", "IS_OP",
    "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_INVERT", "UNARY_POSITIVE", "TO_BOOL", "BUILD_LIST",
    "BUILD_TUPLE", "BUILD_SLICE", "BUILD_MAP", "BUILD_CONST_KEY_MAP", "BUILD_STRING", "LIST_APPEND",
    "LIST_EXTEND", "LIST_TO_TUPLE", "FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC",
    "CONVERT_VALUE", "UNPACK_SEQUENCE", "UNPACK_EX", "GET_ITER", "FOR_ITER", "END_FOR", "POP_ITER",
    "CALL", "CALL_KW", "CALL_FUNCTION_EX", "MAKE_FUNCTION", "SET_FUNCTION_ATTRIBUTE", "RETURN_VALUE",
    "RETURN_CONST", "RAISE_VARARGS", "RERAISE",
}  # fmt: skip


class Unprovable(Exception):
    """Raised for what can't be proved; the text says why."""


class Code:
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
            if not _can_be_followed(one.opname):
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
            elif one.opname in _DOTS and not _is_method(one.argval):
                # What comes from two sides was not looked at on both.
                if one.is_jump_target or not self._is_known(one.argval, steps[:at]):
                    raise Unprovable(f"{self.where} reads .{one.argval} of something")
            elif one.opname == "LOAD_SUPER_ATTR":
                raise Unprovable(f"{self.where} calls what it derives from")

    def _set(self, one: dis.Instruction, before: dis.Instruction | None) -> None:
        on_first = before is not None and _last_local(before) == self.first
        is_state = self.owner is not None and self.reads.is_state(self.owner[0], one.argval)
        if not (on_first and (self.context or is_state)) or one.is_jump_target:
            raise Unprovable(f"{self.where} sets an attribute, {one.argval}")

    def _is_self(self, one: dis.Instruction) -> bool:
        return self.owner is not None and self.first is not None and self.first in _locals(one)

    def _self(self, one: dis.Instruction, later: list[dis.Instruction]) -> None:
        if _last_local(one) != self.first or len(_locals(one)) != len({*_locals(one)}):
            raise Unprovable(f"{self.where} hands itself on")
        is_named = bool(later) and later[0].opname in ("STORE_ATTR", *_DOTS)
        if is_named and self.reads.is_state(self.owner[0], later[0].argval):
            return
        if later and later[0].opname in ("STORE_ATTR", "COPY"):  # the latter of `self.x += 1`
            name = next((one.argval for one in later if one.opname == "STORE_ATTR"), "")
            raise Unprovable(f"{self.where} sets an attribute, {name}")
        if not later or later[0].opname not in _DOTS:
            raise Unprovable(f"{self.where} hands itself on")
        name = later[0].argval
        value = self.reads.attribute(*self.owner, name)
        if isinstance(value, (nn.Module, types.FunctionType)) and not _calls(later[0]):
            raise Unprovable(f"{self.where} hands self.{name} on")

    def _is_known(self, name: str, before: list[dis.Instruction]) -> bool:
        """Whether what it is read of was looked at: self, a module, an autograd function, a context."""
        names: list[str] = []
        for one in reversed(before):
            if one.opname in _DOTS:
                names.append(one.argval)
                continue
            if self._is_self(one):
                return not names
            if self.context and _last_local(one) == self.first:
                # What the code has left there, not what autograd has.
                return not names and not hasattr(torch._C._FunctionBase, name)
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

    def _cells(self) -> dict[str, types.CellType]:
        return dict(zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True))

    def _value(self, one: dis.Instruction) -> Any:
        if one.opname == "LOAD_DEREF":
            cell = self._cells().get(one.argval)
            return None if cell is None else cell.cell_contents
        return self.function.__globals__.get(one.argval)

    def _global(self, one: dis.Instruction, later: list[dis.Instruction]) -> None:
        name, table = one.argval, self.function.__globals__
        if name not in table:
            if name not in _BUILTINS or not hasattr(builtins, name):
                raise Unprovable(f"{self.where} reads {name}")
            if name == "super":
                raise Unprovable(f"{self.where} calls what it derives from")
            self.reads.look(lambda: table.get(name, MISSING), MISSING)
            self.reads.look(lambda: getattr(builtins, name, MISSING), getattr(builtins, name))
            return
        value = self._outside(lambda: table.get(name, MISSING), name, later)
        if isinstance(value, (nn.Module, types.FunctionType)) and not one.arg & 1:  # type: ignore[operator]
            raise Unprovable(f"{self.where} hands {name} on")

    def _closure(self, name: str, later: list[dis.Instruction]) -> None:
        cell = self._cells().get(name)
        if cell is None:
            return  # a local of its own, shared with a function inside
        value = self._outside(lambda: cell.cell_contents, name, later)
        if isinstance(value, (nn.Module, types.FunctionType)):
            raise Unprovable(f"{self.where} has {name} from a function around it")

    def _outside(self, look: Callable[[], Any], name: str, later: list[dis.Instruction]) -> Any:
        """A global, or what a closure holds."""
        value = look()
        if isinstance(value, types.ModuleType):
            self.reads.look(look, value)
            self._of_module(value, name, later)
        elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
            self.reads.read(look, name)
            attribute = later[0].argval if later and later[0].opname in _DOTS else None
            if attribute is None:
                raise Unprovable(f"{self.where} hands {name} on")
            if attribute != "apply":
                self.reads.read(lambda: in_class(value, attribute), f"{name}.{attribute}")
        else:
            self.reads.read(look, name)
        return value

    def _of_module(self, value: Any, name: str, later: list[dis.Instruction]) -> None:
        for one in later:
            if one.opname not in _DOTS:
                raise Unprovable(f"{self.where} hands the module {name} on")
            name = f"{name}.{one.argval}"
            if not any(value is known for known in _MODULES):
                raise Unprovable(f"{self.where} reads {name}")
            holder, value = value, getattr(value, one.argval, MISSING)
            if isinstance(value, types.ModuleType):
                continue
            self.reads.look(lambda: getattr(holder, one.argval, MISSING), value)  # noqa: B023
            if not (is_number(value) or is_torchs(value)):
                raise Unprovable(f"{self.where} reads {name}")
            return


def _can_be_followed(name: str) -> bool:
    return name in _OF_LOCALS or name in _READS or "JUMP" in name


def _locals(one: dis.Instruction) -> tuple[str, ...]:
    """The locals that an instruction loads, the last one on top."""
    if one.opname == "STORE_FAST_LOAD_FAST":
        return (one.argval[1],)
    if not one.opname.startswith("LOAD_FAST"):
        return ()
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


def _stored(one: dis.Instruction) -> tuple[str, ...]:
    if one.opname == "STORE_FAST_LOAD_FAST":
        return (one.argval[0],)
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


def _calls(one: dis.Instruction) -> bool:
    """Whether what an instruction reads behind a dot is called, and not handed on."""
    return one.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((one.arg or 0) & 1))


def _last_local(one: dis.Instruction) -> str | None:
    return (_locals(one) or (None,))[-1]


def in_class(cls: type, name: str) -> Any:
    """What a class has under a name, unbound."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return MISSING


def is_number(value: Any) -> bool:
    """Whether it is a number, or another value that can't change, or a tuple of them."""
    return isinstance(value, SCALARS) or (isinstance(value, tuple) and all(map(is_number, value)))


def is_torchs(value: Any) -> bool:
    """Whether it is one of torch's functions on tensors, which read nothing but their arguments."""
    name = getattr(value, "__name__", "")
    if isinstance(value, types.BuiltinFunctionType):
        known = getattr(torch, name, None) is value and hasattr(torch._C._VariableFunctions, name)
        known = known and not name.startswith(("from", "is_", "get_", "_"))
        return known or getattr(torch._C._nn, name, None) is value or getattr(math, name, None) is value
    plain = isinstance(value, types.FunctionType) and value.__module__ == "torch.nn.functional"
    return plain and element_wise(name)


def _is_method(name: str) -> bool:
    return name in _METHODS or (element_wise(name.rstrip("_")) and hasattr(Tensor, name))
