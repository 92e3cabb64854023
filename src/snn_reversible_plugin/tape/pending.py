"""A forward that was measured, and whose plan waits for its backward.

The one idea: what a step takes says what the next one takes, unless that starts from what the first left.

Source: this package's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from snn_reversible_plugin.tape.choice import foreseen
from snn_reversible_plugin.tape.measured import Measured
from snn_reversible_plugin.tape.sizes import Layer, Sizes

# NOTE [What a step starts from]
#
# Membranes stay from one forward to the next in online rules and in truncated BPTT, and so does an output
# that a variable names, and the gradient that an earlier backward has left. The first step has none of it.
# A later one has the old membranes beside the new ones, until each is replaced. Where more than LEFT of a
# step stands at the start of the next one than stood at its own, the next one is measured itself.
#
# For example, a first step takes 72 MB and leaves membranes of 25, which is more than a hundredth. The
# second starts from 25, takes 97 and leaves 25 again, as much as it started from: 97 is what is foreseen.

LEFT = 0.01


class Pending(NamedTuple):
    """What is known of a forward.

    ``lives``: bytes that live beside what the step takes; ``before``: that a GPU's allocator had given out;
    ``left``: that earlier forwards had made and that were alive when it began; ``gradients``: of the
    parameters' gradients that stood then.
    """

    products: tuple[Any, ...]
    layers: list[Layer]
    lives: int
    measured: Measured | None
    sizes: Sizes
    before: int
    left: int
    gradients: int

    def more(self, left: int) -> int:
        """Bytes that a step which begins now starts from, and it did not; ``left``: what forwards made."""
        return left - self.left + self.sizes.gradients_now() - self.gradients

    def is_outgrown(self, left: int, takes: int | None) -> bool:
        """Whether a step of its shape that begins now starts from so much more that it is measured itself.

        ``left``: as above; ``takes``: bytes, as measured; None: nobody knows."""
        return takes is not None and self.more(left) > LEFT * takes

    def takes(self) -> int | None:
        """Bytes of its step in all, with nothing kept; None: not measured."""
        beyond = foreseen(self.layers, [False] * len(self.layers))
        return None if beyond is None else self.lives + beyond

    def starting_from(self, left: int) -> Pending:
        """The same, with as much more alive as a step starts from that begins now."""
        lives, gradients = self.lives + max(0, self.more(left)), self.sizes.gradients_now()
        return self._replace(lives=lives, left=left, gradients=gradients)
