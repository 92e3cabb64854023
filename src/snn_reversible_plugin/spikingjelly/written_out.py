"""A neuron that writes its charge, its reset or its step out itself, proved to be one of the three.

The one idea: a user's class is worth the written-out backward if its step is the same operations, forward
and backward, as that of ``IFNode``, ``LIFNode`` or ``ParametricLIFNode``. So its own code is looked through
for what it reads and sets, and its step is recorded next to theirs, once for each kind of input, and again
when anything that it reads has changed. A run on a sample comes after that, and is no proof.

Source: ``BaseNode`` and ``SimpleBaseNode`` of SpikingJelly 2.0, 0.0.0.0.14 and 0.0.0.0.12.
"""

from __future__ import annotations

import random
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snn_reversible_plugin.modules.kinds import is_multi_step
from snn_reversible_plugin.neurons.integrate_fire.in_place import multi_step, multi_step_vjp
from snn_reversible_plugin.neurons.integrate_fire.reference import (
    Neuron,
    Order,
    OutputGradients,
    Rule,
    charge,
)
from snn_reversible_plugin.neurons.own.alike import Expressions
from snn_reversible_plugin.neurons.own.code import Unprovable, is_number
from snn_reversible_plugin.neurons.own.graph import Kind
from snn_reversible_plugin.neurons.own.reads import behind
from snn_reversible_plugin.neurons.rerun import shadow
from snn_reversible_plugin.neurons.surrogates import Surrogate, by_autograd
from snn_reversible_plugin.neurons.witness import agree
from snn_reversible_plugin.ops.autocast import Autocast
from snn_reversible_plugin.spikingjelly.claims import (
    PHASES,
    Claim,
    StepReads,
    claim_of,
    own_sequences,
    written_by,
)
from snn_reversible_plugin.spikingjelly.copies import Copy, copy_of
from snn_reversible_plugin.spikingjelly.types import equations_of, origin_of, stores_v_seq

# NOTE [What is proved of a step]
#
# 1. What a class writes itself may be its charge, its fire, its reset, or the whole step; what is around
#    that is SpikingJelly's. Of a sequence of its own nothing is proved.
# 2. Its code reads numbers, the membrane, `w` and its surrogate, and sets the membrane (`own.code`). What
#    it reads is looked at again before every call.
# 3. What it doesn't write is the release's, and stands in both recordings as it is written here. In
#    0.0.0.0.14 that is a scripted function, whose backward adds up in an order of its own: so the order
#    is put together of parts, and a sample of the class itself is held to it.
# 4. In place of the surrogate stands one whose gradient nobody else can have written. What goes into it,
#    and what is done with its spikes, is so proved for each surrogate.
# 5. Equations of the right form with a constant that differs are another recording: `h / 2.0` is none of a
#    neuron whose tau is 2.1.
MOST = 64  # proofs


class Same(NamedTuple):
    """Whose equations a neuron has, and in which order it computes them."""

    equations: str
    decay_input: bool
    order: Order


# -- the two recordings ------------------------------------------------------------------------------


class _Fire(torch.autograd.Function):
    """A surrogate that nobody else has (see the note, 4)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, number: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.number = number
        return (u + number >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * (ctx.saved_tensors[0] * ctx.number).digamma(), None


class _FireModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number = 1.0 + random.SystemRandom().random()

    def forward(self, u: Tensor) -> Tensor:
        return _Fire.apply(u, self.number)  # type: ignore[no-any-return]


class _Given(NamedTuple):
    """What a step gets: its current, the membrane before it or the number that this starts as, and w."""

    x: Kind
    v: Kind | float
    w: Kind | None

    @property
    def start(self) -> float | None:
        """The number, if it is one."""
        return None if isinstance(self.v, Kind) else self.v


class _Writing(NamedTuple):
    """One way to write the three down that some release, or somebody, takes."""

    equations: str
    decay_input: bool
    scales: bool
    v_reset_first: bool


def _writings(module: Any, claim: Claim, stocks: Order) -> Iterator[_Writing]:
    """Those that a neuron may have, by what is set of it; where it has the release's, that one."""
    has_tau = isinstance(getattr(module, "tau", None), float)
    charges = claim.writes("neuronal_charge")
    resets = claim.writes("neuronal_reset") and module.v_reset is not None
    for equations in (claim.equations,) if claim.equations else ("IF", *(("LIF",) if has_tau else ())):
        for decay in (False,) if equations == "IF" else (True, False) if charges else (module.decay_input,):
            may_scale = equations != "IF" and not decay and not module.v_reset
            for scales in (True, False) if charges and may_scale else (may_scale and stocks.scales,):
                for first in (True, False) if resets else (stocks.v_reset_first,):
                    yield _Writing(equations, bool(decay), scales, first)


