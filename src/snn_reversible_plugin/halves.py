"""A half of a reversible block: one branch, run once without a graph and later again with one.

The one idea: the second run has to be the first one again, to the bit. So what a branch reads besides its
input is written down at the first run and put back for the second: neuron states, random numbers, autocast,
training flags. What the first run wrote, running statistics and states, the second may not write again.

Source: the two runs of ``torch.utils.checkpoint``; states as in design section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from snn_reversible_plugin import tape
from snn_reversible_plugin.adapters import is_spiking
from snn_reversible_plugin.inner_backward import gradients, settle, sharded_parameters
from snn_reversible_plugin.rebuilt import Spikes, observed_spikes

# NOTE [What makes the second run the first one]
#
# 1. A state is what SpikingJelly's `_memories` and the buffers of snnTorch's neurons hold, and any
#    tensor or number among a module's attributes that is another object after the run (a user's
#    `self.v`). Its value at entry is kept; a fresh neuron's is a number and costs nothing.
# 2. States are inputs and outputs of the chain as far as gradients go. Afterwards modules get back what
#    they held when the backward began: the user may have moved on.
# 3. A norm in training writes its running statistics. The second run writes to copies.
# 4. The second run's parameters are aliases: a hook on a parameter must see one gradient a step, and it
#    would fire in the inner backward too.
# 5. Random number generators are set back only for a branch that drew from them.
# 6. The stream's own gradient enters the branch's graph beside the branch's, through an identity made last.
#    It arrives at the branch's input first, as in a plain run, so that three and more terms add up in
#    the same order.

Key = tuple[int, str]
_MISSING = object()
_STATE = (Tensor, int, float, type(None))


class Half:
    """One run of a branch: what it read, and how to run it again."""

    __slots__ = (
        "_autocast", "_changed", "_entry", "_modes", "_rng", "block", "half", "module", "name", "spikes",
        "wanted",
    )  # fmt: skip

    def __init__(self, name: str, block: nn.Module, half: str) -> None:
        self.name, self.block, self.half = name, block, half
        self.module: nn.Module = getattr(block, half)
        self._entry: list[tuple[dict[str, Any], str, Any]] = []
        self._changed: list[tuple[dict[str, Any], str]] = []
        self._rng: list[Tensor] | None = None
        self.wanted: set[Key] = set()  # the entry states that get a gradient
        self.spikes: Spikes = []

    def first(self, x: Tensor, observe: bool = False) -> Tensor:
        """Run without a graph. The caller keeps :meth:`tensors`; ``observe`` keeps the spikes, as bits."""
        before, version, rng = _snapshot(self.module), x._version, _rng_states(x.device)
        self._modes = [module.training for module in self.module.modules()]
        self._autocast = _autocast_settings(x.device)
        # A cast that is cached without a graph would lack it later.
        with _autocast(self._autocast, cache=False), observed_spikes(self.module, observe) as self.spikes:
            out = self.block(x, half=self.half)
        check_output(self.name, out, x, version)
        if not all(map(torch.equal, rng, _rng_states(x.device))):
            self._rng = rng
        changes = _changes(before)
        self._changed = [(table, key) for table, key, _ in _changes(_without_scratch(before))]
        self._entry = changes + _read(before, changes)
        return out  # type: ignore[no-any-return]

    def tensors(self) -> list[Tensor]:
        """The states at entry that are tensors, to be handed to :meth:`again`."""
        found = [value for _, _, value in self._entry if isinstance(value, Tensor)]
        self._entry = [
            (table, key, _MISSING if value is _MISSING else Tensor if isinstance(value, Tensor) else value)
            for table, key, value in self._entry
        ]
        return found

    def exits(self) -> list[tuple[dict[str, Any], str]]:
        """Where the states are that the run left, those that can have a gradient."""
        return [(table, key) for table, key in self._changed if _differentiable(table.get(key))]

    def again(
        self,
        x: Tensor,
        states: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        undo: Callable[[Tensor], None],
        streams: list[Tensor | None],
        g_states: dict[Key, Tensor],
        mode: str = "speed",
        inspect: bool = False,
        observe: bool = False,
    ) -> tuple[Tensor | None, list[Tensor | None], Spikes]:
        """Run again, and backward.

        Args:
            x: the input, equal to the first run's.
            states: what :meth:`tensors` gave.
            parameters: those that get a gradient.
            undo: is given the output to subtract, before the backward, when least else is alive.
            streams: the gradients of the output, and what the input has already from the stream; emptied,
                so that they can go once they are used.
            g_states: gradients of the states; in: at exit, out: at entry.
            mode: of the tape that records the run.
            inspect: look for tensors that get a gradient and are no parameters.
            observe: keep the spikes, as bits.

        Returns:
            The input's whole gradient, the parameters' gradients, the spikes.
        """
        leaf = x.detach()
        managed = sharded_parameters(self.block)
        aliases = {id(p): nn.Parameter(p.detach()) for p in parameters if id(p) not in managed}
        with ExitStack() as stack:
            stack.enter_context(_random(self._rng, x.device))
            entry = stack.enter_context(self._as_it_was(states, aliases))
            outputs, g_outputs = [], []
            with torch.enable_grad(), _autocast(self._autocast), tape.recording(mode):
                leaf.requires_grad_()
                with observed_spikes(self.module, observe) as spikes:
                    value = self.block(leaf, half=self.half)
                identity = leaf.view_as(leaf)
            for table, key in self.exits():
                grad = g_states.pop((id(table), key), None)
                if grad is not None and table[key].requires_grad:
                    outputs.append(table[key])
                    g_outputs.append(grad)
        undo(value.detach())
        for output, grad in ((value, streams[0]), (identity, streams[1])):
            if grad is not None and output.requires_grad:
                outputs.append(output)
                g_outputs.append(grad.to(output.dtype))
        streams.clear()
        if not outputs:
            return None, [None] * len(parameters), spikes
        inputs = [leaf, *aliases.values(), *entry.values()]
        if inspect and not managed:
            self._refuse_strangers(value, inputs)
        del value, identity, output, grad
        grads = gradients(outputs, g_outputs, inputs, accumulate=bool(managed))
        if managed:
            settle(self.block)
        for state, g in zip(entry, grads[1 + len(aliases) :], strict=True):
            if g is not None:  # a state that the branch only reads has a gradient already
                g_states[state] = g_states[state] + g if state in g_states else g
        found = dict(zip(aliases, grads[1:], strict=False))
        return grads[0], [found.get(id(p)) for p in parameters], spikes

    @contextmanager
    def _as_it_was(
        self, states: Sequence[Tensor], aliases: dict[int, nn.Parameter]
    ) -> Iterator[dict[Key, Tensor]]:
        modules = list(self.module.modules())
        now = _snapshot(self.module)
        modes = [module.training for module in modules]
        swapped: list[tuple[dict[str, Any], str, Any]] = []
        entry: dict[Key, Tensor] = {}
        left = iter(states)
        try:
            for table, key, value in self._entry:
                if value is Tensor:
                    value = next(left).detach()
                    if (id(table), key) in self.wanted:
                        entry[id(table), key] = value.requires_grad_()
                _put(table, key, value)
            for module, training in zip(modules, self._modes, strict=True):
                module.training = training
                for key, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in aliases:
                        swapped.append((module._parameters, key, parameter))
                        module._parameters[key] = aliases[id(parameter)]
                if isinstance(module, _NormBase) and training:
                    for key, buffer in module._buffers.items():
                        if buffer is not None:
                            swapped.append((module._buffers, key, buffer))
                            module._buffers[key] = buffer.clone()
            yield entry
        finally:
            for table, key, value in swapped:
                table[key] = value
            for module, training in zip(modules, modes, strict=True):
                module.training = training
            for table, key, value in _changes(now):
                _put(table, key, value)

    def _refuse_strangers(self, value: Tensor, known: Sequence[Tensor]) -> None:
        ids = {id(tensor) for tensor in known}
        seen: set[Any] = set()
        nodes = [value.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and id(variable) not in ids:
                raise RuntimeError(
                    f"{self.name} uses a tensor of shape {tuple(variable.shape)} that requires a gradient "
                    "and is neither its input nor one of its parameters, so the gradient would be lost. "
                    "Register it as a parameter, detach it, or set reversible=False."
                )
            nodes += [following for following, _ in node.next_functions]


def check_output(name: str, out: Any, x: Tensor, version: int) -> None:
    """Refuse what a block can't add to a stream, or what changed the stream."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name} returned {type(out).__name__}; a branch returns one tensor")
    if x._version != version:
        raise RuntimeError(
            f"{name} changed its input in place, and the stream still needs it: make its first operation "
            "out of place (inplace=False), or let it work on a clone."
        )


