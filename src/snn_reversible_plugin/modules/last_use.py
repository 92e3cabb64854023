"""Layers that are called with what nobody needs any more, and say so.

The one idea: in ``x = self.norm(x)`` the caller's variable gets another value when the call returns, so
what it holds now is the layer's to do with as it likes, if nobody else holds it. The caller's bytecode
tells. CPython itself does so: it appends to a string in place where the next instruction stores to its
variable.

Source: ``unicode_concatenate`` of CPython.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd, _MaxPoolNd

from snn_reversible_plugin.modules.swap import Mark
from snn_reversible_plugin.modules.tracking import is_tracking

# NOTE [The last use]
#
# 1. A call has one argument, and nothing by name. It is loaded from a local variable right before, and
#    what comes after the call, straight ahead, writes that variable or returns, and does not read it. Or
#    it is no variable's: another call's result. Where the write comes next, nobody can look at the argument
#    any more (`at_once`); else a debugger can, after an exception in what comes between, if at all.
# 2. A function with a handler (`try`, `with`) may read the variable when the layer raises; one that asks
#    for its variables by name may read all of them. What is a cell's is a closure's, too. None of these.
# 3. That is the caller's variable. Whoever else holds the value counts in it: see `tape/sliced/alone.py`.
#    Counts depend on how the call came, by a variable or not, which is its *way*.
# 4. The call comes from `nn.Module.__call__` and no other's, and no hook sees its input but this one and
#    those that give modules' names. It is a hook so that a layer's type stays what it is.
#
# For example, of `x = self.conv(x); y = self.norm(x + 1); x = self.node(y) + x` the convolution's input is
# in a variable that is written next, the norm's in none, and the neuron's in one that is not written.


class Way(NamedTuple):
    """How a call came: by which instruction its argument, and past how many frames of torch's. ``at_once``:
    whether the call's return leaves nobody who could read the argument."""

    loaded: str
    at_once: bool
    frames: int


class Between(Protocol):
    """Is told what a layer is about to take, and that it has taken it."""

    def is_worth(self, value: Any) -> bool: ...

    def take(self, value: Tensor, layer: nn.Module, way: Way, calls: Callable[..., None]) -> None: ...

    def taken(self, value: Any, failed: bool) -> None: ...


BETWEEN: Mark[Callable[[], Between | None]] = Mark("between")  # of a layer: whom it tells
_READ_BY_OPERATORS = (_ConvNd, _BatchNorm, _AvgPoolNd, _AdaptiveAvgPoolNd, _MaxPoolNd)
_OF_FRAMEWORKS = ("torch.nn.modules.", "spikingjelly.", "snn_reversible_plugin.models.")


def tell_last_uses(modules: Iterable[nn.Module], between: Callable[[], Between | None]) -> None:
    """Let layers among modules say when they are the last to use their input; ``between`` gives whom."""
    for module in modules:
        cls, known = type(module), isinstance(module, _READ_BY_OPERATORS)
        known = known and cls.forward.__module__.startswith(_OF_FRAMEWORKS)
        if BETWEEN.of(module) is None and (known or getattr(cls, "may_write_over_input", False)):
            _hook_into(module)
            BETWEEN.set(module, between)


def tell_no_more(module: nn.Module) -> None:
    """Leave a module as it was."""
    BETWEEN.clear(module)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def _hook_into(module: nn.Module) -> None:
    module.register_forward_pre_hook(_is_about_to_take)
    module.register_forward_hook(_has_taken, always_call=True)


def _is_about_to_take(layer: nn.Module, args: tuple[Any, ...]) -> None:
    told = BETWEEN.of(layer)
    if told is None or len(args) != 1 or torch.compiler.is_compiling():
        return
    between = told()
    if between is None or not between.is_worth(args[0]) or not is_unwatched(layer):
        return
    way = _way_of(sys._getframe())
    if way is not None:
        between.take(args[0], layer, way, calls_in)


