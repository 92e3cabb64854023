"""The membrane that a sequence leaves behind, held only once somebody wants it.

The one idea: a network's states are reset before the next batch far more often than they are read, and
held for nothing they are most of what a training step holds beside its bits. So a neuron, or a chain of
reversible blocks for the neurons inside, leaves a promise among the neuron's ``_memories``: reading it
gives the tensor that stock would have left there, with its gradient.

Source: ``MemoryModule`` of SpikingJelly 2.0, which keeps states in a dict of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from snn_reversible_plugin import tape
from snn_reversible_plugin.tape.handles import Handle, Kept, peek
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import Replayed

# NOTE [When a final membrane is computed]
#
# 1. In the neuron's backward, or the chain's, which has it at hand, if it is still among the states then,
#    and what it would be computed from is larger: that is let go. Where it is smaller (bits of spikes and a
#    convolution's weights), it is held instead, with copies of the parameters, which are about to change:
#    64 channels of 32 x 32 for a batch of 32 are a membrane of 8.4 MB, 4 steps of bits and a 3 x 3
#    convolution are 1.2 MB. The same holds of the membranes of all steps (v_seq), four times as large.
# 2. When it is read before: the sequence is run again, from what the tape holds, or the chain is undone.
# 3. Before an optimizer's step, and before a converted model loads weights, should no backward have
#    reached the neuron: afterwards the weights that made the current are others. Where they are others
#    already, reading it says so.
# 4. Never, if the states are reset, or set, first. Stock's ``reset`` looks at the states that it replaces,
#    so a promise among a stock neuron's goes before (`ForgettingReset`).
# 5. In steps, only after the first one of a fresh neuron. A second step reads that membrane, so a neuron
#    that takes several makes the promise once, before anybody can know.
# 6. A sequence that starts from a state that an earlier one left shows a user who reads states: there the
#    membrane is computed at once.


class FinalMembrane:
    """The promise of a membrane: how to compute it, and where its gradient goes.

    Args:
        run: gives the membrane.
        held: handles of the tensors that ``run`` takes.
    """

    __slots__ = ("__weakref__", "_held", "_place", "_run", "_stride", "_v", "goes_unread")

    _place: Tensor
    _stride: tuple[int, ...]

    def __init__(self, run: Callable[..., Tensor], *held: Handle) -> None:
        self._run: Callable[..., Tensor] | None = run
        self._held = held
        self._v: Tensor | None = None
        self.goes_unread = False  # whether the neuron's last one was reset before anybody read it

    def placeholder(self, v: Tensor, zero: Tensor | None = None) -> Tensor:
        """For the neuron's autograd function to return in place of ``v``: of its shape, but of one
        element's storage, which is ``zero``'s where that is given."""
        self._stride = v.stride()
        return (v.new_zeros(()) if zero is None else zero).expand(v.shape)

    @property
    def membrane(self) -> Tensor | None:
        """The membrane, if it has been computed."""
        return self._v

    @property
    def held(self) -> tuple[Handle, ...]:
        """The handles of what it would be computed from."""
        return self._held

    def look(self) -> Tensor:
        """The membrane, for somebody who is no reader of the user's: nothing of it is kept."""
        if self._v is not None:
            return self._v
        assert self._run is not None
        with tape.paused(), torch.inference_mode(False), torch.no_grad():
            return self._run(*map(peek, self._held))

    def promise(self, place: Tensor) -> None:
        """From now on it may be read; ``place``, the function's output, gets the membrane's gradient."""
        self._place = place
        _promises().add(self)

    def empty(self) -> Tensor | None:
        """For the backward to fill and to :meth:`keep`; None if that is done."""
        if self._v is not None:
            return None
        place = self._place
        return torch.empty_strided(place.shape, self._stride, dtype=place.dtype, device=place.device)

    def keep(self, v: Tensor) -> None:
        """The membrane is known; what it would be computed from is let go."""
        self._v, self._run, self._held = v, None, ()
        _promises().discard(self)

    def settle(self, lean: bool = False) -> bool:
        """Hold on, beyond the backward, to what it is computed from, if that is smaller; whether it is.

        ``lean``: if copies of parameters are smaller; for a backward that has no room for the membrane. Of
        a neuron whose last one was reset unread nothing is copied before an optimizer's step, nor is it
        computed where an optimizer steps in the backward.
        """
        if self._run is None or not self._held:
            return False
        if lean and self.goes_unread:
            return not any(_goes(handle) for handle in behind(self._held))
        kept: list[Kept] = []
        seen, place = set[int](), self._place
        size, room = 0, place.numel() * place.element_size()
        for handle in behind(self._held):
            if not isinstance(handle, (Kept, Packed, Replayed)) or _goes(handle):
                return False
            is_kept = isinstance(handle, Kept) and (handle.parameter or not lean)
            if is_kept:
                kept.append(handle)  # type: ignore[arg-type]
            if is_kept or not lean:
                # A product's result that a plan keeps stands to its turn in the backward, promise or not.
                size += 0 if isinstance(handle, Replayed) else handle.stored(seen)
                if size >= room:
                    return False
        if size >= room:
            return False
        for one in kept:
            one.spill()
        _promises().discard(self)
        return True

    def is_of_other_weights(self) -> bool:
        """Whether a parameter that it comes from was stepped since: computed now, it would be another."""
        return any(
            isinstance(handle, Kept) and handle.parameter and handle.tensor._version != handle.version
            for handle in behind(self._held)
        )

    def compute(self) -> None:
        """Make the membrane known, if it is not."""
        run = self._run
        if run is None:
            return
        try:
            with tape.paused(), torch.inference_mode(False), torch.no_grad():
                self.keep(run(*map(peek, self._held)))
        except RuntimeError as error:
            if not self.goes_unread:
                raise
            raise RuntimeError(
                "the membrane of a neuron's last call was not kept: the one before was reset unread, "
                "and the weights are others by now. Read it before the backward, or use another mode than "
                '"minimal" together with step_in_backward.'
            ) from error

    def read(self) -> Tensor:
        """The membrane as stock would have left it."""
        self.compute()
        with tape.paused(), torch.inference_mode(False), torch.enable_grad():
            v: Tensor = _Read.apply(self._place, [self._v])
        tape.mark_opaque(v)
        return v


