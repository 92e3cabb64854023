"""The most that was alive in a piece of work, for each state of what may be there or not in another step.

The one idea: marks among the allocator's events say which product has just run, and where its result is, so
that of each event is known which results stood.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snn_reversible_plugin.ops.allocations import Allocation
from snn_reversible_plugin.tape.early import Early
from snn_reversible_plugin.tape.sizes import Moment

PRODUCT = "product"  # has run in the forward: its result's address
REBUILDS, REBUILT = "rebuilds", "rebuilt"  # a layer's product; and where its result is
EARLY = "early"  # what stands there is
GONE = 0  # the address of what was let go of


def of_forward(events: Sequence[Allocation]) -> list[list[Moment]]:
    """The most that was alive up to each product's end, and to the forward's, for each state of results."""
    addresses: dict[int, int] = {}  # where results stand, and of which layer
    alive, at, stands = 0, 0, frozenset[int]()
    most: list[dict[frozenset[int], int]] = [{stands: 0}]
    for event in events:
        what, *numbers = event.operator.split() if not event.size else ("",)
        alive += event.size
        if event.size < 0 and addresses.pop(event.address, None) is not None:
            stands = frozenset(addresses.values())
        most[-1][stands] = max(alive, most[-1].get(stands, alive))
        if what == PRODUCT:  # with what its kernel took
            at += 1
            if (address := int(numbers[0])) != GONE:
                addresses[address] = at
            stands = frozenset(addresses.values())
            most.append({stands: alive})
    return [[Moment(alive, stands) for stands, alive in each.items()] for each in most]


def made(events: Iterable[Allocation]) -> set[int]:
    """Addresses of what was given out and not given back."""
    addresses: set[int] = set()
    for event in events:
        (addresses.discard if event.size < 0 else addresses.add)(event.address)
    return addresses


def gone(events: Sequence[Allocation], here: set[int]) -> int:
    """Bytes of what was let go of and had not come since somebody listens.

    ``here``: addresses of what has, or is accounted for; those of what comes are added.
    """
    found = 0
    for event in events:
        if event.size > 0:
            here.add(event.address)
        elif event.size < 0 and event.address not in here:
            found -= event.size
    return found


def of_node(
    events: Sequence[Allocation], results: dict[int, int], before: dict[int, Early], still: dict[int, Early]
) -> list[Moment]:
    """The most that was alive in a node, beyond what was before, for each state of rebuilt results.

    Args:
        results: where results stood before, by layer.
        before: what was early before, by address.
        still: what is early when the node is over; what is not was taken in it.
    """
    addresses, alive = dict(results), 0
    early = {address: one for address, one in still.items() if address in before}
    moment = Moment(0, standing(addresses), early=together(early))
    most = {moment: 0}
    has_run = False  # just now, so that the product's operands go first
    for event in events:
        what, *numbers = event.operator.split() if not event.size else ("",)  # a mark
        if what == REBUILDS:
            moment, has_run = moment._replace(rebuilding=int(numbers[0])), False
        elif what == REBUILT:
            layer, address = map(int, numbers)
            addresses[layer] = address
            moment, has_run = Moment(0, standing(addresses), early=together(early)), True
        elif what == EARLY and (address := int(numbers[0])) in still:
            early[address] = still[address]
            moment = moment._replace(early=together(early))
        elif event.size < 0 and event.address in addresses.values():
            addresses = {
                layer: GONE if address == event.address else address for layer, address in addresses.items()
            }
            moment = moment._replace(standing=standing(addresses))
        if event.size < 0 and early.pop(event.address, None) is not None:
            moment = moment._replace(early=together(early))
        alive += event.size
        has_run = has_run and event.size <= 0
        if not has_run:
            most[moment] = max(alive, most.get(moment, alive))
    most[moment] = max(alive, most.get(moment, alive))
    return [moment._replace(alive=alive) for moment, alive in most.items()]


def together(early: dict[int, Early]) -> frozenset[tuple[int, frozenset[int]]]:
    """Bytes that are early, by the layers for whose sake."""
    found: dict[frozenset[int], int] = {}
    for one in early.values():
        found[one.layers] = found.get(one.layers, 0) + one.bytes
    return frozenset((size, layers) for layers, size in found.items())


def standing(addresses: dict[int, int]) -> frozenset[int]:
    """The layers whose results stand, and minus those whose results the node has let go of."""
    return frozenset(-layer if address == GONE else layer for layer, address in addresses.items())


def that_decide(moments: Sequence[Moment]) -> list[Moment]:
    """Without those that had no more alive than another one, whatever is kept."""
    found: list[Moment] = []
    for one in sorted(moments, key=lambda one: (-one.alive, len(one.standing))):
        if not any(
            other.standing <= one.standing
            and other.rebuilding in (None, one.rebuilding)
            and other.overwriting >= one.overwriting
            and _whatever_is_early(other, one)
            for other in found
        ):
            found.append(one)
    return found


def _whatever_is_early(more: Moment, less: Moment) -> bool:
    """Whether the former stays above the latter, whichever results are kept."""
    return more.early <= less.early or more.alive - sum(size for size, _ in more.early) >= less.alive