def _has_taken(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    told = BETWEEN.of(layer)
    if told is not None and not torch.compiler.is_compiling() and (between := told()) is not None:
        between.taken(args[0] if args else None, output is None)


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody but a module itself sees what it is called with."""
    if "forward" in module.__dict__ or type(module).__call__ is not nn.Module.__call__:
        return False
    if module._compiled_call_impl is not None or of_modules._has_any_global_hook():
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return all(is_tracking(hook) or _is_ours(hook) for hook in hooks)


def _is_ours(hook: Any) -> bool:
    return hook is _is_about_to_take or hook is _has_taken


# -- the caller ----------------------------------------------------------------------------------------

_ENTRY = getattr(getattr(nn.Module, "_wrapped_call_impl", None), "__code__", None)
_CALL = nn.Module._call_impl.__code__
_OF_CALL = {_CALL, *(one for one in _CALL.co_consts if isinstance(one, CodeType))}
_BY_NAME = {"locals", "vars", "eval", "exec", "dir"}
_NOTHING = ("CACHE", "PRECALL", "EXTENDED_ARG", "NOP")
_RETURNS = ("RETURN_VALUE",)
_WRITES = ("STORE_FAST", "STORE_FAST_STORE_FAST", "STORE_FAST_LOAD_FAST")  # the first of their variables
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
NO_VARIABLE = "no variable"


def _way_of(frame: FrameType) -> Way | None:
    """How the call of a layer came whose hook runs in a frame, if it is the last use of its input."""
    frames, caller = 0, frame.f_back
    while caller is not None and caller.f_code in _OF_CALL:
        frames, caller = frames + 1, caller.f_back
    if not frames or caller is None or caller.f_code is not _ENTRY or caller.f_back is None:
        return None
    found = _loaded(caller.f_back.f_code, caller.f_back.f_lasti)
    return None if found is None else Way(*found, frames)


@functools.lru_cache(4096)
def _loaded(code: CodeType, at: int) -> tuple[str, bool] | None:
    """By which instruction the argument of the call at a place was loaded from a variable that is read no
    more, or that it is in none, and whether that is so at once; None for all other calls."""
    if code.co_exceptiontable or _BY_NAME.intersection(code.co_names):
        return None
    everything = list(dis.get_instructions(code))
    steps = [one for one in everything if one.opname not in _NOTHING]
    here = next((index for index, one in enumerate(steps) if one.offset == at), 0)
    call, load = steps[here], steps[here - 1]
    if not here or call.opname != "CALL" or call.arg != 1:
        return None
    if any(one.is_jump_target for one in everything if load.offset < one.offset <= at):
        return None  # what is on the stack depends on where it came from
    if not load.opname.startswith("LOAD_FAST"):
        return NO_VARIABLE, True
    name = _names(load)[-1]
    for after, one in enumerate(steps[here + 1 :]):
        if one.opname in _RETURNS or (one.opname in _WRITES and _names(one)[0] == name):
            return load.opname, not after
        if one.opcode in _JUMPS or name in _names(one):
            return None
    return None


def _names(one: dis.Instruction) -> tuple[Any, ...]:
    return one.argval if isinstance(one.argval, tuple) else (one.argval,)


# -- calls to learn counts from ------------------------------------------------------------------------


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def calls_in(way: Way, between: Between, x: Tensor) -> None:
    """Calls in a way, with what nobody else holds: a function's result, an operator's, and a view.

    Args:
        way: of the calls, if that is one that is known.
        between: whom they tell.
        x: [2, 2, 2, 2], with a gradient.
    """
    layer = nn.Identity()
    _hook_into(layer)
    BETWEEN.set(layer, lambda: between)
    if way.loaded == NO_VARIABLE:
        _with_results(layer, x)
    elif way.at_once:
        _with_variables(layer, x)
    else:
        _with_variables_written_later(layer, x)


def _with_results(layer: nn.Module, x: Tensor) -> None:
    layer(_Same.apply(x))
    layer(x * 2)
    layer((x * 2).flatten(0, 1))


def _with_variables(layer: nn.Module, x: Tensor) -> None:
    value = _Same.apply(x)
    value = layer(value)
    value = x * 2
    value = layer(value)
    value = (x * 2).flatten(0, 1)
    value = layer(value)


def _with_variables_written_later(layer: nn.Module, x: Tensor) -> None:
    value = _Same.apply(x)
    value = layer(value) * 2
    value = x * 2
    value = layer(value) * 2
    value = (x * 2).flatten(0, 1)
    value = layer(value) * 2
