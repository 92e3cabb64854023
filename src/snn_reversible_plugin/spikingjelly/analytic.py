"""Neurons with the equations of IFNode, LIFNode or ParametricLIFNode, and an analytic backward.

The one idea: these three are nearly all of practice, and their arithmetic is known, so the backward is
written out (:mod:`.neurons.integrate_fire.reference`) instead of recorded. :func:`how` says of each call
whether that is so; a configuration whose arithmetic is not known here, and any subclass with dynamics of
its own, is replayed as a black box (:mod:`.spikingjelly.replayed`).
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.kinds import is_multi_step
from snn_reversible_plugin.modules.swap import SwappedClass
from snn_reversible_plugin.neurons.integrate_fire import on_device
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, Rule
from snn_reversible_plugin.neurons.integrate_fire.stretch import place_of_step
from snn_reversible_plugin.neurons.on_grid import switches
from snn_reversible_plugin.ops.chunks import chunk_size
from snn_reversible_plugin.ops.outputs import on_its_own
from snn_reversible_plugin.spikingjelly.agreement import Case, agrees, stock_runs
from snn_reversible_plugin.spikingjelly.calls import (
    Beside,
    Call,
    MultiStep,
    Promised,
    SingleStep,
    first_membrane,
    leave_all,
    promises_of,
    stepped_neurons,
)
from snn_reversible_plugin.spikingjelly.copies import Copy, InTorch, ServedInTorch, copy_of
from snn_reversible_plugin.spikingjelly.fused import dtype_of, is_wide, may_fuse, why_not_fused
from snn_reversible_plugin.spikingjelly.replayed import as_stock, is_learning, replayed
from snn_reversible_plugin.spikingjelly.surrogates import (
    as_autograd,
    fused,
    is_heaviside,
    proved,
    surrogate_of,
)
from snn_reversible_plugin.spikingjelly.types import (
    equations_of,
    own_entries,
    replaced_methods,
    states_beside_v,
    stores_v_seq,
)
from snn_reversible_plugin.spikingjelly.written_out import Same, equations_here
from snn_reversible_plugin.tape.final_membrane import Memories, OfFirstStep

# -- how a call is run ---------------------------------------------------------------------------------


class ByFormula(NamedTuple):
    """By the written-out forward and backward: what they take beside the input."""

    call: Call
    v: Tensor | float
    w: Tensor | None


class ByReplay(NamedTuple):
    """By stock's own forward, run again in the backward, and why."""

    reason: str


class ByStock(NamedTuple):
    """By stock's own forward as it is, and why."""

    reason: str


class ByTape(NamedTuple):
    """By a forward that may do more than its equations, so that it can't run twice, and why."""

    reason: str


How = ByFormula | ByReplay | ByStock | ByTape
_TEXTS = {ByReplay: "generic replay", ByStock: "stock", ByTape: "the tape"}
# What ran last in place of the formulas, for reports; nothing of a neuron that runs by them.
_instead: weakref.WeakKeyDictionary[Any, ByReplay | ByStock | ByTape] = weakref.WeakKeyDictionary()
# Those whose last call had membranes that are wider than stock's.
_ran_wide: weakref.WeakSet[Any] = weakref.WeakSet()


