"""Which products are kept, so that they don't run again in the backward: those that cost no peak.

The one idea: the backward comes to the layers from the last to the first, and in a layer only what layers
before it have kept is still alive. So the result of a product may be kept if, in every later layer, there
is room for it below the peak that the largest layer makes anyway.

Source: this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from snn_reversible_plugin.tape.sizes import Layer, Moment

# NOTE [Room below the peak]
#
# 1. The peak without anything kept is at least the largest of (least + held + gradients that stand) over
#    the layers; in a layer it is at most (most + held + gradients that stand). The difference is the
#    layer's room. Bounds from both sides, so that estimates don't raise the peak, whatever kernels take.
#    Within a budget, where a first step was measured, a layer's room is what that step left of the budget,
#    at each moment: a result that had been rebuilt by then, for a layer above, takes none of it, and a
#    moment at which its product ran again is none any more. A stage of residual blocks, whose sums are a
#    floating-point stream, is rebuilt at once when the turn of its last layer comes. What was computed for
#    a product (early.py) makes room when that is kept.
# 2. What is kept of a layer takes room in all later ones. In its own it would be rebuilt, so that it takes
#    room only until then (`rest`). But one who would overwrite what is rebuilt (a neuron, where no batch
#    norm is between) copies: by bounds any but a batch norm may, in a measured step those did whose
#    gradient was in the result's memory. A kept result goes when a rebuilt one went for the last time.
# 3. The gradients that stand are those of parameters whose last use the backward has met; if a script keeps
#    gradients from step to step, all of them. There must be room either way.
# 4. Where the room doesn't do for all, products that save most multiplications a byte go first, and later
#    ones before earlier ones.
#
# For example, layers whose results take 4, 4, 2 and 1, with at least 12, 12, 6, 3 and at most 20, 20, 10, 5
# alive: the second, third and fourth layers have no room, 2 and 7. Nothing of the first may be kept; 4 of
# the second don't fit into the third's 2. The third's 2 fit into 7, and the fourth's 1 has nobody after it.


_LESS = {  # what lowers the peak of a mode; None: of a network that is not converted
    None: 'convert_to_reversible(model) with mode="memory" holds a small part, mode="minimal" the least',
    "speed": 'mode="memory" lowers the peak, mode="minimal" most',
    "memory": 'mode="minimal" takes the largest layers a slice of the batch at a time',
}


def what_helps(mode: str | None, steps_in_backward: bool = False) -> str:
    """What lowers the peak of a step and is not in use yet, as a sentence."""
    ways = [
        _LESS.get("memory" if mode == "auto" else mode),
        None
        if steps_in_backward
        else "step_in_backward(optimizer) frees each parameter's gradient as it is used",
        "smaller inputs or fewer time steps lower all but parameters and their gradients",
    ]
    return f"What helps: {'; '.join(way for way in ways if way)}."


_HELP = (
    f"In place of a budget, {_LESS['memory']}; step_in_backward(optimizer), if it is not in use, frees "
    "each parameter's gradient as it is used; a smaller batch, smaller inputs or fewer time steps lower "
    "all but parameters and their gradients; largest_batch says what fits."
)


class _Room:
    """Bytes that may be alive at one moment of a step, beside what was alive then anyway."""

    def __init__(self, left: float, moment: Moment | None = None) -> None:
        self.left = left
        self._moment = moment or Moment(0)
        self._early = self._moment.early

    def has(self, at: int, result: int) -> bool:
        """Whether there is room for the result of this layer's product."""
        if at in self._moment.standing or at == self._moment.rebuilding:
            return True
        return result <= self.left + sum(size for size, layers in self._early if at in layers)

    def take(self, at: int, result: int) -> None:
        """It is kept."""
        if at == self._moment.rebuilding:  # and not run again
            self.left = math.inf
        elif at not in self._moment.standing:
            self.left -= result
        self.not_early(at)

    def not_early(self, at: int) -> None:
        """What was there for the sake of this layer's product isn't."""
        for one in self._early:
            if at in one[1]:
                self.left += one[0]
                self._early -= {one}


def choose(layers: Sequence[Layer], limit: int | None = None) -> list[bool]:
    """Of which layers the product's result is kept.

    Args:
        layers: in the order of the forward.
        limit: bytes that may be alive; the peak of the largest layer by default.
    """
    rooms, owns = _rooms(layers, limit)
    kept = [False] * len(layers)
    candidates = [at for at, layer in enumerate(layers) if layer.needed and layer.result]
    for at in sorted(candidates, key=lambda at: (-layers[at].work / layers[at].result, -at)):
        result = layers[at].result
        others: list[_Room] = []
        for later in range(at + 1, len(layers)):
            # What was measured while a kept product ran again is no more; a bound holds from there on.
            others += rooms[later] if not kept[later] or layers[later].forward is None else []
            others += owns[later] if kept[later] else []
        if all(one.left >= 0 for one in owns[at]) and all(one.has(at, result) for one in others):
            kept[at] = True
            for one in chain(*rooms[at + 1 :], *owns[at + 1 :]):
                one.take(at, result)
    return kept


