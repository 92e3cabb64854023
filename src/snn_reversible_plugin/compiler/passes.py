"""The pass: from a joint graph as the compiler has it to one whose backward starts from bits.

The one idea: every user of a spike reads ``unpack(pack(spikes))`` instead. Then the codes can be what
is stored, and a tag on each other node of the forward tells the partitioner to compute it again in the
backward.
Source: ``torch._functorch.partitioners`` (tags of selective activation checkpointing).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from snn_reversible_plugin.compiler import graph as graphs
from snn_reversible_plugin.compiler import levels, packing, plan
from snn_reversible_plugin.compiler.graph import Joint, name_of, size_of


@dataclass
class Region:
    """What the pass did to one region: bytes stored, by kind, and the number of values packed."""

    packed: int = 0
    stored: dict[str, int] = field(default_factory=dict)


class Packing(CustomGraphPass):
    """Runs on a joint graph before it is partitioned; ``regions`` says what it found, a region each."""

    def __init__(self, mode: str = "memory") -> None:
        self.mode = mode
        self.regions: list[Region] = []

    def __call__(self, graph: fx.Graph) -> None:
        joint = Joint(graph)
        if joint.has_backward:
            self.regions.append(rewrite(graph, joint, self.mode))

    def uuid(self) -> bytes:
        files = (__file__, *(module.__file__ for module in (graphs, levels, packing, plan)))
        return get_hash_for_files(files, extra=self.mode)


def rewrite(graph: fx.Graph, joint: Joint, mode: str) -> Region:
    """Pack what is worth it, and tag every node of the forward that the backward wants."""
    found = levels.levels_of(graph)
    writer = packing.Packing(graph)
    codes = set()
    for node in plan.worth_codes(joint, found):
        readers = [user for user in node.users if user.op != "output"]
        code, value = writer.pack(node, found[node])
        for reader in readers:
            reader.replace_input_with(node, value)
        codes.add(code)
    graph.lint()
    joint = Joint(graph)
    stored = plan.must_be_stored(joint, codes, mode)
    if mode == "memory":
        stored |= plan.anchors(joint, stored, MOST_PRODUCTS)
    _tag(joint, stored)
    region = Region(packed=len(codes))
    for node in stored & joint.wanted(stored):
        kind = "codes" if node in codes else name_of(plan.parent_of(node))
        region.stored[kind] = region.stored.get(kind, 0) + size_of(node)
    return region


MOST_PRODUCTS = 2


def _tag(joint: Joint, stored: set[fx.Node]) -> None:
    wanted = joint.wanted(stored)
    # A value that is one of several is stored where the call that made it is, see the partitioner.
    kept = stored | {plan.parent_of(node) for node in stored}
    for node in joint.forward:
        if node not in wanted and node not in kept:
            continue
        node.meta["ac_graph_id"] = 1
        saved = node in kept
        if not (saved or isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))):
            continue  # a size that is a symbol
        policy = CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE
        node.meta["recompute"] = policy
