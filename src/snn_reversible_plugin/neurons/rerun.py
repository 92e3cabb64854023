"""Running a neuron's forward again in the backward, as a black box.

The one idea: stock's forward builds stock's graph, so gradients, their order of summation, and every
learnable tensor the forward touches are stock's by construction; but instead of the tensors that the
graph would save, it holds numbers into a list which is made when first asked for, by running the same
forward once more. Nothing has to be known of the neuron, except that it does the same thing twice.

Source: ``torch.utils.checkpoint`` (``use_reentrant=False``). This is that mechanism for a module with
state: it runs again on a copy of the module as it was, and hands inputs and states to the tape.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from snn_reversible_plugin import tape
from snn_reversible_plugin.modules.as_it_ran import RandomNumbers
from snn_reversible_plugin.modules.kinds import RECORDS
from snn_reversible_plugin.modules.states import states_of
from snn_reversible_plugin.ops.autocast import Autocast
from snn_reversible_plugin.ops.batched import one_by_one

# NOTE [What a second run may rely on]
#
# 1. Inputs and states are saved through autograd, so the tape stores them its way, and a later change
#    in place is refused. Parameters, buffers and other tensors of the module are held by reference
#    with their version, and refused likewise.
# 2. Settings, also those of submodules, are those of the first run: it works on a shadow, an instance
#    with copies of the attribute tables, taken before the first run. What the second run assigns goes
#    to a shadow too, so counters don't count twice.
# 3. Random numbers and autocast are as in the first run.
# 4. A forward that changed a tensor of 1. in place can't be run again: `careful` keeps what autograd
#    saved until the first run is over, and for good if that happened.
# 5. Double backward works as in stock: the unpacked tensors are leaves of nothing, autograd puts
#    them back into their place in the graph.


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward refuse ``create_graph=True``, where its results would silently be constants.

    Of a batch of gradients it gets one at a time (:func:`~.ops.batched.one_by_one`).
    """
    backward = one_by_one(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward (create_graph=True) through a reversible neuron is not supported: its "
                "backward rebuilds values, not their graph. Run that part under "
                "snn_reversible_plugin.stock(model)."
            )
        return backward(ctx, *grads)

    return checked