def _stocks_writing(module: Any, claim: Claim, stocks: Order) -> _Writing:
    """The release's own, for what a class doesn't write."""
    decays = claim.equations in ("LIF", "PLIF") and bool(getattr(module, "decay_input", False))
    scales = stocks.scales and not decays and not module.v_reset
    return _Writing(claim.equations or "IF", decays, scales, stocks.v_reset_first)


def _rule(module: Any, writing: _Writing) -> Rule:
    tau = module.tau if writing.equations == "LIF" else None
    settings = module.v_threshold, module.v_reset, bool(module.detach_reset)
    return Rule(tau, writing.decay_input, *settings, Order(scales=writing.scales))


def _phase(twin: Any, name: str, writing: _Writing, given: Any = None) -> Any:
    """A phase as it is written here, of a neuron that has its state in ``v``."""
    if name == "neuronal_charge":
        q = twin.w.sigmoid() if writing.equations == "PLIF" else None
        silent = Surrogate(lambda grad, u: grad)
        twin.v, _ = charge(given, twin.v, Neuron(_rule(twin, writing), silent, q))
        return None
    if name == "neuronal_fire":
        return twin.surrogate_function(twin.v - twin.v_threshold)
    s = given.detach() if twin.detach_reset else given
    if twin.v_reset is None:
        twin.v = twin.v - s * twin.v_threshold
    elif writing.v_reset_first:
        twin.v = (1.0 - s) * twin.v + s * twin.v_reset
    else:
        twin.v = s * twin.v_reset + (1.0 - s) * twin.v
    return None