def foreseen(layers: Sequence[Layer], kept: Sequence[bool]) -> int | None:
    """Bytes at the peak of a step that keeps these, beyond what lives anyway; None: not measured."""
    peak = before = 0
    for at, (layer, keeps) in enumerate(zip(layers, kept, strict=True)):
        if layer.forward is None or layer.backward is None:
            return None
        own = [0] * len(layer.forward) + [keeps * _own(at, layer, one) for one in layer.backward]
        for moment, more in zip((*layer.forward, *layer.backward), own, strict=True):
            if moment.rebuilding is None or not kept[moment.rebuilding]:
                anyway = sum(layers[one].result for one in moment.standing if one < at and kept[one])
                anyway += sum(size for size, of in moment.early if any(kept[one] for one in of))
                peak = max(peak, before - anyway + more + moment.alive)
        before += layer.result * keeps
    return peak


def refuse(budget: int, lives: int, measured: int) -> None:
    """Where a step was measured that takes more, with nothing kept.

    Raises:
        RuntimeError: so it is.
    """
    if lives + measured > budget:
        raise RuntimeError(
            f"budget={budget:,} bytes: a training step of this shape takes {lives + measured:,}, with "
            f"nothing kept, as measured in its first step; {lives:,} of them live anyway (parameters, "
            f"inputs). {_HELP}"
        )


def within(budget: int, lives: int, layers: Sequence[Layer]) -> int:
    """Bytes that the step may have alive within a budget, of which some are what lives anyway.

    Raises:
        RuntimeError: it takes more, whatever is kept: what was measured, or else the least that it may be.
    """
    measured = foreseen(layers, [False] * len(layers))
    if measured is not None:
        refuse(budget, lives, measured)
        return budget - lives
    standing = _gradients(layers, all_of_them=False)
    taken = [layer.least + layer.held + one for layer, one in zip(layers, standing, strict=True)]
    at_least = layers[taken.index(max(taken))]
    least = max(*taken, standing[0])
    if lives + least > budget:
        learned = sum(layer.learned for layer in layers)
        raise RuntimeError(
            f"budget={budget:,} bytes: a training step of this shape takes at least {lives + least:,}, "
            f"whatever is kept: {lives:,} live anyway (parameters, inputs), {learned:,} are gradients of "
            f"parameters, {at_least.held:,} is held, {at_least.least:,} is the largest layer's. That is a "
            "bound from below, made of sizes: memory_report, without a budget, measures what a step takes. "
            f"{_HELP}"
        )
    return budget - lives


def _rooms(layers: Sequence[Layer], limit: int | None) -> tuple[list[list[_Room]], list[list[_Room]]]:
    """The room in each layer, and what is left of it where its own result is kept."""
    made = _gradients(layers, all_of_them=False)
    below = [math.inf] * len(layers)  # beside parameters' gradients
    for all_of_them in (False, True):
        standing = _gradients(layers, all_of_them)
        most = limit
        if most is None:
            most = max(layer.least + layer.held + one for layer, one in zip(layers, standing, strict=True))
        below = [min(one, most - gradients) for one, gradients in zip(below, standing, strict=True)]
    each = [_rooms_in(at, *one) for at, one in enumerate(zip(layers, below, made, strict=True))]
    return [rooms for rooms, _ in each], [own for _, own in each]


def _own(at: int, layer: Layer, moment: Moment) -> int:
    """What a layer's own result takes at a moment of its backward, where it is kept."""
    return layer.result if moment.overwriting or at not in moment.standing else 0


def _rooms_in(at: int, layer: Layer, below: float, made: int) -> tuple[list[_Room], list[_Room]]:
    """``made``: bytes of parameters' gradients that stood where it was measured."""
    if layer.forward is not None and layer.backward is not None:
        below += made
        rooms = [_Room(below - one.alive, one) for one in (*layer.forward, *layer.backward)]
        own_rooms = [_Room(below - one.alive, one) for one in layer.forward]
        for one in layer.backward:
            if one.rebuilding != at:
                own_rooms.append(_Room(below - one.alive - _own(at, layer, one), one))
                own_rooms[-1].not_early(at)
        return rooms, own_rooms
    if layer.unknown:
        return [_Room(-math.inf)], [_Room(-math.inf)]
    room = below - layer.most - layer.held
    return [_Room(room)], [_Room(room + layer.most - layer.rest if layer.shared else room - layer.result)]


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
