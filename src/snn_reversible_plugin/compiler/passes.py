"""The pass: from a joint graph as the compiler has it to one whose backward starts from bits.

The one idea: the backward gets a forward of its own. It is a copy of the calls whose values it
wants, reads what is stored and nothing else of the forward's, and each of its nodes is tagged so
that the partitioner puts it into the backward. The forward stays as it was, and packs. Source:
``torch._functorch.partitioners`` (tags of selective activation checkpointing).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from snn_reversible_plugin.compiler import graph as graphs
from snn_reversible_plugin.compiler import levels, packing, peak, plan
from snn_reversible_plugin.compiler.graph import Joint, name_of, parent_of, size_of, tensor_of
from snn_reversible_plugin.compiler.plan import Plan
from snn_reversible_plugin.compiler.progress import tell
from snn_reversible_plugin.ops.units import shown


@functools.cache
def _hash_of_code() -> bytes:
    """Of the code that runs: files may be replaced while it does."""
    files = (__file__, *(module.__file__ for module in (graphs, levels, packing, peak, plan)))
    return get_hash_for_files(files)


@dataclass
class Region:
    """What the pass did to one region: bytes ``stored``, by kind, and how many values are ``packed``."""

    packed: int = 0
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What the region stores for its backward, inputs and parameters aside."""
        return sum(self.stored.values())


class Packing(CustomGraphPass):
    """Runs on a joint graph before it is partitioned; ``regions`` says what it found, a region each."""

    def __init__(self, mode: str = "memory") -> None:
        self.mode = mode
        self.regions: list[Region] = []

    def __call__(self, graph: fx.Graph) -> None:
        graphs.drop_budgets(graph)
        graphs.merge_equal(graph)
        joint = Joint(graph)
        if not joint.has_backward:
            return
        tell(f"srp.compile: choosing what {len(joint.forward):,} values of the forward are stored as")
        region = rewrite(joint, plan.plan(joint, self.mode))
        self.regions.append(region)
        tell(f"srp.compile: {region.packed} packed, {shown(region.bytes)} stored; Inductor compiles")

    def uuid(self) -> bytes:
        return _hash_of_code() + self.mode.encode()


class InputsAsTheyAre(CustomGraphPass):
    """Runs on each half when Inductor is about to choose layouts: an input that is saved stays the input.

    Inductor gives what a forward saves the layout that convolutions prefer, so that a weight would be saved
    as a copy: as many bytes as the network has parameters. What a user sees keeps its layout, and that is
    what a saved input is said to be.
    """

    def __call__(self, graph: fx.Graph) -> None:
        output = next(iter(reversed(graph.nodes)))
        visible = output.meta.get("user_visible_output_idxs")
        if visible is None or not isinstance(output.args[0], (list, tuple)):
            return
        inputs = [
            index
            for index, node in enumerate(output.args[0])
            if isinstance(node, fx.Node) and node.op == "placeholder" and index not in visible
        ]
        output.meta["user_visible_output_idxs"] = [*visible, *inputs]

    def uuid(self) -> bytes:
        return _hash_of_code()


def rewrite(joint: Joint, chosen: Plan) -> Region:
    """Give the backward what is stored, and copies of the calls that it takes to compute the rest again."""
    graph, region = joint.graph, Region(packed=len(chosen.codes))
    wanted = joint.wanted(chosen.stored)
    first = next(node for node in graph.nodes if node in joint.of_tangents and node.op == "call_function")
    early: set[fx.Node] = set()
    for node in graph.nodes:
        if node is first:
            break
        early.add(node)
    writer = packing.Writer(graph)
    codes: dict[fx.Node, packing.Code] = {}
    with _fake_mode(joint):
        for group in chosen.groups:
            for node, code in zip(group, writer.pack(group, chosen.codes[group[0]]), strict=True):
                codes[node] = code
        saved = {code.stored for code in codes.values()} | (chosen.stored & wanted) - codes.keys()
        writer.behind = first.prev
        again: dict[fx.Node, fx.Node] = {}  # a value of the forward: the backward's
        copies: list[fx.Node] = []
        for node in joint.forward:
            if node not in wanted or node not in early or (node in saved and node not in codes):
                continue
            start = writer.behind
            again[node] = writer.unpack(codes[node]) if node in codes else writer.copy(node, again)
            if node in chosen.written:
                again[node].meta["inductor_realize_to_strides"] = True
            while start is not writer.behind:
                start = start.next
                copies.append(start)
    for node in graph.nodes:
        if node in joint.of_tangents or (node in wanted and node not in early):
            for source in node.all_input_nodes:
                if source in again:
                    node.replace_input_with(source, again[source])
            if node in wanted:
                copies.append(node)
    _tag(copies, CheckpointPolicy.MUST_RECOMPUTE)
    # A value that is one of several is stored where the call that made it is, see the partitioner.
    _tag([*saved, *map(parent_of, saved)], CheckpointPolicy.MUST_SAVE)
    graph.lint()
    packed = {code.stored for code in codes.values()}
    for node in saved:
        kind = "codes" if node in packed else name_of(parent_of(node))
        region.stored[kind] = region.stored.get(kind, 0) + size_of(node)
    return region


def _tag(nodes: list[fx.Node], policy: CheckpointPolicy) -> None:
    for node in nodes:
        if isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):  # and no size that is a symbol
            node.meta["ac_graph_id"] = 1
            node.meta["recompute"] = policy


def _fake_mode(joint: Joint) -> torch._subclasses.FakeTensorMode:
    """The mode in which values without a real tensor are made."""
    fakes = (tensor_of(node) for node in joint.graph.nodes)
    return next(fake.fake_mode for fake in fakes if fake is not None)  # type: ignore[attr-defined, no-any-return]
