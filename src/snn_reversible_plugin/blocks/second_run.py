"""A branch of a reversible block, run once without a graph and later again with one.

The one idea: the second run has to be the first one again, to the bit. So what a branch reads besides its
input is written down at the first run and put back for the second: neuron states, random numbers, autocast,
training flags. What the first run wrote, running statistics and states, the second may not write again.

Source: the two runs of ``torch.utils.checkpoint``; Zhang and Zhang, AAAI 2024 (arXiv 2312.07922), for the
branches of a reversible spiking block.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.graphs import reads_statistics
from snn_reversible_plugin.blocks.inner_backward import (
    convolved_once,
    gradients,
    settle,
    sharded_modules,
    sharded_parameters,
)
from snn_reversible_plugin.blocks.starts import Start
from snn_reversible_plugin.blocks.undo import Spikes, observed_spikes
from snn_reversible_plugin.modules.as_it_ran import RandomNumbers
from snn_reversible_plugin.modules.kinds import Table, scratch_of
from snn_reversible_plugin.modules.registry import lean_types
from snn_reversible_plugin.modules.states import (
    Change,
    Key,
    Snapshot,
    differentiable,
    put,
    reset_states,
    state_tensors,
    states_of,
)
from snn_reversible_plugin.modules.swap import lent_classes
from snn_reversible_plugin.ops.autocast import Autocast
from snn_reversible_plugin.ops.interrupts import Left, PuttingBack
from snn_reversible_plugin.tape.sliced.cut import step_of
from snn_reversible_plugin.tape.sliced.forward import ConvolutionsInSlices
from snn_reversible_plugin.tape.sliced.later import Computed, waiting

# NOTE [What makes the second run the first one]
#
# 1. A state (modules/states.py) is kept as it was at entry; a fresh neuron's is a number, or zeros that are
#    made again, and costs nothing. What a step writes before it reads it is neither kept nor left.
# 2. States are inputs and outputs of the chain as far as gradients go. Afterwards modules get back what
#    they held when the backward began: the user may have moved on.
# 3. A norm in training writes its running statistics. The second run writes to copies: of what they are by
#    now, or, where a class of the user's names them (a padding that is a norm's zero), of what they were.
# 4. The second run's parameters are aliases: a hook on a parameter must see one gradient a step, and it
#    would fire in the inner backward too.
# 5. Random number generators are set back only for a branch that drew from them.
# 6. The stream's own gradient enters the branch's graph beside the branch's, through an identity made last.
#    It arrives at the branch's input first, as in a plain run, so that three and more terms add up in
#    the same order.
# 7. A tape takes Python for each operation, and saves what lies between the layers of a branch. A branch
#    that is one layer of a small stream runs without.
# 8. Stock neurons run as their reversible types that have an analytic backward, with the same bits: a
#    graph of their operations, one by one, is larger and slower.


SMALL = 1 << 18  # bytes


@dataclass(frozen=True)
class How:
    """How the branches of a chain run.

    Attributes:
        mode: of the tape that records the second runs.
        observe: keep the spikes of both runs, as bits.
        inspect: in the second run, look for tensors that get a gradient and are no parameters.
    """

    mode: str = "speed"
    observe: bool = False
    inspect: bool = False


class BranchRun:
    """One run of a branch: what it read, and how to run it again.

    Args:
        name: what errors call it.
        block: the module that is called; its hooks may gather parameters.
        branch: the attribute of the block that the branch is, and the argument by which the block is told
            to run it; None: the block itself is the branch.
        how: how the branches of the chain run.
    """

    __slots__ = (
        "_autocast", "_block", "_branch", "_changed", "_entry", "_how", "_lean", "_modes", "_module",
        "_modules", "_random", "_readable", "_scratch", "_sharded", "_statistics", "awaited",
        "forgets", "may_wait", "name", "spikes", "wanted",
    )  # fmt: skip

    def __init__(self, name: str, block: nn.Module, branch: str | None, how: How) -> None:
        self.name, self._block, self._branch, self._how = name, block, branch, how
        self._module = block if branch is None else getattr(block, branch)
        self._modules = list(self._module.modules())
        self._lean = lean_types(self._modules)
        self._sharded = bool(sharded_modules(block))
        readers = (one for one in self._modules if reads_statistics(type(one)))  # type: ignore[arg-type]
        self._readable = {
            norm for module in readers for norm in module.modules() if isinstance(norm, _NormBase)
        }
        self._scratch = [(module.__dict__, key) for module in self._modules for key in scratch_of(module)]
        self._statistics: dict[Key, Tensor] = {}  # of these, at entry
        self._entry: list[Change] = []
        self._changed: list[tuple[Table, str]] = []
        self._random: RandomNumbers | None = None
        self.wanted: set[Key] = set()  # the entry states that get a gradient
        self.awaited: Callable[[Key, Tensor], None] | None = None  # is told of each state at exit
        self.forgets = False  # nobody reads the states that it leaves
        self.spikes: Spikes = []  # of the first run
        self.may_wait: set[int] = set()  # ids of the weights whose gradients may be computed later

    def first(self, *inputs: Tensor) -> Tensor:
        """Run without a graph. The caller keeps :meth:`tensors`."""
        tape.takes(math.inf, self._lives())
        self._drop_scratch()
        before, random = Snapshot(self._modules), RandomNumbers(x.device for x in inputs)
        versions = [x._version for x in inputs]
        self._statistics = {
            (id(norm._buffers), key): buffer.clone()
            for norm in self._readable
            if norm.training
            for key, buffer in norm._buffers.items()
            if buffer is not None
        }
        self._modes = [module.training for module in self._modules]
        self._autocast = Autocast(inputs[0].device.type)
        with self._observed() as self.spikes, self._unrecorded():
            out = self._call(inputs, cache=False)
        check_output(self.name, out, inputs, versions)
        if not random.unused():
            self._random = random
        self._drop_scratch()
        changes, scratch = before.changes()
        self._changed = [(table, key) for table, key, _ in changes]
        states = [(table, key, self._start(table, key, then)) for table, key, then in changes]
        self._entry = states + scratch
        self._entry += before.read(self._entry)
        return out  # type: ignore[no-any-return]

    def _drop_scratch(self) -> None:
        for table, key in self._scratch:
            table.pop(key, None)

    def _start(self, table: Table, key: str, value: Any) -> Any:
        if (id(table), key) in self.wanted:
            return value
        return Start.of(table, key, value) or value

    def _call(self, inputs: Sequence[Tensor], *, cache: bool = True) -> Any:
        # A cast that is cached without a graph would lack it later.
        named = {} if self._branch is None else {"branch": self._branch}
        with self._autocast.again(cache=cache), lent_classes(self._lean):
            return self._block(*inputs, **named)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The branch's parameters, as they are now."""
        for module in self._modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    yield parameter

    def _lives(self) -> Iterator[Tensor]:
        yield from self.parameters()
        for module in self._modules:
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)

    def _recording(self, inputs: Sequence[Tensor]) -> Any:
        layers = sum(any(p.dim() > 1 for p in module._parameters.values() if p is not None)
                     for module in self._modules)  # fmt: skip
        small = sum(x.numel() * x.element_size() for x in inputs) <= SMALL
        recording = tape.recording(self._how.mode, forgets_states=self.forgets)
        return nullcontext() if small and layers <= 1 else recording

    def _unrecorded(self) -> Any:
        return ConvolutionsInSlices(step_of) if self._how.mode == "minimal" else nullcontext()

    def _observed(self) -> Any:
        return observed_spikes(self._modules) if self._how.observe else nullcontext([])

    def tensors(self) -> list[Tensor]:
        """The states at entry that are tensors, to be handed to :meth:`again`."""
        found = [value for _, _, value in self._entry if isinstance(value, Tensor)]
        self._entry = [
            (table, key, Tensor if isinstance(value, Tensor) else value)
            for table, key, value in self._entry
        ]
        return found

    def exits(self) -> list[tuple[Table, str]]:
        """Where the states are that the run left, those that can have a gradient."""
        return [(table, key) for table, key in self._changed if differentiable(table.get(key))]

    def tables(self) -> set[int]:
        """The ids of the tables that the branch's modules keep states in."""
        tables = map(states_of, self._modules)
        return {id(table) for table in tables if table is not None}

    def forget_states(self) -> None:
        """Make the neurons fresh: nobody reads what the run left."""
        reset_states(self._module)

    def starts(self) -> list[Change]:
        """Those of the states that the run left which were no tensors before it, and what they were."""
        changed = {(id(table), key) for table, key in self._changed}
        return [
            (table, key, value)
            for table, key, value in self._entry
            if value is not Tensor and not isinstance(value, Tensor) and (id(table), key) in changed
        ]

    def without_graph(self, inputs: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
        """Run again as the first time, for the output and the states at exit."""
        random = nullcontext() if self._random is None else self._random.again()
        with random, self._as_it_was(states, {}), self._unrecorded():
            out = self._call(inputs, cache=False)
            self._tell()
        return out  # type: ignore[no-any-return]

    def _tell(self) -> None:
        if self.awaited is not None:
            for table, key in self.exits():
                self.awaited((id(table), key), table[key].detach())

    def again(
        self,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        undo: Callable[[Tensor], None],
        streams: list[Tensor | None],
        g_states: dict[Key, Tensor],
    ) -> tuple[list[Tensor | None], list[Tensor | Computed | None], Spikes]:
        """Run again, and backward.

        Args:
            inputs: leaves, equal to the first run's inputs; those that require a gradient get one.
            states: what :meth:`tensors` gave.
            parameters: those that get a gradient.
            undo: is given the output to subtract, before the backward, when least else is alive.
            streams: the gradient of the output, and for each input what it has already from elsewhere;
                emptied, so that they can go once they are used.
            g_states: gradients of the states; in: at exit, out: at entry.

        Returns:
            The inputs' whole gradients, the parameters' gradients or how to compute them, the spikes.
        """
        managed = sharded_parameters(self._block) if self._sharded else set()
        aliases = {id(p): nn.Parameter(p.detach()) for p in parameters if id(p) not in managed}
        random = nullcontext() if self._random is None else self._random.again()
        with random, self._as_it_was(states, aliases) as entry:
            outputs, g_outputs = [], []
            with torch.enable_grad(), self._recording(inputs):
                with self._observed() as spikes:
                    value = self._call(inputs)
                identities = [x.view_as(x) for x in inputs]
            self._tell()
            for table, key in () if self.forgets else self.exits():
                grad = g_states.pop((id(table), key), None)
                if grad is not None and table[key].requires_grad:
                    outputs.append(table[key])
                    g_outputs.append(grad)
        undo(value.detach())
        for output, grad in zip((value, *identities), streams, strict=True):
            if grad is not None and output.requires_grad:
                outputs.append(output)
                g_outputs.append(grad.to(output.dtype))
        streams.clear()
        if not outputs:
            return [None] * len(inputs), [None] * len(parameters), spikes
        sought = [*(x for x in inputs if x.requires_grad), *aliases.values(), *entry.values()]
        if self._how.inspect and not managed:
            self._refuse_strangers(value, sought)
        del value, identities, output, grad
        addresses = convolved_once(outputs, aliases, self.may_wait)
        with waiting(set(addresses.values())) as later:
            grads = iter(gradients(outputs, g_outputs, sought, accumulate=bool(managed)))
        if managed:
            settle(self._block)
        g_inputs = [next(grads) if x.requires_grad else None for x in inputs]
        found: dict[int, Tensor | Computed | None] = {}
        for of in aliases:
            g = next(grads)
            found[of] = later.get(addresses.get(of, 0), g)
        for state, g in zip(entry, grads, strict=True):
            if g is not None:  # a state that the branch only reads has a gradient already
                g_states[state] = g_states[state] + g if state in g_states else g
        return g_inputs, [found.get(id(p)) for p in parameters], spikes

    @contextmanager
    def _as_it_was(
        self, states: Sequence[Tensor], aliases: dict[int, nn.Parameter]
    ) -> Iterator[dict[Key, Tensor]]:
        now, modes = Snapshot(self._modules), [module.training for module in self._modules]
        swapped: list[tuple[Table, str, Any]] = []
        entry: dict[Key, Tensor] = {}
        left = iter(states)

        def put_back(how: Left) -> None:
            for table, key, value in swapped:
                table[key] = value
            self._train(modes)
            # A while later states may be the user's own; those of the run still have its graph.
            if how is not Left.UNSEEN or state_tensors(self._block):
                now.put_back()

        with PuttingBack(put_back):
            for table, key, value in self._entry:
                if isinstance(value, Start):
                    value = value.make()
                elif value is Tensor:
                    value = next(left).detach()
                    if (id(table), key) in self.wanted:
                        entry[id(table), key] = value.requires_grad_()
                put(table, key, value)
            self._train(self._modes)
            for module, training in zip(self._modules, self._modes, strict=True):
                for key, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in aliases:
                        swapped.append((module._parameters, key, parameter))
                        module._parameters[key] = aliases[id(parameter)]
                if isinstance(module, _NormBase) and training:
                    for key, buffer in module._buffers.items():
                        if buffer is not None:
                            swapped.append((module._buffers, key, buffer))
                            known = self._statistics.get((id(module._buffers), key), buffer)
                            module._buffers[key] = known.clone()
            yield entry

    def _train(self, modes: list[bool]) -> None:
        for module, training in zip(self._modules, modes, strict=True):
            if module.training is not training:
                module.training = training

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


def shared_tables(branches: Iterable[BranchRun]) -> set[int]:
    """The ids of the tables that several of the branches keep states in."""
    users = Counter(table for branch in branches for table in branch.tables())
    return {table for table, count in users.items() if count > 1}


def shared_parameters(branches: Iterable[BranchRun]) -> set[int]:
    """The ids of the parameters that several of the branches have."""
    users = Counter(found for branch in branches for found in set(map(id, branch.parameters())))
    return {found for found, count in users.items() if count > 1}


def check_output(name: str, out: Any, inputs: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Refuse what a block can't add to a stream, or what changed the stream."""
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{name} returned {type(out).__name__}, and a branch returns one tensor: hand on one of "
            "several, or leave the block out of the chain"
        )
    if [x._version for x in inputs] != [*versions]:
        raise RuntimeError(
            f"{name} changed its input in place, and the stream still needs it: make its first operation "
            "out of place (inplace=False), or let it work on a clone."
        )