class _Saver(torch.autograd.Function):
    """A node that does nothing but save its inputs, through whatever hooks are active."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *_grads: Any) -> Any:
        raise AssertionError("nothing depends on this node")


class _Slot:
    """Stands for a saved tensor among the arguments and states of a run."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Rerun:
    """One forward of a module, and the means to run it again."""

    def __init__(
        self,
        module: nn.Module,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        careful: bool,
    ) -> None:
        self.call, self.name = call, type(module).__name__
        self.tensors: list[Tensor] = []
        self.shadow = shadow(module)
        states = states_of(self.shadow) or {}
        for key, value in states.items():
            states[key] = self._slotted(value)
        self.args = tuple(self._slotted(arg) for arg in args)
        self.kwargs = {key: self._slotted(arg) for key, arg in kwargs.items()}
        anchor = torch.empty(0, requires_grad=True)
        # The tensor, not its node: in torch 2.6 a node is cleared when its output dies.
        self.saver = _Saver.apply(anchor, *self.tensors)
        self.held = [(tensor, tensor._version) for tensor in _tensors_of(module)]
        self.autocast = Autocast()
        self.count = 0
        self.kept: list[tuple[Tensor, int]] | None = [] if careful else None
        self.values: list[Tensor | None] | None = None
        self.random = RandomNumbers(tensor.device for tensor in self.tensors) if careful else None

    def _slotted(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self.tensors.append(value)
        return _Slot(len(self.tensors) - 1)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first run, on the module itself."""
        inputs = [(tensor, tensor._version) for tensor in self.tensors]
        with tape.paused(), saved_tensors_hooks(self._pack, self._unpack):
            out = self.call(module, *args, **kwargs)
        if self.kept is not None and not _changed((*inputs, *self.held)):
            self.kept = None
        if self.random is not None and self.random.unused():
            self.random = None
        self.tensors = []
        return out

    def _pack(self, tensor: Tensor) -> int:
        self.count += 1
        tape.takes(tensor.nbytes)
        if self.kept is not None:
            # Detached, because an output of the node that saves it would tie a cycle.
            self.kept.append((tensor.detach(), tensor._version))
        return self.count - 1

    def _unpack(self, index: int) -> Tensor:
        if self.kept is not None:
            tensor, version = self.kept[index]
            if tensor._version != version:
                self._refuse_change(tensor)
            return tensor
        if self.values is None or self.values[index] is None:
            self.values = self._second_run()
        value, self.values[index] = self.values[index], None
        assert value is not None
        return value

    def _second_run(self) -> list[Tensor | None]:
        for tensor in _changed(self.held):
            self._refuse_change(tensor)
        with torch.no_grad():
            saved = [t.detach().requires_grad_(t.requires_grad) for t in self.saver.grad_fn.saved_tensors]

        def unslotted(value: Any) -> Any:
            return saved[value.index] if isinstance(value, _Slot) else value

        module = shadow(self.shadow)
        states = states_of(module) or {}
        for key, value in states.items():
            states[key] = unslotted(value)
        values: list[Tensor | None] = []

        def pack(tensor: Tensor) -> None:
            values.append(tensor.detach())

        random = nullcontext() if self.random is None else self.random.again()
        with (
            tape.paused(),
            random,
            torch.enable_grad(),
            self.autocast.again(),
            saved_tensors_hooks(pack, _no_second_backward),
        ):
            args = [unslotted(arg) for arg in self.args]
            self.call(module, *args, **{key: unslotted(arg) for key, arg in self.kwargs.items()})
        if len(values) != self.count:
            raise RuntimeError(
                f"{self.name}: its forward saved {self.count} tensors for the backward, and "
                f"{len(values)} when it was run again. It is not deterministic, or requires_grad of a "
                "parameter was changed in between; leave the module out with skip=."
            )
        return values

    def _refuse_change(self, tensor: Tensor) -> None:
        raise RuntimeError(
            f"{self.name}: a tensor of shape {tuple(tensor.shape)} ({tensor.dtype}) that its backward "
            "needs was modified by an inplace operation after the forward. Call backward before "
            "changing parameters or buffers, or change a clone."
        )


def _no_second_backward(_packed: Any) -> Tensor:
    raise AssertionError("this graph is only built, never run")


def shadow(module: nn.Module, **instead: Any) -> nn.Module:
    """An instance with the module's attributes and tensors, but attribute tables of its own.

    ``instead``: attributes that it has in place of the module's, which are not read.
    """
    twin: nn.Module = object.__new__(type(module))
    attributes = {**module.__dict__, **instead}
    for key, value in attributes.items():
        if isinstance(value, (dict, list, set)):
            attributes[key] = copy.copy(value)
    # No step reads them, and they would be held.
    for record in RECORDS:
        if attributes.get(record) is not None:
            attributes[record] = None
    object.__setattr__(twin, "__dict__", attributes)
    tables: tuple[dict[str, Any], ...] = (states_of(twin) or {}, twin._modules)
    for table in tables:
        for key, value in table.items():
            if isinstance(value, nn.Module):
                table[key] = shadow(value)
            elif isinstance(value, (dict, list, set)):
                table[key] = copy.copy(value)
    return twin


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Tensors that a forward can reach from the module, states and records apart."""
    for inner in module.modules():
        for table in (inner._parameters, inner._buffers, inner.__dict__):
            for key, value in table.items():
                if isinstance(value, Tensor) and key not in RECORDS:
                    yield value


def _changed(versions: Any) -> list[Tensor]:
    return [tensor for tensor, version in versions if tensor._version != version]
