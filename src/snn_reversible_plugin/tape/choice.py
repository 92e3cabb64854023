"""Which products are kept, so that they don't run again in the backward: those that cost no peak.

The one idea: the backward comes to the layers from the last to the first, and in a layer only what layers
before it have kept is still alive. So the result of a product may be kept if, in every later layer, there
is room for it below the peak that the largest layer makes anyway.

Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from snn_reversible_plugin.tape.sizes import Layer

# NOTE [Room below the peak]
#
# 1. The peak without anything kept is at least the largest of (least + held + gradients that stand) over
#    the layers; in a layer it is at most (most + held + gradients that stand). The difference is the
#    layer's room. Bounds from both sides, so that estimates don't raise the peak, whatever kernels take.
# 2. What is kept of a layer takes room in all later ones. In its own it would be rebuilt, so that it takes
#    room only until then (`rest`). But one who would overwrite what is rebuilt (a neuron, where no batch
#    norm is between) copies.
# 3. The gradients that stand are those of parameters whose last use the backward has met; if a script keeps
#    gradients from step to step, all of them. There must be room either way.
# 4. Where the room doesn't do for all, products that save most multiplications a byte go first, and later
#    ones before earlier ones.
#
# For example, layers whose results take 4, 4, 2 and 1, with at least 12, 12, 6, 3 and at most 20, 20, 10, 5
# alive: the second, third and fourth layers have no room, 2 and 7. Nothing of the first may be kept; 4 of
# the second don't fit into the third's 2. The third's 2 fit into 7, and the fourth's 1 has nobody after it.


def choose(layers: Sequence[Layer], limit: int | None = None) -> list[bool]:
    """Of which layers the product's result is kept.

    Args:
        layers: in the order of the forward.
        limit: bytes that may be alive; the peak of the largest layer by default.
    """
    rooms = [_room(layers, limit, all_of_them) for all_of_them in (False, True)]
    room = [min(ways) for ways in zip(*rooms, strict=True)]
    after = _room_after(room)
    kept = [False] * len(layers)
    candidates = [at for at, layer in enumerate(layers) if layer.needed and layer.result]
    for at in sorted(candidates, key=lambda at: (-layers[at].work / layers[at].result, -at)):
        layer = layers[at]
        here = room[at] + layer.most - layer.rest if layer.shared else room[at] - layer.result
        if here >= 0 and layer.result <= after[at]:
            kept[at] = True
            room[at + 1 :] = [one - layer.result for one in room[at + 1 :]]
            after = _room_after(room)
    return kept


def within(budget: int, lives: int, layers: Sequence[Layer]) -> int:
    """Bytes that the step may have alive within a budget, of which some are what lives anyway.

    Raises:
        RuntimeError: it takes more, whatever is kept.
    """
    standing = _gradients(layers, all_of_them=False)
    taken = [layer.least + layer.held + one for layer, one in zip(layers, standing, strict=True)]
    at_least = layers[taken.index(max(taken))]
    least = max(*taken, standing[0])
    if lives + least > budget:
        learned = sum(layer.learned for layer in layers)
        raise RuntimeError(
            f"budget={budget:,} bytes: a training step of this shape takes at least {lives + least:,}, "
            f"whatever is kept: {lives:,} live anyway (parameters, inputs), {learned:,} are gradients of "
            f"parameters, {at_least.held:,} is held, {at_least.least:,} is the largest layer's. A smaller "
            "batch, fewer time steps or a smaller input lower the last two; step_in_backward frees each "
            "gradient at once; largest_batch says what fits."
        )
    return budget - lives


def _room(layers: Sequence[Layer], limit: int | None, all_of_them: bool) -> list[float]:
    standing = _gradients(layers, all_of_them)
    if limit is None:
        limit = max(layer.least + layer.held + one for layer, one in zip(layers, standing, strict=True))
    return [
        float("-inf") if layer.unknown else limit - layer.most - layer.held - one
        for layer, one in zip(layers, standing, strict=True)
    ]


def _room_after(room: Sequence[float]) -> list[float]:
    """The least room in the layers after each."""
    return [*accumulate(reversed(room[1:]), min, initial=float("inf"))][::-1]


def _gradients(layers: Sequence[Layer], all_of_them: bool) -> list[int]:
    """Of parameters, those that stand in the backward of each layer."""
    total = sum(layer.learned for layer in layers)
    if all_of_them:
        return [total] * len(layers)
    standing, before = [], 0
    for layer in layers:
        standing.append(total - before)
        before += layer.learned
    return standing
