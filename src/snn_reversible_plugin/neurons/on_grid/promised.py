"""The state after the first step of a timeline, where it is a promise.

The one idea: as of a sequence, the membrane that a network leaves after a single step is reset unread more
often than not. The timeline undoes its step from what the promise would give; who reads it makes it the
timeline's newest state. Source: this package's own.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.on_grid.places import NewState
from snn_reversible_plugin.neurons.on_grid.timeline import Timeline
from snn_reversible_plugin.tape.final_membrane import FinalMembrane
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.origins import enter


class Promised(Handle):
    """The newest state of a timeline, where nobody has read it."""

    treatment = "replayed"
    __slots__ = ("_promise",)

    def __init__(self, promise: FinalMembrane) -> None:
        self._promise = promise

    def get(self, last: bool) -> tuple[Tensor, bool]:
        return self._promise.look(), False

    def relies_on(self) -> Iterable[Handle]:
        return self._promise.held


class Left:
    """The place on a timeline of a state that was promised, for whoever reads it."""

    __slots__ = ("_ref", "_t")

    def __init__(self, timeline: Timeline) -> None:
        self._ref, self._t = timeline.ref, timeline.length

    def left(self, state: Tensor) -> None:
        """It was read. Where no tape records, nobody would know of a write to it: the timeline has a copy
        then, and the next step starts another."""
        timeline = self._ref()
        if timeline is None or timeline.length != self._t:
            return
        if tape.current() is None:
            timeline.hold(Kept(state.detach().clone()))
            return
        timeline.hold(tape.keep(state))
        enter(state, NewState(timeline, self._t))
        tape.returns(timeline, state, taken=0)  # the step that reads it counts itself