def _step(
    module: nn.Module, fire: nn.Module, own: tuple[str, ...], writing: _Writing, start: float | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """``step(x[, v][, w]) -> spikes, v``; what of it is not in ``own`` is as it is written here."""
    cls = behind(type(module))
    is_whole = bool(own) and own[0] not in PHASES
    theirs = written_by(cls, origin_of(cls)) if is_whole else own  # type: ignore[arg-type]

    def step(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        twin: Any = shadow(module, _memories=_constants(module))
        given = list(others)
        memories = twin.__dict__["_memories"]
        memories["v"] = given.pop(0) if start is None else start
        twin._modules["surrogate_function"] = fire
        if given:
            twin._parameters["w"] = given.pop()
        for name in PHASES:
            if name not in theirs:
                twin.__dict__[name] = partial(_phase, twin, name, writing)
        if is_whole:
            return _whole(twin, own[0], x)
        twin.neuronal_charge(x)
        s = twin.neuronal_fire()
        twin.neuronal_reset(s)
        return s, memories["v"]

    return step


def _constants(module: nn.Module) -> dict[str, Any]:
    """A table of states with the numbers in it; what a membrane is promised to be is not read for that."""
    states = dict.items(module.__dict__["_memories"])
    return {name: value if is_number(value) else None for name, value in states}


def _whole(twin: Any, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    function = getattr(behind(type(twin)), name)
    if name != "single_step_functional_forward":
        return function(twin, x), twin._memories["v"]
    (s,), (v,) = function(twin, (x,), (twin._memories["v"],))
    return s, v


# -- the proof ---------------------------------------------------------------------------------------

_known: weakref.WeakKeyDictionary[nn.Module, StepReads] = weakref.WeakKeyDictionary()
# By all that a proof rests on, for layers that are alike. What was read is held, so no id is reused.
_shared: OrderedDict[Any, tuple[list[Any], Same | str]] = OrderedDict()


def proved(module: nn.Module, x: Tensor, v: Tensor | float) -> Same | str:
    """Whose equations a neuron has that writes its own, for a step from v to which x is given; or why it
    has nobody's. In multi-step mode x is the sequence."""
    cls = behind(type(module))
    copy = copy_of(cls)
    if claim_of(cls) is None or copy is None:
        return "its dynamics are its own"
    reads = _known.get(module)
    if reads is None or not reads.hold():
        _known.pop(module, None)
        try:
            reads = StepReads(module, copy)
        except Unprovable as why:
            return f"its dynamics are its own: {why}"
        _known[module] = reads
    claim = reads.claim
    if not isinstance(module.v_threshold, float) or not isinstance(module.v_reset, (float, type(None))):
        return "its dynamics are its own, and its threshold or its reset is no number"
    one = (x[0] if is_multi_step(module) else x).detach()
    if not isinstance(v, Tensor) and _fills_a_tensor(copy, claim):
        v = torch.full_like(one, v)
    w = module._parameters.get("w")
    given = _Given(
        Kind.of(one),
        Kind.of(v) if isinstance(v, Tensor) else v,
        Kind.of(w) if isinstance(w, Tensor) else None,
    )
    key = (
        cls, reads.key, given, repr(v) if isinstance(v, float) else None, is_multi_step(module),
        *(repr(getattr(module, name, None)) for name in _SET),
        *Autocast().dtypes.items(), torch.get_default_dtype(),
    )  # fmt: skip
    if key not in _shared:
        try:
            found: Same | str = _prove(module, claim, copy, given)
        except Unprovable as why:
            found = f"its dynamics are its own: {why}"
        _shared[key] = reads.values, found
        while len(_shared) > MOST:
            _shared.popitem(last=False)
    return _shared[key][1]


def equations_here(module: Any, x: Tensor, v: Tensor | float) -> Same | str:
    """The equations that a neuron has, by its class or by proof; or why it has none of the three's."""
    equations, copy = equations_of(module), copy_of(type(module))
    if equations is None or copy is None:
        return proved(module, x, v)
    return Same(equations, equations != "IF" and bool(module.decay_input), copy.order(equations))


def why_not_same(module: Any) -> str:
    """Why a neuron that writes its own step, as it is set now, has none of the three's equations; empty
    where it has, for a small input: what a call gets is proved when it is called."""
    found = of_sample(module)
    return found if isinstance(found, str) else ""


def of_sample(module: Any) -> Same | str:
    """The equations that a neuron has for a small input."""
    x = torch.zeros(1, 2, 3, device="cpu")
    return equations_here(module, x if is_multi_step(module) else x[0], x[0])


# What the equations that it is held to are set by, and what may run other code.
_SET = ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "training", "store_v_seq")


def _fills_a_tensor(copy: Copy, claim: Claim) -> bool:
    """Whether the release fills a tensor with the number that a membrane starts as, before the step."""
    return copy.has_step_modes and not claim.is_simple and claim.own != ("single_step_forward",)


def _prove(module: Any, claim: Claim, copy: Copy, given: _Given) -> Same | str:
    if copy.is_scripted and not module.training:
        return "in evaluation this release runs other code than in training"
    if (
        copy.has_operators
        and not claim.is_simple
        and is_multi_step(module)
        and not own_sequences(behind(type(module)), copy)
    ):
        return "its steps are its own, and its sequences not"
    if stores_v_seq(module) and (copy.has_step_modes or claim.is_step):
        return "it stores v_seq, and writes its own step"
    if given.start is not None and given.x.dtype.itemsize < 4:
        return "its membrane starts as a number, which half precision rounds"
    stocks = _stocks_order(claim, copy, claim.equations or "IF")
    writings = [*_writings(module, claim, stocks)]
    seen: list[_Given] = []
    at = given
    while at not in seen:  # a sequence's later steps, whose membrane is what the step before has left
        seen.append(at)
        writings, after = _alike(module, claim, at, _stocks_writing(module, claim, stocks), writings)
        if not writings:
            return "its step is none of IFNode's, LIFNode's or ParametricLIFNode's, operation by operation"
        at = given._replace(v=after) if is_multi_step(module) else given
    writing = writings[0]
    stocks = _stocks_order(claim, copy, writing.equations)
    order = _order(claim, stocks, writing, given.start is not None)
    same = Same(writing.equations, writing.decay_input, order)
    if _agrees(module, copy, same, given.start, given.x.dtype):
        return same
    return "a sample gives other bits than the equations that it was proved to have"


def _alike(
    module: Any, claim: Claim, given: _Given, stocks: _Writing, writings: list[_Writing]
) -> tuple[list[_Writing], Kind]:
    """Those of the writings that a step is the same operations as; and the membrane's kind after it."""
    kinds = [one for one in given if isinstance(one, Kind)]
    record, fire = Expressions(kinds, Autocast()), _FireModule()
    theirs = record.of(_step(module, fire, claim.own, stocks, given.start))
    alike = [one for one in writings if theirs == record.of(_step(module, fire, (), one, given.start))]
    return alike, theirs.outputs[1]


def _stocks_order(claim: Claim, copy: Copy, equations: str) -> Order:
    """In which order the release computes what a class leaves to it."""
    return Order(selects=not claim.is_simple) if copy.has_operators else copy.order(equations)


def _order(claim: Claim, stocks: Order, writing: _Writing, from_number: bool) -> Order:
    """The order of a step of which some is the release's, and some is written out."""
    order = stocks._replace(numbers=stocks.numbers or from_number)
    if claim.writes("neuronal_charge"):
        order = order._replace(scales=writing.scales, charge_together=False)
    if claim.writes("neuronal_reset"):
        order = order._replace(v_reset_first=writing.v_reset_first, reset_together=False)
    return order


def _agrees(module: Any, copy: Copy, same: Same, start: float | None, dtype: torch.dtype) -> bool:
    """Whether the class, run as it is, gives the bits of the equations on a sample (see the note, 3)."""
    multi = is_multi_step(module)
    order = same.order if multi else same.order._replace(selects=False)
    rule = Rule(
        module.tau if same.equations == "LIF" else None, same.decay_input, module.v_threshold,
        module.v_reset, bool(module.detach_reset), order,
    )  # fmt: skip
    function = copy.surrogate.ATan()
    w = module._parameters.get("w") if same.equations == "PLIF" else None

    def sample() -> tuple[Tensor, Tensor | float, OutputGradients]:
        grid = torch.arange(60, dtype=torch.float64, device="cpu")
        x_seq, g_s = (one.view(3, 20).to(dtype) for one in (grid.sin() * 3, grid.cos()))
        v, g_v = (one.to(dtype) for one in (grid[:20].cos(), (grid[:20] + 1).sin()))
        return x_seq, v if start is None else start, OutputGradients(g_s, g_v)

    def theirs() -> list[Tensor]:
        twin: Any = shadow(module, _memories=_constants(module))
        twin.__class__ = behind(type(module))
        memories = twin.__dict__["_memories"]
        twin._modules["surrogate_function"] = function
        if w is not None:
            twin._parameters["w"] = nn.Parameter(w.detach().cpu().clone())
        # TorchScript runs a function as it is written once, and in its own order from then on.
        for _ in range(4 if copy.is_scripted else 1):
            x_seq, v, grads = sample()
            memories["v"] = v
            x_seq.requires_grad_()
            s = twin.forward(x_seq) if multi else torch.stack([twin.forward(x) for x in x_seq.unbind()])
            found = s, memories["v"]
            (g_x,) = torch.autograd.grad(found, x_seq, grads[:2])
        return [*found, g_x]

    def ours() -> list[Tensor]:
        x_seq, v, grads = sample()
        q = None if w is None else w.detach().cpu().sigmoid()
        own = Neuron(rule, Surrogate(by_autograd(function)), q)
        with torch.no_grad():
            s, v_last, _ = multi_step(x_seq, v, own)
            g_x = multi_step_vjp(x_seq, v, grads, own).x
        assert g_x is not None
        return [s, v_last, g_x]

    return agree(ours, theirs)
