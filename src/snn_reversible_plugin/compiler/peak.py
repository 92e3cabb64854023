"""The peak of a backward, guessed from the graph, to choose between plans before anything is compiled.

The one idea: walk the backward in the order in which it will run, each value of the forward
computed again right before it is first read, and add up what is alive. Kernels that fuse hold less,
so the guess is too high, but by the same for every plan. Source:
``reordering_to_mimic_autograd_engine`` of the partitioner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from snn_reversible_plugin.compiler.graph import Joint, is_view, name_of, size_of, tensor_of
from snn_reversible_plugin.compiler.levels import Levels


def backward_order(joint: Joint, stored: set[fx.Node], codes: Collection[fx.Node]) -> list[fx.Node]:
    """The calls of the backward as they will run, with those of the forward that it computes again."""
    place = {node: index for index, node in enumerate(joint.graph.nodes)}
    wanted = joint.wanted(stored) - stored.difference(codes)
    order: list[fx.Node] = []
    done: set[fx.Node] = set()
    for node in joint.graph.nodes:
        if node not in joint.of_tangents or node.op != "call_function":
            continue
        missing: set[fx.Node] = set()
        waiting = list(node.all_input_nodes)
        while waiting:
            source = waiting.pop()
            if source in wanted and source not in done and source not in missing:
                missing.add(source)
                waiting += () if source in codes else source.all_input_nodes
        order += sorted(missing, key=place.__getitem__)
        done |= missing
        order.append(node)
    return order


def peak_of(joint: Joint, stored: set[fx.Node], codes: Mapping[fx.Node, Levels]) -> int:
    """Bytes alive at the highest point of the backward, of what is stored and what is computed in it."""
    order = backward_order(joint, stored, codes)
    owner: dict[fx.Node, fx.Node] = {}  # of the memory that a value lies in
    for node in order:
        if node not in codes and (is_view(node) or name_of(node) == "getitem"):
            source = node.all_input_nodes[0]
            owner[node] = owner.get(source, source)
        else:
            owner[node] = node
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(order):
        last[owner[node]] = index
        for source in () if node in codes else node.all_input_nodes:
            last[owner.get(source, source)] = index
    ends: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        ends.setdefault(index, []).append(node)
    results = set(next(iter(reversed(joint.graph.nodes))).all_input_nodes)
    kept = stored.difference(codes)  # codes are small, and stay to the end
    live = peak = sum(size_of(node) for node in kept) + sum(map(_packed_size, codes, codes.values()))
    for index, node in enumerate(order):
        if owner[node] is node:
            live += size_of(node)
            peak = max(peak, live)
        for dead in ends.get(index, ()):
            if dead in kept or (owner.get(dead) is dead and dead not in results):
                live -= size_of(dead)
    return peak


def _packed_size(node: fx.Node, levels: Levels) -> int:
    """The bytes of a value's codes."""
    value, bits = tensor_of(node), levels.bits
    assert value is not None and bits is not None
    return size_of(node) * bits // (8 * value.element_size())