def reset_states(module: nn.Module) -> None:
    """Make the neurons of both frameworks fresh."""
    for inner in module.modules():
        if isinstance(inner.__dict__.get("_memories"), dict):
            inner.reset()  # type: ignore[operator]
        elif is_spiking(inner):
            for name in ("mem", "syn", "syn_exc", "syn_inh", "spk"):
                if isinstance(state := inner._buffers.get(name), Tensor):
                    inner._buffers[name] = state.new_zeros(())


@contextmanager
def fresh_states(module: nn.Module) -> Iterator[None]:
    """Start the neurons fresh, and leave them fresh: a whole simulation inside."""
    reset_states(module)
    try:
        yield
    finally:
        reset_states(module)


def state_tensors(module: nn.Module) -> list[tuple[Key, Tensor]]:
    """The states, as they are, that have a gradient."""
    return [
        ((id(table), key), value)
        for table, values, _ in _without_scratch(_snapshot(module))
        for key, value in values.items()
        if _differentiable(value) and value.requires_grad
    ]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.is_floating_point()


def _tables(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where states live, and what else does: in scratch there is nothing that the next step reads."""
    for inner in module.modules():
        memories = inner.__dict__.get("_memories")
        spiking = is_spiking(inner)
        yield inner.__dict__, "scratch" if spiking else "attributes"
        if isinstance(memories, dict):
            yield memories, "states"
        if spiking:
            yield inner._buffers, "states"


Snapshot = list[tuple[dict[str, Any], dict[str, Any], str]]


def _snapshot(module: nn.Module) -> Snapshot:
    return [
        (table, {key: value for key, value in table.items() if isinstance(value, _STATE)}, kind)
        for table, kind in _tables(module)
    ]


def _without_scratch(snapshot: Snapshot) -> Snapshot:
    return [part for part in snapshot if part[2] != "scratch"]


def _changes(before: Snapshot) -> list[tuple[dict[str, Any], str, Any]]:
    """What is another object now, with its value then."""
    changed = []
    for table, values, _ in before:
        for key in {**values, **table}:
            then, now = values.get(key, _MISSING), table.get(key, _MISSING)
            if then is not now and (then is not _MISSING or isinstance(now, _STATE)):
                changed.append((table, key, then))
    return changed


def _read(
    before: Snapshot, changes: list[tuple[dict[str, Any], str, Any]]
) -> list[tuple[dict[str, Any], str, Any]]:
    """What may have been read and is still the same: a dropout mask for all time steps, say."""
    changed = {(id(table), key) for table, key, _ in changes}
    return [
        (table, key, value)
        for table, values, kind in before
        for key, value in values.items()
        if (kind == "states" or isinstance(value, Tensor)) and (id(table), key) not in changed
    ]


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    if value is _MISSING:
        table.pop(key, None)
    else:
        table[key] = value


def _rng_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_rng_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def _random(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    if states is None:
        yield
        return
    now = _rng_states(device)
    _set_rng_states(states, device)
    try:
        yield
    finally:
        _set_rng_states(now, device)


def _autocast_settings(device: torch.device) -> list[tuple[str, bool, torch.dtype, bool]]:
    return [
        (
            kind,
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )
        for kind in dict.fromkeys(("cpu", device.type))
    ]


@contextmanager
def _autocast(settings: list[tuple[str, bool, torch.dtype, bool]], cache: bool = True) -> Iterator[None]:
    with ExitStack() as stack:
        for kind, enabled, dtype, cached in settings:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cached and cache))
        yield
