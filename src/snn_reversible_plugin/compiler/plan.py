"""What a compiled region stores for its backward: codes of spikes, small tensors, an anchor now and then.

The one idea: name what is stored, and let all else of the forward that the backward wants be computed
again.
Source: the treatments of ``docs/how-it-works.md``, carried over from the tape to a graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from snn_reversible_plugin.compiler.graph import (
    REARRANGED,
    Joint,
    is_product,
    is_random,
    is_view,
    name_of,
    parent_of,
    runs_again,
    size_of,
    tensor_of,
)
from snn_reversible_plugin.compiler.levels import Levels, levels_of
from snn_reversible_plugin.compiler.peak import peak_of

# NOTE [What is stored]
#
# 1. Values of few levels that lead into a convolution, a product, a pool or a reduction which the
#    backward computes again, or into a product of the backward's: as codes, where they are made. What
#    else is made of them (a membrane's reset, a sum, a cast) starts from the codes too.
# 2. Random results: as codes where they are a mask, as they are elsewhere. Nothing is drawn twice.
# 3. What no second run gives (operators of other libraries, collectives).
# 4. Results that are small beside what they were computed from: statistics of a batch norm, norms,
#    means.
# 5. In mode "speed" convolutions and products.
# 6. Anchors. A membrane that a loop over time carries along, a residual stream of floats: its last
#    value brings all before it back at once, a product each, and they wait for their turn. So it is
#    stored now and then: a chain of products is cut into parts of one length, as few as leave the guessed
#    peak near the lowest. (At a given distance the last part may be short, and the peak is that of the
#    others.) No product is computed a third time. Example: T = 100 steps of one layer, cut into four
#    parts: 3 membranes are held, and the backward has at most 25 more, where it would begin with 100
#    without them.
# 7. Nothing of a pool; but the backward has its choices, a byte each, in memory as soon as it pools again.
#    Inductor would compute them where they are read, with all index arithmetic of a scatter, from what was
#    pooled, which would stay alive until then: of a loop, at all its steps.

SMALLEST_PACKED = 64  # elements; below, a code saves nothing worth an operation
PARTS = (2, 3, 4, 6, 8, 12, 16, 32, 64)  # into which a chain of products may be cut
SHORTEST_PART = 3  # products; with shorter ones as much is held as is computed again
NEAR_LOWEST = 1.2  # among plans whose peak is within this of the lowest, what holds least is taken
SMALL_OUTPUT = 64  # a result this many times smaller than its largest input is stored


@dataclass
class Plan:
    """The values that are ``stored``, among them those that are stored as ``codes``, with their levels.

    What is packed together stands in ``groups``, together. Of what the backward computes again, ``written``
    is to be in memory from then on.
    """

    stored: set[fx.Node]
    codes: dict[fx.Node, Levels]
    groups: list[list[fx.Node]]
    written: set[fx.Node]


def plan(joint: Joint, mode: str) -> Plan:
    """Choose what a region stores."""
    levels = levels_of(joint.graph)
    stored = must_be_stored(joint, worth := set(worth_codes(joint, levels)), mode)
    codes = {node: levels[node] for node in joint.forward if node in worth & stored}
    if mode == "memory":
        stored |= anchors(joint, stored, codes)
    return Plan(stored, codes, list(_groups(codes)), set(_choices(joint, levels)))


def _choices(joint: Joint, levels: dict[fx.Node, Levels]) -> Iterator[fx.Node]:
    """Which elements the max pools over floats took, see note 7."""
    for node in joint.forward:
        parent = parent_of(node)
        if parent is not node and node.args[1] == 1 and name_of(parent).startswith("_low_memory_max_pool"):
            source = parent.args[0]
            if isinstance(source, fx.Node) and not is_coded(source, levels):
                yield node


def _groups(codes: dict[fx.Node, Levels]) -> Iterator[list[fx.Node]]:
    """What goes into the same bytes: values of one layer at successive time steps, or one alone."""
    open_groups: dict[Any, list[fx.Node]] = {}
    for node, levels in codes.items():
        value, bits = tensor_of(node), levels.bits
        assert value is not None and bits is not None
        key = (str(value.shape), value.dtype, value.device, levels, _layer(node))
        group = open_groups.setdefault(key, [])
        group.append(node)
        if len(group) == 8 // bits:
            yield open_groups.pop(key)
    yield from open_groups.values()


def _layer(node: fx.Node) -> str:
    """The module in which a value is computed, as far as that is known; by its key, not by the path to it.

    Of the calls of one module the keys differ behind an "@". The path may differ too: a loop's first step
    finds a snnTorch neuron by its name, the others through a bound method.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack), "")).partition("@")[0]


def worth_codes(joint: Joint, levels: dict[fx.Node, Levels]) -> list[fx.Node]:
    """The values to store as codes, see note 1 and 2."""
    wanted = joint.wanted(set())
    chosen: dict[fx.Node, None] = {}
    for node in joint.forward:
        if node not in wanted or not is_coded(node, levels):
            continue
        others = [user for user in node.users if not is_coded(user, levels)]
        if any(_leads_on(node, user, joint, wanted) for user in others):
            chosen[_made_at(node, levels)] = None
    drawn = _drawn(joint)
    for node in joint.forward:
        if node not in wanted or node not in drawn or not is_coded(node, levels):
            continue
        # The first in a row of values of few levels is the narrowest.
        if not any(source in drawn and is_coded(source, levels) for source in node.all_input_nodes):
            chosen[node] = None
    return list(chosen)