def _goes(handle: Handle) -> bool:
    """Whether it goes with the backward, as what a stream is undone from, or in place of."""
    return handle.treatment == "reversed" or (isinstance(handle, Kept) and handle.goes)


def behind(handles: tuple[Handle, ...]) -> Iterator[Handle]:
    """These, and what they are rebuilt from."""
    waiting, met = list(handles), set(handles)
    while waiting:
        handle = waiting.pop()
        yield handle
        more = [other for other in handle.relies_on() if other not in met]
        met.update(more)
        waiting += more


class OfFirstStep(FinalMembrane):
    """The membrane after a fresh neuron's first step; ``found_out`` is called when somebody reads it."""

    __slots__ = ("_found_out", "place")

    def __init__(self, found_out: Callable[[], None], run: Callable[..., Tensor], *held: Handle) -> None:
        super().__init__(run, *held)
        self._found_out = found_out
        self.place: Any = None  # of its step, where the next one may go on from there

    def read(self) -> Tensor:
        self._found_out()
        v = super().read()
        if self.place is not None:
            self.place.left(v)
        return v


class LastOfAll(FinalMembrane):
    """The final membrane of a sequence whose membranes of all steps are promised: the last of those."""

    __slots__ = ("_read_all",)

    def __init__(self, read_all: Callable[[], Tensor]) -> None:
        super().__init__(_never)
        self._read_all = read_all

    def compute(self) -> None:
        """It is what those are."""

    def read(self) -> Tensor:
        with tape.paused(), torch.inference_mode(False), torch.enable_grad():
            v = self._read_all()[-1].clone()
        tape.mark_opaque(v)
        return v


