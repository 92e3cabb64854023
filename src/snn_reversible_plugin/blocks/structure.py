"""Residual blocks known by what they compute: the graph of a forward, taken apart into sums with its input.

The one idea: a block's forward is traced with its parts as they are called, on a replica without values, so
nothing runs and nothing is touched. Where its result is a sum of its input and something computed from the
input alone, that something is a branch, whatever the block and its parts are called.

Source: ``torch.fx``, Reed et al., MLSys 2022; the blocks that it was written for are those of SEW-, MS- and
PreAct-ResNets, Spikformer, Spikingformer, QKFormer and the Spike-driven Transformers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from snn_reversible_plugin.blocks.beside import Beside, beside_in
from snn_reversible_plugin.blocks.graphs import Tracer, TracerOfCalls, graph_of, is_of_a_user
from snn_reversible_plugin.modules.kinds import is_spiking
from snn_reversible_plugin.modules.registry import StaysStock

# NOTE [Sums in a graph]
#
# 1. A *stream* is the input, or the sum of a stream and a branch. A branch of a stream is computed from it
#    alone: whatever way leads back from the branch to the input goes through that stream. So in
#    y = x + a(x); return y + b(y), y is a stream with the branch b, and x one with the branch a; in
#    return x + a(x) + b(x) the second sum has no branch, as b is computed from x and not from x + a(x).
# 2. A stream's shape, dtype and device are those of the input, so that T, B, C, H, W = x.shape above the
#    first sum may be read in the second branch: there it is read off the branch's own input.
# 3. The parts that the forward calls are leaves at first. Where no sum is found, parts that are the user's
#    own are opened too: Spike-driven Transformers add the shortcut inside their attention.
# 4. Both modes are traced: a forward that goes another way in evaluation stays stock. What a forward reads
#    of the block (a connect function, a factor) is fixed by tracing it.
# 5. A graph knows what is computed from what, and not what is changed on the way. So a forward that sets an
#    attribute, writes into what it goes on using, reads a buffer, resets a neuron or turns gradients off
#    for a part of it stays stock.
# 6. A neuron behind the sum, sn(x + b(x)), forgets it. The branch fires instead: x + sn(b(x)).
# 7. A block may give a tuple, its sum first: the Spike-driven Transformers hand an attention map and a
#    dictionary on. The branches are those of the sum; what is beside it nobody computes in a chain, so
#    who looks at it gets an error (`beside`).

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_WRITE = (operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem)
_OF_THE_SHAPE = ("shape", "dtype", "device", "ndim", "size", "dim", "numel")
_SIGNS = {
    operator.add: "+", operator.iadd: "+", torch.add: "+", operator.sub: "-", operator.mul: "*",
    operator.imul: "*", torch.mul: "*", operator.matmul: "@", torch.matmul: "@", operator.truediv: "/",
}  # fmt: skip
_LONGEST = 160  # characters of an expression in a report


class Sums(NamedTuple):
    """The branches of a block in order, what it computes as text, and whether a neuron follows the sum.

    ``touched``: names of the parts and parameters that the forward has anything to do with; ``beside``:
    what stands beside the sum where a tuple is given.
    """

    branches: list[fx.GraphModule]
    expression: str
    fires_after: bool
    touched: frozenset[str]
    beside: Beside = None


class _Unfit(Exception):
    """A block has a sum that is no residual one, and why."""


def sums_of(block: nn.Module) -> Sums | None:
    """The residual sums that a block computes, by the graph of its forward; None where it has none.

    Raises:
        StaysStock: it adds to its input in a way that can't be undone, or not in evaluation.

    Example:
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     __module__ = "my_blocks"
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(4, 4, 3, padding=1)
        ...     def forward(self, x):
        ...         return x + self.conv(x)
        >>> sums_of(Block()).expression
        'x + conv(x)'
    """
    if not is_of_a_user(block) or not any(True for _ in block.children()):
        return None
    unfit: str | None = None
    for opens in (False, True):
        graphs = [graph_of(block, training, Tracer(opens)) for training in (True, False)]
        if graphs[0] is None:
            continue
        try:
            found = _taken_apart(block, graphs[0])
        except _Unfit as why:
            unfit = unfit or str(why)
            continue
        if found is None:
            continue
        if graphs[1] is None or _text(graphs[0]) != _text(graphs[1]):
            raise StaysStock("it computes otherwise in evaluation than in training")
        return found
    if unfit is not None:
        raise StaysStock(unfit)
    return None


def calls_in_a_row(owner: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether a forward calls all modules of a list in order, each with the output of the one before.

    Of tuples the first is that output, and nobody takes what else is computed.
    """
    graph = graph_of(owner, True, TracerOfCalls(opens=False))
    names = {name for name, module in owner.named_modules() if any(module is block for block in blocks)}
    if graph is None or len(names) != len(blocks):
        return False
    order = [next(name for name in names if owner.get_submodule(name) is block) for block in blocks]
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target in names]
    if not calls or [node.target for node in calls] != order * (len(calls) // len(order)):
        return False
    tuples = _Tuples(owner)
    for index, node in enumerate(calls):
        if len(node.args) != 1 or not all(map(tuples.is_none, node.kwargs.values())):
            return False
        total = tuples.first_of(node)
        beside = [] if total is node else [user for user in node.users if user is not total and user.users]
        if not all(map(tuples.is_none, beside)):
            return False
        if index % len(order):
            before = tuples.first_of(calls[index - 1])
            users = [user for user in before.users if not _reads_the_shape(user)]
            if node.args[0] is not before or users != [node]:
                return False
    return True


def _is_entry(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[1], int)


class _Tuples:
    """In a graph of calls, the tuples that parts give, by the parts' own graphs."""

    def __init__(self, owner: nn.Module) -> None:
        self._owner = owner
        self._given: dict[str, Any] = {}
        self._none: dict[fx.Node, bool] = {}

    def first_of(self, call: fx.Node) -> fx.Node:
        """What a part gives, or the first of its tuple."""
        firsts = [user for user in call.users if _is_entry(user) and user.args[1] == 0]
        # Of a tensor the first entry is a row.
        is_tuple = (
            len(firsts) == 1 and all(map(_is_entry, call.users)) and isinstance(self._of(call), tuple)
        )
        return firsts[0] if is_tuple else call

    def is_none(self, value: Any) -> bool:
        """Whether a value is None: what a part hands on that is given None itself."""
        if not isinstance(value, fx.Node):
            return value is None
        if value not in self._none:
            self._none[value] = _is_entry(value) and self._gives_none(*value.args)  # type: ignore[arg-type]
        return self._none[value]

    def _gives_none(self, call: fx.Node, at: int) -> bool:
        if (
            call.op != "call_module"
            or len(call.args) != 1
            or not all(map(self.is_none, call.kwargs.values()))
        ):
            return False
        given = self._of(call)
        return isinstance(given, tuple) and -len(given) <= at < len(given) and given[at] is None

    def _of(self, call: fx.Node) -> Any:
        name = str(call.target)
        if name not in self._given:
            graph = graph_of(self._owner.get_submodule(name), True, TracerOfCalls(opens=True))
            output = None if graph is None else next(node for node in graph.nodes if node.op == "output")
            self._given[name] = None if output is None else output.args[0]
        return self._given[name]


# -- sums --------------------------------------------------------------------------------------------------


def _taken_apart(block: nn.Module, graph: fx.Graph) -> Sums | None:
    given = next(node for node in graph.nodes if node.op == "placeholder")
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    beside = None
    if isinstance(result, tuple) and result:
        total, beside = result[0], beside_in(result)
        if beside is None or not isinstance(total, fx.Node) or not _operands(total):
            if any(isinstance(one, fx.Node) and _operands(one) for one in result):
                raise _Unfit("it gives more than its sum")
            return None
        result = total
    if not isinstance(result, fx.Node):
        if isinstance(result, list) and any(isinstance(one, fx.Node) and _operands(one) for one in result):
            raise _Unfit("it gives more than its sum")
        return None
    same = _Same(block)
    last = same(result)
    after = None
    if last.op == "call_module" and is_spiking(block.get_submodule(str(last.target))):
        after, last = last, same(last.args[0])  # type: ignore[arg-type]
    found = list(_sums(same, last, given))
    if not found:
        inner = same(last.args[0]) if last.op == "call_module" and len(last.args) == 1 else None
        if inner is not None and _operands(inner) and list(_sums(same, inner, given)):
            raise _Unfit(f"its sum goes through {last.target}, which is no neuron that the converter knows")
        return None
    _check_plain(block, graph)
    earlier = [given, *(total for _, _, total in found)]
    branches = []
    for index, (_, branch, _) in enumerate(found):
        follows = after if after is not None and index == len(found) - 1 else None
        branches.append(_module(block, branch, earlier, follows))
    text = _Text(same, given)(result)
    touched = frozenset(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return Sums(branches, text, after is not None, touched, beside)


class _Same:
    """Leads through what hands on what it is given: ``nn.Identity``, empty sequences, clones."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    def __call__(self, node: Any) -> Any:
        while isinstance(node, fx.Node) and len(node.args) == 1 and self._hands_on(node):
            node = node.args[0]
        return node

    def _hands_on(self, node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in ("clone", "contiguous")
        if node.op != "call_module":
            return False
        part = self._block.get_submodule(str(node.target))
        return type(part) is nn.Identity or (type(part) is nn.Sequential and not len(part))


def _operands(node: fx.Node) -> Sequence[Any]:
    """What an addition adds; nothing for another node."""
    by_function = node.op == "call_function" and node.target in _ADDITIONS
    by_method = node.op == "call_method" and node.target in ("add", "add_")
    plain = len(node.args) == 2 and not node.kwargs and all(isinstance(one, fx.Node) for one in node.args)
    return node.args if plain and (by_function or by_method) else ()


def _sums(same: _Same, last: fx.Node, given: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
    """The streams, their branches and the sums of both, from the input on."""
    if last is given:
        return
    operands = [same(one) for one in _operands(last)]
    for stream, branch in (operands, operands[::-1]) if operands else ():
        if branch is given or not _comes_from(branch, stream, given):
            continue
        before = [] if stream is given else list(_sums(same, stream, given))
        if stream is given or before:
            yield from before
            yield stream, branch, last
            return
    if operands and all(_reaches(one, given) for one in operands):
        raise _Unfit("its shortcut is not the identity")


def _reads_the_shape(node: fx.Node) -> bool:
    by_name = node.op == "call_function" and node.target is getattr and node.args[1] in _OF_THE_SHAPE
    return by_name or (node.op == "call_method" and node.target in _OF_THE_SHAPE)


def _reaches(node: fx.Node, given: fx.Node, stop: fx.Node | None = None) -> bool:
    """Whether a value is computed from the input, on a way that does not go through ``stop``."""
    waiting, met = [node], set()
    while waiting:
        one = waiting.pop()
        if one is stop or one in met:
            continue
        if one is given:
            return True
        met.add(one)
        if not _reads_the_shape(one):
            waiting.extend(one.all_input_nodes)
    return False


def _comes_from(branch: fx.Node, stream: fx.Node, given: fx.Node) -> bool:
    return _reaches(branch, stream) and not (stream is not given and _reaches(branch, given, stop=stream))


def _check_plain(block: nn.Module, graph: fx.Graph) -> None:
    """Refuse a graph that doesn't say all: of writes into what is used later, and of values of its own."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    parameters = dict(block.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) not in parameters:
            raise _Unfit(f"it reads {node.target}, which is no parameter")
        if not _writes(block, node):
            continue
        into = node.args[0]
        later = [user for user in into.users if order[user] > order[node]]
        if into.op == "placeholder" and not _operands(node):
            raise _Unfit("its branch writes into what it is given")
        if later or not node.users or into.op not in ("call_module", "call_function", "placeholder"):
            raise _Unfit("it writes in place into what may be used again")


def _writes(block: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        part = block.get_submodule(str(node.target))
        first = next(iter(part), part) if isinstance(part, nn.Sequential) else part
        return bool(getattr(first, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    by_name = getattr(node.target, "__name__", "").endswith("_") or node.kwargs.get("inplace")
    return node.op == "call_function" and (node.target in _WRITE or bool(by_name))


def _module(
    block: nn.Module, branch: fx.Node, earlier: Sequence[fx.Node], follows: fx.Node | None
) -> fx.GraphModule:
    """A branch as a module that is made of the block's own parts."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    copies: dict[fx.Node, fx.Node] = dict.fromkeys(earlier, x)
    wanted, waiting = set(), [branch]
    while waiting:
        one = waiting.pop()
        if one not in wanted and one not in copies:
            wanted.add(one)
            waiting.extend(one.all_input_nodes)
    for node in branch.graph.nodes:
        if node in wanted:
            copies[node] = graph.node_copy(node, lambda one: copies[one])
    out = copies[branch]
    if follows is not None:
        out = graph.call_module(str(follows.target), (out,))
    graph.output(out)
    return fx.GraphModule(block, graph)


# -- text --------------------------------------------------------------------------------------------------


def _text(graph: fx.Graph) -> list[tuple[Any, ...]]:
    return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in graph.nodes]


class _Text:
    """An expression as one would write it, cut where it gets long."""

    def __init__(self, same: Callable[[Any], Any], given: fx.Node) -> None:
        self._same, self._known = same, {given: "x"}

    def __call__(self, value: Any) -> str:
        value = self._same(value)
        if not isinstance(value, fx.Node):
            several = isinstance(value, (tuple, list))
            return f"({', '.join(map(self, value))})" if several else repr(value)
        if value not in self._known:
            text = self._of(value)
            self._known[value] = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
        return self._known[value]

    def _of(self, node: fx.Node) -> str:
        arguments = [self(one) for one in node.args]
        arguments += [f"{name}={self(one)}" for name, one in node.kwargs.items()]
        if node.op == "call_function" and node.target in _SIGNS and len(arguments) == 2:
            return f" {_SIGNS[node.target]} ".join(arguments)
        if node.op == "call_function" and node.target is getattr:
            return f"{arguments[0]}.{node.args[1]}"
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        if node.op == "get_attr":
            return str(node.target)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
        return f"{name}({', '.join(arguments)})"