class Analytic(ServedInTorch):
    """Mixin in front of one of the three neurons."""

    lean = may_write_over_input = True

    @property
    def arithmetic(self) -> str:
        """Which guarantee holds, with the settings of now and the last call."""
        return "fused" if self in _ran_wide else "stock"

    @property
    def may_fuse(self) -> bool:
        """Whether ``arithmetic="fused"`` means something to it."""
        return may_fuse(self)

    @property
    def treatment(self) -> str:
        """What the backward does, for reports; of the last call that recorded a gradient."""
        instead = _instead.get(self)
        return "analytic" if instead is None else _TEXTS[type(instead)]

    @property
    def treatment_reason(self) -> str:
        """Why the last call's backward was not the written-out one, for reports."""
        instead = _instead.get(self)
        reasons = self.served_otherwise, "" if instead is None else instead.reason, why_not_fused(self)
        return "; ".join(filter(None, reasons))

    @property
    def v_seq(self) -> Any:
        """The membranes of all steps [T, N, ...], where the neuron stores them."""
        memories, attributes = self.__dict__.get("_memories", {}), self.__dict__
        if "v_seq" in memories:
            return memories["v_seq"]
        if "v_seq" not in attributes:
            raise AttributeError("v_seq")
        if isinstance(memories, Memories) and memories.stored is not None:
            attributes["v_seq"], memories.stored = memories.stored.read(), None
        return attributes["v_seq"]

    @v_seq.setter
    def v_seq(self, value: Any) -> None:
        memories = self.__dict__.get("_memories", {})
        if isinstance(memories, Memories):
            memories.stored = None
        (memories if "v_seq" in memories else self.__dict__)["v_seq"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if switches.by_autograd() and len(args) == 1 and not kwargs and is_wide(self, args[0]):
            # The specification of what runs fused: stock's, in float32 between two casts.
            with InTorch(self):  # type: ignore[arg-type]
                return super().forward(args[0].float()).to(args[0].dtype)  # type: ignore[misc]
        chosen = how(self, args, kwargs)
        if isinstance(chosen, ByFormula):
            if _instead:
                _instead.pop(self, None)
            return _run(self, args[0], chosen)
        if len(args) == 1 and not kwargs and tape.runs_eagerly() and is_wide(self, args[0]):
            spikes = Analytic.forward(self, args[0].float()).to(args[0].dtype)
            _ran_wide.add(self)
            return spikes
        if not torch.compiler.is_compiling():  # older compilers stop at a weak set
            _ran_wide.discard(self)
        if not tape.may_record():
            with InTorch(self):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        _instead[self] = chosen
        if isinstance(chosen, ByTape):
            with InTorch(self):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        run = replayed if isinstance(chosen, ByReplay) else as_stock
        return run(self, Analytic, args, kwargs)  # type: ignore[arg-type]

    def reset(self) -> None:
        """Set the states to their reset values."""
        if isinstance(memories := self.__dict__["_memories"], Memories):
            memories.forget()
        super().reset()  # type: ignore[misc]


class Reversible(Analytic, SwappedClass):
    """In front of a subclass that has one of the three neurons' dynamics, inherited or proved."""


def how(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> How:
    """How a call of one of the three neurons is run: by the formulas where they are stock's arithmetic.

    Example:
        >>> import torch
        >>> from snn_reversible_plugin.spikingjelly import RevLIFNode
        >>> from snn_reversible_plugin.spikingjelly.analytic import how
        >>> node, x_seq = RevLIFNode(step_mode="m"), torch.rand(4, 3, requires_grad=True)
        >>> type(how(node, (x_seq,), {})).__name__
        'ByFormula'
        >>> how(node, (x_seq.detach(),), {})
        ByStock(reason='neither its input nor anything of its own has a gradient')
    """
    if not tape.runs_eagerly():
        return ByStock("it is traced, or its operations are counted")
    copy = copy_of(type(module))
    assert copy is not None
    if len(args) != 1 or kwargs:
        found: ByFormula | str = "it is called with more than its input"
    else:
        found = _unusual(module, copy, args[0]) or _by_formula(module, copy, args[0])
    if isinstance(found, ByFormula):
        return found
    if not torch.is_grad_enabled():
        return ByStock("no gradient is recorded")
    if not is_learning(module, args, kwargs):
        return ByStock("neither its input nor anything of its own has a gradient")
    if _has_no_surrogate(module, copy):
        return ByStock("in evaluation this release runs code without a surrogate gradient")
    once = own_entries(type(module)) or replaced_methods(module)
    return ByTape(found) if once else ByReplay(found)


def _has_no_surrogate(module: Any, copy: Copy) -> bool:
    """Whether a call is run by the scripted code that 0.0.0.0.14 has for evaluation."""
    scripted = copy.has_step_modes and not copy.has_operators
    return scripted and not module.training and equations_of(module) in ("IF", "LIF")


def _unusual(module: Any, copy: Copy, x: Any) -> str | None:
    """What is not covered of an input, or of what the neuron is set to do with it."""
    multi = is_multi_step(module)
    if replaced := replaced_methods(module):
        return f"the instance has a {min(replaced)} of its own"
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__} and no plain tensor"
    if x.dim() < 1 + multi or (multi and x.shape[0] == 0):
        return f"its input has no {'time steps' if multi else 'dimensions'}: shape {tuple(x.shape)}"
    if not x.is_floating_point() or x.layout is not torch.strided:
        return f"its input is {x.dtype}, {x.layout}"
    if others := states_beside_v(module):
        return f"it has states beside v: {', '.join(others)}"
    if stores_v_seq(module) and not multi:
        return "store_v_seq is on, and it takes one step at a time"
    if getattr(module, "backend", "torch") not in ("torch", "cupy"):
        return f"its backend is {module.backend}"
    if _has_no_surrogate(module, copy):
        return "it is in evaluation"
    narrow = x.dtype.itemsize < 4 and not is_wide(module, x)
    if copy.is_scripted and narrow and torch.is_autocast_enabled(x.device.type):
        return "under autocast TorchScript casts by rules of its own"
    return None


def _by_formula(module: Any, copy: Copy, x: Tensor) -> ByFormula | str:
    shape, dtype = x.shape[1:] if is_multi_step(module) else x.shape, dtype_of(module, x)
    v = module._memories.get("v")
    if isinstance(v, Tensor):
        if copy.has_operators:
            if v.shape != shape:
                v = module.v_reset if module.v_reset is not None else 0.0
            elif v.dtype != dtype or v.device != x.device:
                v = v.to(dtype=dtype, device=x.device)
        elif (v.shape, v.dtype, v.device) != (shape, dtype, x.device):
            return f"its membrane has another shape or device than its input, or is not {dtype}"
    elif not isinstance(v, float):
        return f"its membrane is a {type(v).__name__}"
    elif not copy.has_step_modes and v != (module.v_reset or 0.0):
        return "its membrane starts as another number than it rests at"
    same = equations_here(module, x, v)
    if isinstance(same, str):
        return same
    w = module.w if same.equations == "PLIF" else None
    if torch.is_grad_enabled() and not (
        x.requires_grad
        or (isinstance(v, Tensor) and v.requires_grad)
        or (isinstance(w, Tensor) and w.requires_grad)
    ):
        return "what learns in it is neither its input nor its state"
    call = _call(module, copy, x, dtype, v, same)
    return call if isinstance(call, str) else ByFormula(call, v, w)


def _run(module: Any, x: Tensor, chosen: ByFormula) -> Tensor:
    call, start, w = chosen
    (_ran_wide.add if call.neuron.wide else _ran_wide.discard)(module)
    v: Any = start
    again = v if isinstance(v, Tensor) else None
    ws: tuple[Tensor, ...] = ()
    promised, place = Promised(), None
    if not is_multi_step(module):
        ws = () if w is None else (w,)
        place = place_of_step(v, x, call.with_leak, w) if torch.is_grad_enabled() else None
        first = None
        if place is not None and tape.may_promise() and again is None and module not in stepped_neurons:
            held = map(tape.handle_of, (x, *ws))
            first = OfFirstStep(
                partial(stepped_neurons.add, module), partial(first_membrane, call, v), *held
            )
            promised = Promised(first)
        s, v = map(on_its_own, SingleStep.apply(x, v, again, call, Beside(first, place), *ws))
        if first is not None:
            first.place = place
        states = [v]
        v_seq = None
    else:
        ws = () if w is None else (w,) * (1 if call.fused else x.shape[0])
        promises = torch.is_grad_enabled() and tape.may_promise()
        if promises and not isinstance(v, Tensor):
            promised = promises_of(call, v, tuple(map(tape.handle_of, (x, *ws[:1]))))
        s, *states = map(on_its_own, MultiStep.apply(x, v, again, call, promised, *ws))
        v_seq = states[-1] if call.store_v_seq else None
        v = states[0]
        if v_seq is not None and promised.stored is None:
            tape.mark_opaque(v_seq)
            if call.fused:
                v = v_seq[-1].clone()
        if promised.stored is None and (v_seq is not None or hasattr(module, "v_seq")):
            module.v_seq = v_seq
    if call.neuron.surrogate.spikes:
        tape.mark_spikes(s)
    else:
        tape.mark_opaque(s)
    if any(promised):
        leave_all(module, promised, states)
        return s
    if place is not None:
        place.left(v)
    elif v_seq is None or not call.fused:
        tape.mark_opaque(v)
    module._memories["v"] = v
    return s


def _call(
    module: Any, copy: Copy, x: Tensor, dtype: torch.dtype, v: Tensor | float, same: Same
) -> Call | str:
    """What the formulas, which compute in ``dtype``, need of a neuron as it is set; or why they are not
    stock's arithmetic."""
    equations, w = same.equations, module.w if same.equations == "PLIF" else None
    is_stocks = equations_of(module) is not None
    rule = _rule(module, same, copy, (dtype, x.device), w)
    if isinstance(rule, str):
        return rule
    function = surrogate_of(module)
    wide = dtype is not x.dtype
    known = None
    if copy.has_operators and is_stocks and dtype is torch.float32:
        known = fused(function)
    if w is not None and w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        known = None
    is_fused = known is not None
    runs = stock_runs(equations, copy, x.device, is_fused) if is_stocks else "torch"
    if wide and known is not None:  # where no kernel is, it is computed as on a CPU
        runs = "triton" if on_device.takes(Neuron(rule, known), x.device) else "torch"
    launched = runs == "triton" and known is not None and is_multi_step(module)
    if launched and not on_device.takes(Neuron(rule, known), x.device):  # type: ignore[arg-type]
        return f"no kernel here computes its sequences on {x.device.type}"
    if runs != "torch" and not launched:
        return f"stock runs a kernel of its own on {x.device.type}"
    if launched and on_device.order_of(x, v) is None:
        return "its input is laid out neither step by step nor channels-last"
    if known is None and not copy.has_operators and is_heaviside(function):
        known = as_autograd(function, dtype)
        known = None if known.name is None else known
        may_launch = known is not None and is_stocks and dtype is torch.float32
        launched = may_launch and _is_launched(module, x, v, Neuron(rule, known))  # type: ignore[arg-type]
    name = type(function).__name__ if is_fused or launched else None
    case = Case(equations, rule.decay_input, rule.v_reset is None, rule.detach_reset, name)
    if is_stocks and not agrees(copy, case, x.device if launched else None):
        return "the installed SpikingJelly computes it in another order"
    if known is None:
        shape = x.shape[1:] if is_multi_step(module) else x.shape
        chunk = min(shape.numel(), chunk_size(x.device))
        known = proved(function, shape, dtype, x.device, chunk)
    if known is None:
        return f"its surrogate {type(function).__name__} is not known to work element by element"
    return Call(Neuron(rule, known, launched=launched, wide=wide), is_fused, stores_v_seq(module))


def _is_launched(module: Any, x: Tensor, v: Tensor | float, neuron: Neuron) -> bool:
    """Whether a sequence of what is torch code in stock is computed by the device's form."""
    return (
        is_multi_step(module)
        and on_device.takes(neuron, x.device)
        and on_device.order_of(x, v) == tuple(range(x.dim()))
    )


def _rule(
    module: Any, same: Same, copy: Copy, given: tuple[torch.dtype, torch.device], w: Tensor | None
) -> Rule | str:
    dtype, device = given
    tau, equations = None, same.equations
    if equations == "LIF":
        tau = module.tau
        if not isinstance(tau, float):
            return f"its tau is a {type(tau).__name__}"
    elif equations == "PLIF":
        if not isinstance(w, Tensor) or w.dim() or w.device != device:
            return "its w is not one number on the input's device"
        if not copy.has_operators and w.dtype != dtype:
            return f"its w is {w.dtype}, and its steps are computed in {dtype}"
    v_threshold, v_reset = module.v_threshold, module.v_reset
    if not isinstance(v_threshold, float):
        return f"its v_threshold is a {type(v_threshold).__name__}"
    if not (v_reset is None or isinstance(v_reset, float)):
        return f"its v_reset is a {type(v_reset).__name__}"
    if getattr(module, "_neuron_precision", None) is not None:
        return "it has a precision of its own"
    return Rule(tau, same.decay_input, v_threshold, v_reset, bool(module.detach_reset), same.order)
