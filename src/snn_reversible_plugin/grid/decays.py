"""What undoing ``v = floor(beta * u + 1/2)`` on integers needs to know of beta.

The one idea: beta is a float32 and u an integer below 2^24, so their product fits a float64 exactly, and
whether a value has one preimage or several can be decided without a doubt. Source:
MacKay et al., "Reversible Recurrent Neural Networks", NeurIPS 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# NOTE [The lowest preimage]
#
# 1. It is ceil(q) for q = (V - 1/2) / beta. With beta = p / 2^e, p below 2^24, q differs from an integer
#    that it doesn't equal by at least 1 / p > 2^-24: (V - 1/2) - n beta is a multiple of 2^-e.
# 2. q is computed as V * inverse + offset in float64. The error is below 2^-26 for |q| up to 2^24 + 1/beta.
#    With MARGIN = 2^-25 subtracted, ceil of the computed value is right in all cases, also where q is an
#    integer, and whether the product and the sum are fused doesn't matter.
# 3. For beta > 1/2 there are two preimages iff ceil(q) - q < 1/beta - 1. The difference of the two sides is
#    0 or at least 2^-24 again, and as the computed q is low by MARGIN, 0 comes out as not less.
MARGIN = 2.0**-25
LOWEST = 2.0**-16

NONE, SUBTRACT, BEFORE, AFTER = "none", "subtract", "zero, then charge", "charge, then zero"


@dataclass(frozen=True, slots=True)
class Decay:
    """A decay factor and what follows from it: numbers, or float64 tensors with an element a neuron.

    ``radix`` is the largest number of preimages that a value can have; ``always_several``: none has one.
    """

    beta: Any
    inverse: Any
    offset: Any
    spare: Any
    radix: int
    always_several: bool

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Its factors for numpy."""
        factors = (self.beta, self.inverse, self.offset, self.spare)
        return factors if isinstance(self.beta, float) else tuple(f.numpy() for f in factors)


@dataclass(frozen=True, slots=True)
class Step:
    """``u -> decay(u) + current`` with a reset from the spikes of u.

    ``theta``: the threshold in units of the grid, a number or float32 [n]; ``scale`` is 2^bits;
    ``gain``: a constant that the current is multiplied with.
    """

    decay: Decay
    theta: Any
    reset: str
    scale: float
    gain: float | None = None


def decay_of(beta: float | Tensor, smallest: float, largest: float, whose: str) -> Decay:
    """The decay with these float32 factors: one number, or float64 [n] between the two given ones.

    On a device, where nobody looks at factors, they are float32, [1] or [n], and the two given ones are
    what room is made for.

    Raises:
        ValueError: a factor outside (0, 1], or so small that what it loses doesn't fit two bytes.
    """
    for value in (smallest, largest):
        if not 0 < value <= 1:
            raise ValueError(
                f"{whose}: a decay of {value:g} can't be undone on the grid, only one in (0, 1]. Keep it "
                'there, or convert with arithmetic="stock".'
            )
    if smallest < LOWEST:
        raise ValueError(
            f"{whose}: a decay of {smallest:g} forgets more in a step than two bytes tell. Use one of at "
            f'least {LOWEST:g}, or convert with arithmetic="stock".'
        )
    radix = math.ceil(1 / smallest)
    inverse: Any = 1 / (beta.double() if isinstance(beta, Tensor) else beta)
    always = radix == 2 and largest == 0.5
    return Decay(beta, inverse, -0.5 * inverse - MARGIN, inverse - 1, radix, always)


def digits_a_byte(radix: int) -> int:
    """How many digits of a radix up to 256 fit one byte."""
    each = 1
    while radix ** (each + 1) <= 256:
        each += 1
    return each
