"""States that a user's modules leave behind (``self.mem``), let go of when a call of the model is over.

The one idea: what a module's attribute holds lives anyway, and of a network of a user's own it is most
of what a training step holds beside its bits. Where nobody else has the tensor and the tape can compute it
from less, its memory goes and the tensor itself, with its place in the graph, stays with a promise.
Whoever reads the attribute finds it, filled.

Source: this package's own; what is done for a known neuron's table of states, for attributes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.kinds import framework_of
from snn_reversible_plugin.modules.swap import SwappedClass, parts_of, swap, swapped_class
from snn_reversible_plugin.ops.layouts import is_dense, is_plain
from snn_reversible_plugin.tape.final_membrane import FinalMembrane, behind, promise_among
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.origins import forget, look_up
from snn_reversible_plugin.tape.replayed import PLAIN, Replayed

# NOTE [What is let go of]
#
# 1. A tensor that one table of one module holds and nothing else, in Python or below: counted by references
#    to it and to its storage. A view, a numpy array, a list of the user's, an anchor of the tape: it stays.
# 2. If what it is computed from is smaller, with copies of the parameters and inputs among it.
# 3. When a backward ends, those copies are made (`settle`): weights and inputs are about to change. Where
#    no backward comes, an optimizer's step finds it among the promises.
# 4. Of a module that somebody reads nothing more is let go: it takes its steps in several calls, or a
#    script looks at it.
# 5. What stays, and comes from a state that was cut from its history, is as good a start as that one, and
#    lives anyway: its recipe would hold the state before, and a product, beyond the backward of its step.
# 6. A name that is set anew is in the table again, and its promise counts for nothing.

LEAST = 1024  # elements
_read: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class LeftState(FinalMembrane):
    """The promise of a tensor that a module left: the tensor itself, without its memory till it is read."""

    __slots__ = ("_found_out", "_tensor")

    def __init__(self, tensor: Tensor, handle: Handle, found_out: Any) -> None:
        super().__init__(_itself, handle)
        self._tensor, self._found_out = tensor, found_out
        self.promise(tensor)

    def let_go(self) -> bool:
        """Let the memory go, where what it is computed from is smaller; whether it is."""
        tensor = self._tensor
        seen: set[int] = set()
        size = 0
        for handle in behind(self.held):
            # A product's result that a plan keeps stands to its turn in the backward, promise or not.
            size += 0 if isinstance(handle, Replayed) else handle.stored(seen)
            if handle.treatment == "reversed" or size >= tensor.nbytes:
                return False
        tensor.untyped_storage().resize_(0)
        return True

    def keep(self, v: Tensor) -> None:
        tensor = self._tensor
        storage = tensor.untyped_storage()
        storage.resize_(tensor.nbytes)
        # Through an alias with a version counter of its own: the value is the one that it had.
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.set_(storage, 0, tensor.shape, tensor.stride()).copy_(v)  # type: ignore[call-overload]
        super().keep(tensor)

    def read(self) -> Tensor:
        self._found_out()
        return self.found()

    def found(self) -> Tensor:
        """The tensor, for somebody who is no reader of the user's."""
        self.compute()
        return self._tensor


def _itself(value: Tensor) -> Tensor:
    return value