def is_coded(node: fx.Node, levels: dict[fx.Node, Levels]) -> bool:
    """Whether codes of a value take fewer bytes than it does."""
    value = tensor_of(node)
    if value is None or node not in levels or levels[node].is_constant:
        return False
    bits, width = levels[node].bits, value.element_size()
    return bits is not None and bits < 8 * width and size_of(node) >= SMALLEST_PACKED * width


def _leads_on(node: fx.Node, user: fx.Node, joint: Joint, wanted: set[fx.Node]) -> bool:
    """Whether a value goes through ``user`` into something that costs a layer to compute again."""
    waiting, seen = [(node, user)], set()
    while waiting:
        source, reader = waiting.pop()
        if reader in seen or reader.op != "call_function":
            continue
        seen.add(reader)
        in_backward = reader in joint.of_tangents
        if not in_backward and reader not in wanted:
            continue
        if is_product(reader) or "convolution_backward" in name_of(reader):
            return True
        if in_backward:
            if name_of(reader) not in REARRANGED and name_of(reader) != "convert_element_type":
                continue
        elif not _is_elementwise(reader) and name_of(reader) not in REARRANGED:
            return True
        elif any(_is_large(other, source) for other in reader.all_input_nodes if other is not source):
            continue
        waiting += [(reader, after) for after in reader.users]
    return False


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or name_of(node) in (
        "convert_element_type",
        "expand",
        "getitem",
        "cat",
    )


def _is_large(other: fx.Node, beside: fx.Node) -> bool:
    return other.op != "placeholder" and name_of(other) != "full" and 2 * size_of(other) > size_of(beside)


def _made_at(node: fx.Node, levels: dict[fx.Node, Levels]) -> fx.Node:
    """Where a value was made: before views and casts, and before it was taken apart."""
    while (source := _source(node)) is not None and is_coded(source, levels):
        if levels[source].bits != levels[node].bits:
            break
        node = source
    return node


def _source(node: fx.Node) -> fx.Node | None:
    """What a view, a cast or a part was taken from."""
    name, source = name_of(node), node.args[0] if node.args else None
    if name == "getitem" and name_of(source) in _APART:  # type: ignore[arg-type]
        source = source.args[0]  # type: ignore[union-attr]
    elif name not in _TAKEN:
        return None
    return source if isinstance(source, fx.Node) and source.op == "call_function" else None


_APART = ("unbind", "split", "split_with_sizes")
_TAKEN = REARRANGED | {"convert_element_type", "_to_copy", "select", "slice"}


def _drawn(joint: Joint) -> set[fx.Node]:
    """Random results, and what was computed from them."""
    drawn: set[fx.Node] = set()
    for node in joint.forward:
        if is_random(node) or any(source in drawn for source in node.all_input_nodes):
            drawn.add(node)
    return drawn


def must_be_stored(joint: Joint, codes: set[fx.Node], mode: str) -> set[fx.Node]:
    """Codes, and what notes 2 to 5 name beside them."""
    stored = set(codes)
    for node in joint.forward:
        value = tensor_of(node)
        if value is None or node in codes:
            continue
        parent = parent_of(node)
        costly = not runs_again(parent) or (mode == "speed" and is_product(parent))
        if costly or (_is_small(node, parent) and not (is_view(parent) or is_product(parent))):
            stored.add(node)
    return stored & joint.wanted(stored)


def _is_small(node: fx.Node, parent: fx.Node) -> bool:
    largest = max((size_of(source) for source in parent.all_input_nodes), default=0)
    return size_of(node) * SMALL_OUTPUT <= largest


def anchors(joint: Joint, stored: set[fx.Node], codes: dict[fx.Node, Levels]) -> set[fx.Node]:
    """Further values to store, so that the backward has fewer of them alive at once, see note 6."""
    _, longest = _cut(joint, stored, None)
    plans: list[tuple[int, set[fx.Node]]] = [(peak_of(joint, stored, codes), set())]
    for distance in sorted({max(math.ceil((longest + 1) / parts), SHORTEST_PART) for parts in PARTS}):
        found, _ = _cut(joint, stored, distance)
        plans.append((peak_of(joint, stored | found, codes), found))
    lowest = min(peak for peak, _ in plans)
    near = [found for peak, found in plans if peak <= NEAR_LOWEST * lowest]
    return min(near, key=lambda found: sum(map(size_of, found)))


def _cut(joint: Joint, stored: set[fx.Node], distance: int | None) -> tuple[set[fx.Node], int]:
    """Values to store so that each is fewer than ``distance`` products away from stored ones, and the most.

    A product counts once however many paths lead to it.
    """
    wanted = joint.wanted(stored)
    number = {node: index for index, node in enumerate(n for n in joint.forward if is_product(n))}
    behind: dict[fx.Node, int] = {}  # products that a value takes, a bit each
    found: set[fx.Node] = set()
    most = 0
    for node in joint.forward:
        if node not in wanted or node in stored:
            continue
        products = 1 << number[node] if node in number else 0
        for source in node.all_input_nodes:
            products |= behind.get(source, 0)
        value, count = tensor_of(node), products.bit_count()
        if distance and count >= distance and value is not None and value.is_floating_point():
            found.add(node)
            continue
        behind[node] = products
        most = max(most, count)
    return found, most
