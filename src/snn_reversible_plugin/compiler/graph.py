"""What the pass asks of a joint graph: which nodes are the forward's, their size, and if they run again.

The one idea: a joint graph holds forward and backward of a region in one list of aten operations,
and all that sets them apart is whether a node depends on a gradient that comes in (a *tangent*).
Source: ``torch._functorch.partitioners``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

PRODUCTS = frozenset(
    [
        "convolution", "mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "linear",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    ]
)  # fmt: skip
# The values of the result are values of the first argument, each once.
REARRANGED = frozenset(
    [
        "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "permute", "transpose", "t", "alias",
        "detach", "clone", "contiguous", "lift_fresh_copy", "flip",
    ]
)  # fmt: skip
# The same, and it may be some of them only, or some more than once.
TAKEN = REARRANGED | frozenset(
    ["select", "slice", "expand", "repeat", "unbind", "split", "split_with_sizes", "index", "index_select"]
)


def name_of(node: fx.Node) -> str:
    """The name of the aten or prims operation that a node calls, without its overload."""
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", "") if packet is not None else ""


def tensor_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that stands for a node's value, where that is one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def size_of(node: fx.Node) -> int:
    """Bytes of a node's value; with sizes that are symbols, of a value with the sizes that were traced."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return sum(_bytes(one) for one in values if isinstance(one, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    size = tensor.element_size()
    for length in tensor.shape:
        size *= length if isinstance(length, int) else _traced(length)
    return size


def _traced(length: torch.SymInt) -> int:
    hint = length.node.hint
    return int(hint) if hint is not None else 1


def is_product(node: fx.Node) -> bool:
    """Whether a node is a convolution or a matrix product."""
    return name_of(node) in PRODUCTS


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers, or is where a compiled region takes its seeds from."""
    tags = getattr(node.target, "tags", ())
    name = name_of(node)
    if name.startswith(("inductor_rand", "inductor_seed", "inductor_lookup_seed")):
        return True
    return torch.Tag.nondeterministic_seeded in tags


def runs_again(node: fx.Node) -> bool:
    """Whether a node gives the same value when it is computed a second time, and changes nothing."""
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    return not (target._schema.is_mutable or is_random(node))


def is_view(node: fx.Node) -> bool:
    """Whether a value shares the memory of the one it was taken from."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None for result in target._schema.returns
    )


def parent_of(node: fx.Node) -> fx.Node:
    """The call that computed a value, where that is one of several."""
    if name_of(node) == "getitem" and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return node


def drop_budgets(graph: fx.Graph) -> None:
    """Take off what ``torch.autograd.graph.region_activation_memory_budget`` wrote on the nodes of a graph.

    The partitioner would store by it in place of the plan, and draw random numbers a second time.
    """
    inner = graph.owning_module.modules() if graph.owning_module is not None else ()
    for one in (graph, *(module.graph for module in inner if isinstance(module, fx.GraphModule))):
        for node in one.nodes:
            node.meta.pop("memory_budget", None)  # of an older way
            custom = node.meta.get("custom")
            if isinstance(custom, dict) and _BUDGET in custom:
                node.meta["custom"] = {name: value for name, value in custom.items() if name != _BUDGET}


_BUDGET = getattr(torch.fx.traceback, "MEMORY_BUDGET_ANNOTATION_KEY", "_region_activation_memory_budget")


def merge_equal(graph: fx.Graph) -> None:
    """Let a value that is computed twice from the same be computed once: a reset reads the spike itself.

    The partitioner does so too, but after the pass.
    """
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not runs_again(node) or name_of(node) in ("full", "empty"):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        earlier = first.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)


def _hashable(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(map(_hashable, argument))
    if isinstance(argument, dict):
        return tuple((name, _hashable(value)) for name, value in argument.items())
    return argument if isinstance(argument, fx.Node) else (type(argument), argument)


class Joint:
    """A joint graph, divided.

    Attributes:
        of_tangents: nodes that depend on a tangent; they are the backward's.
        forward: the calls that don't, in order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of_tangents: set[fx.Node] = set()
        self.forward: list[fx.Node] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                if "tangents" in str(node.target):
                    self.of_tangents.add(node)
            elif node.op == "output":
                continue
            elif node.meta.get("partitioner_tag") == "must_be_in_backward" or any(
                source in self.of_tangents for source in node.all_input_nodes
            ):
                self.of_tangents.add(node)
            elif node.op == "call_function":
                self.forward.append(node)

    @property
    def has_backward(self) -> bool:
        """Whether there is anything to save for: a gradient that only passes through needs nothing."""
        return any(node.op == "call_function" for node in self.of_tangents)

    def wanted(self, stored: set[fx.Node]) -> set[fx.Node]:
        """The forward's calls whose value the backward reads, or computes again to get at one it reads."""
        wanted: set[fx.Node] = set()
        waiting = [source for node in self.of_tangents for source in node.all_input_nodes]
        while waiting:
            node = waiting.pop()
            if node in wanted or node in self.of_tangents or node.op != "call_function":
                continue
            wanted.add(node)
            if node not in stored:
                waiting += node.all_input_nodes
        return wanted

    def users(self, node: fx.Node) -> Iterator[fx.Node]:
        """Who reads a value, what the region returns aside."""
        return (user for user in node.users if user.op != "output")