class LeftStates(dict[str, Any]):
    """A module's attributes, some of them promised. Copies and pickles as an ordinary dict.

    What looks at all of them finds them all.
    """

    def __init__(self, attributes: dict[str, Any]) -> None:
        super().__init__(attributes)
        self.promised: dict[str, LeftState] = {}

    def find(self, key: Any, read: bool = True) -> None:
        """Put what was promised by this name into its place."""
        promise = self.promised.get(key)
        if promise is None:
            return
        if not super().__contains__(key):
            self[key] = promise.read() if read else promise.found()
        self.promised.pop(key, None)

    def find_all(self) -> None:
        """Put all that was promised into its place, as it was before."""
        for key in list(self.promised):
            self.find(key, read=False)

    def __getitem__(self, key: str) -> Any:
        if key in self.promised:
            self.find(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key in self.promised:
            self.find(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.promised

    def __iter__(self) -> Iterator[str]:
        self.find_all()
        return super().__iter__()

    def __len__(self) -> int:
        self.find_all()
        return super().__len__()

    def keys(self) -> Any:
        self.find_all()
        return super().keys()

    def values(self) -> Any:
        self.find_all()
        return super().values()

    def items(self) -> Any:
        self.find_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def pop(self, key: str, *default: Any) -> Any:
        self.find(key)
        return super().pop(key, *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self.find(key)
        return super().setdefault(key, default)

    def __delitem__(self, key: str) -> None:
        self.find(key)
        super().__delitem__(key)

    def __eq__(self, other: object) -> bool:
        return self.copy() == other

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return dict, (self.copy(),)

    __hash__ = None  # type: ignore[assignment]


class Leaving(SwappedClass):
    """In front of a class whose instance has left promises among its attributes."""

    def __getattr__(self, name: str) -> Any:
        table = vars(self)
        if isinstance(table, LeftStates) and name in table.promised:
            table.find(name)
            return dict.__getitem__(table, name)
        return super().__getattr__(name)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        put_back(self)  # type: ignore[arg-type]
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        put_back(self)  # type: ignore[arg-type]
        return super().__reduce_ex__(protocol)


def put_back(module: nn.Module) -> None:
    """Make a module's attributes the ordinary dict again that they were."""
    table = vars(module)
    if isinstance(table, LeftStates):
        module.__dict__ = table.copy()


def let_go(model: nn.Module, result: Any) -> Any:
    """A call of a model is over: let go of what its modules left. Returns ``result``, what it gave."""
    inside = tape.current() is not None or torch._C._current_graph_task_id() != -1
    if inside or not tape.may_record():
        return result
    left = [promise for module in model.modules() for promise in _of(module)]
    if left:
        _settle_after_backward(result, left)
    return result


def _of(module: nn.Module) -> list[LeftState]:
    cls = type(module)
    if cls.__module__.startswith("torch.") or isinstance(module, torch.jit.ScriptModule):
        return []
    table = vars(module)
    if isinstance(table, LeftStates):
        for name in [name for name in table.promised if dict.__contains__(table, name)]:
            del table.promised[name]
        if not table.promised:
            put_back(module)
            table = vars(module)
    found = []
    framework = framework_of(module)
    states = None if framework is None else framework.states_of(module)
    if states is not None and framework is not None and states is not module._buffers:
        for name, promise in _promised(module, states):
            promise_among(module, framework.states_in, framework.reset_by)[name] = promise
            found.append(promise)
    for name, promise in _promised(module, table):
        if not (parts := parts_of(type(module))) or parts.mixin is not Leaving:
            try:
                swap(module, swapped_class(Leaving, type(module)))
            except TypeError:  # its class can't be derived from
                promise.compute()
                break
        attributes = vars(module)
        if not isinstance(attributes, LeftStates):
            attributes = module.__dict__ = LeftStates(attributes)
        dict.__delitem__(attributes, name)
        attributes.promised[name] = promise
        found.append(promise)
    return found


def _promised(module: nn.Module, table: dict[str, Any]) -> list[tuple[str, LeftState]]:
    """Promises of those tensors in a table that can be let go of, whose memory is gone."""
    found = []
    known = _read.get(module, ())
    # By class: only a plain tensor can be let go of, and this is asked of each attribute of each module.
    for name in [name for name, value in dict.items(table) if value.__class__ is Tensor]:
        tensor = dict.__getitem__(table, name)
        if sys.getrefcount(tensor) > 3 or not _is_alone(tensor):  # the table, this name, the argument
            continue
        handle = look_up(tensor)
        if handle.__class__ not in PLAIN:
            continue
        if name not in known:
            promise = LeftState(tensor, handle, _Reader(module, name))
            if promise.let_go():
                found.append((name, promise))
                continue
        if any(isinstance(one, Kept) and one.ended for one in behind((handle,))):
            forget(tensor)
    return found


class _Reader:
    """Called when somebody has read a state."""

    __slots__ = ("_module", "_name")

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = weakref.ref(module), name

    def __call__(self) -> None:
        module = self._module()
        if module is not None:
            _read.setdefault(module, set()).add(self._name)


def _is_alone(tensor: Tensor) -> bool:
    """Whether a tensor is all of its storage, and nothing else has either."""
    if type(tensor) is not Tensor or not is_plain(tensor) or tensor._base is not None:
        return False
    if tensor.numel() < LEAST or not is_dense(tensor) or tensor.storage_offset() or tensor.is_inference():
        return False
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or not storage.resizable():
        return False
    # The tensor and this wrapper have the storage; Python's object has the tensor.
    return torch._C._storage_Use_Count(storage._cdata) <= 2 and tensor._use_count() <= 1  # type: ignore[attr-defined]


def _settle_after_backward(result: Any, left: Iterable[LeftState]) -> None:
    refs = [weakref.ref(promise) for promise in left]

    def settle() -> None:
        for ref in refs:
            promise = ref()
            if promise is not None and not promise.settle():
                with suppress(RuntimeError):  # reading it will say so; perhaps nobody does
                    promise.compute()

    def begins(_grads: Any) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(settle)  # type: ignore[attr-defined]

    for tensor in torch.utils._pytree.tree_leaves(result):
        if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(begins)