def _never(*_: Any) -> Tensor:
    raise AssertionError("it is read from the membranes of all steps")


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _place: Tensor, membrane: list[Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)  # a state that is handed on and that nobody uses has none
        return membrane[0]  # in a list, so that it is an output and no view of an input

    @staticmethod
    def backward(_ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return grad, None


_local = threading.local()


def _promises() -> weakref.WeakSet[FinalMembrane]:
    """Those that this thread made: another thread may be in the middle of the backward that keeps them."""
    promised: weakref.WeakSet[FinalMembrane] | None = getattr(_local, "promised", None)
    if promised is None:
        promised = _local.promised = weakref.WeakSet()
    return promised


def compute_all(*_: Any) -> None:
    """Parameters are about to change: make every membrane known that somebody may still read."""
    for membrane in list(_promises()):
        with suppress(RuntimeError):  # reading it will say so; perhaps nobody does
            if not membrane.settle():
                membrane.compute()


register_optimizer_step_pre_hook(compute_all)


class Memories(dict[str, Any]):
    """The states of a neuron: reading a promise keeps it. Copies and pickles as an ordinary dict."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, FinalMembrane):
            self.goes_unread = False
            self[key] = value = value.read()
        return value

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    # Without one, dict(self) would read what is stored.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def values(self) -> Any:
        self._read()
        return super().values()

    def items(self) -> Any:
        self._read()
        return super().items()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def pop(self, key: str, *default: Any) -> Any:
        self.get(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.get(key)
        return super().setdefault(key, default)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return dict, (self.copy(),)

    goes_unread = False  # whether what was promised last was reset before anybody read it
    stored: FinalMembrane | None = None  # membranes of all steps, of a neuron that has them as an attribute

    def forget(self) -> None:
        """Drop what was promised and not read: the states are about to be reset."""
        self.stored = None
        for key, value in super().items():
            if isinstance(value, FinalMembrane):
                self.goes_unread = True
                super().__setitem__(key, None)

    def _read(self) -> None:
        for key in self:
            self.get(key)


class AmongConstants(Memories):
    """The buffers of a neuron that keeps its states among them (snnTorch's)."""

    def __init__(self, buffers: dict[str, Any]) -> None:
        super().__init__(buffers)
        self._zeros: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def forget(self) -> None:
        """Stock's reset asks what it replaces for its shape; it is given zeros to ask."""
        for key, value in dict.items(self):
            if isinstance(value, FinalMembrane):
                v = value.empty()
                self[key] = value.membrane if v is None else v.zero_()

    @contextmanager
    def made_zero(self) -> Iterator[None]:
        """Context manager: states that are set inside are zeros, for as long as nobody writes to them."""
        before = dict(dict.items(self))
        yield
        for key, value in dict.items(self):
            if isinstance(value, Tensor) and value is not before.get(key):
                self._zeros[key] = weakref.ref(value), value._version

    def is_zero(self, key: str, value: Tensor) -> bool:
        """Whether a state is known to be zero without a look at it."""
        ref, version = self._zeros.get(key, (lambda: None, 0))
        return ref() is value and value._version == version


class ForgettingReset:
    """What makes one stock neuron with promises among its states fresh, until it is called.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> node = neuron.IFNode(step_mode="m")
        >>> promise_among(node, "_memories")
        {'v': 0.0}
        >>> node.reset()
        >>> "reset" in vars(node)
        False
    """

    def __init__(self, module: nn.Module, table: str, method: str, to_zero: bool) -> None:
        self._module, self._table, self._method, self._to_zero = module, table, method, to_zero

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        table = self._module.__dict__[self._table]
        if isinstance(table, Memories):
            table.forget()
        self._module.__dict__.pop(self._method, None)
        known = self._to_zero and isinstance(table, AmongConstants)
        with table.made_zero() if known else nullcontext():
            return getattr(self._module, self._method)(*args, **kwargs)


def promise_among(module: nn.Module, table: str, method: str = "reset", to_zero: bool = False) -> Memories:
    """A module's table of states, ready to take promises.

    Args:
        module: a neuron.
        table: the attribute that the table is; buffers have constants among them.
        method: the module's method that makes it fresh.
        to_zero: the method is known to set states to zero, and to set nothing else.
    """
    states: dict[str, Any] = module.__dict__[table]
    if not isinstance(states, Memories):
        kind = AmongConstants if table == "_buffers" else Memories
        states = module.__dict__[table] = kind(states)
    if hasattr(type(module), method):
        module.__dict__.setdefault(method, ForgettingReset(module, table, method, to_zero))
    return states
