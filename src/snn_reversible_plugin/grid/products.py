"""Products with any factor that can be undone: the factor may be negative, above 1, or next to nothing.

The one idea: ``floor(alpha * u + 1/2)`` on the grid is a decay of ``u``, or of ``-u``; several ``u`` that
come to one value are told apart by a digit, and where alpha is so small that digits would not do, ``u``
itself is stored. Source: MacKay et al., "Reversible Recurrent Neural Networks", NeurIPS 2018, for factors
in (0, 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snn_reversible_plugin.grid.decays import MARGIN
from snn_reversible_plugin.grid.digits import pack_digits, unpack_digits
from snn_reversible_plugin.grid.range import LOST
from snn_reversible_plugin.ops import devices
from snn_reversible_plugin.ops.devices import may_look

# NOTE [What is stored of a product]
#
# 1. alpha * u = |alpha| * (-u) for a negative alpha, so only magnitudes matter. In units of the grid u is
#    an integer below 2^24, |alpha| a float32: their product is exact in float64.
# 2. The values that go to V are those from ceil((V - 1/2) / |alpha|) on, at most ceil(1 / |alpha|) of them:
#    one where |alpha| >= 1, so that nothing is stored; two where |alpha| >= 1/2, a bit.
# 3. The note in `decays` on the computed quotient holds for factors above 1 too: with alpha = p / 2^e and
#    p below 2^24, (V - 1/2) / alpha differs from an integer that it doesn't equal by at least 1 / p; where
#    e is negative or 0, alpha is an integer, and it differs by 1 / (2 alpha) at least, which exceeds the
#    margin below LARGEST.
# 4. An alpha outside [SMALLEST, LARGEST), zero and NaN among them, has no digits: the value is stored.
#
# 5. On a device nobody looks at alpha. Room is made by what was seen of it at the end of the last backward,
#    for half of that; where that is below SMALL, or not in range, values are stored, which fits any alpha.
#    Whether an alpha has left its room is told with the states' reaches (grid.range).
#
# Worked example, bits = 2, alpha = 0.5: u = 0.5 is 2 units and u = 0.25 one unit; floor(0.5 * 2 + 0.5) = 1
# and floor(0.5 * 1 + 0.5) = 1. The lowest value that goes to 1 is ceil((1 - 0.5) / 0.5) = 1 unit, so the
# digits are 1 and 0.

SMALLEST, LARGEST = 1 / 256, 2.0**16
SMALL, HEADROOM = 1 / 8, 2
PIECES, LEAST = 16, 1 << 13  # parts of a tensor, and the fewest elements that are worth an operation


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor, and what undoing a product with it takes.

    ``alpha`` is float32, ``radix`` one more than the largest digit, ``stores``: where the value itself is
    stored, in alpha's shape; None if nowhere, True if everywhere. ``reach``: on a device, for
    :func:`...grid.range.watch`, whether the factor is in its room.
    """

    alpha: Tensor
    radix: int
    stores: Tensor | bool | None
    reach: Tensor | None = None


class Room:
    """What is known of some factors that change from step to step, by who multiplies with them."""

    def __init__(self) -> None:
        self.told: list[list[float]] = []

    def look(self, seen: Tensor) -> None:
        """See what :func:`_seen` saw. Waits for the device, so not in a captured graph."""
        if not devices.is_capturing():
            self.told = seen.tolist()


def factors(alphas: Sequence[Tensor], room: Room | None = None) -> tuple[list[Factor], Tensor | None]:
    """What is to be known of some factors.

    Args:
        alphas: of any shape and size, on one device.
        room: for a device; without one, or while it knows nothing of these factors, this waits.

    Returns:
        The factors, and what is to be looked at by the room when the backward is over; None on a CPU.

    Example:
        >>> import torch
        >>> found, _ = factors([torch.tensor([0.5, -1.5]), torch.tensor([0.2])])
        >>> [factor.radix for factor in found]
        [2, 5]
    """
    if not alphas:
        return [], None
    seen = torch.stack([_seen(alpha.detach().float()) for alpha in alphas])
    if room is None or may_look(seen.device):
        told = seen.tolist()
        return [_exactly(alpha, *one) for alpha, one in zip(alphas, told, strict=True)], None
    if len(room.told) != len(alphas):
        room.look(seen)
    rooms = zip(alphas, room.told, seen.unbind(), strict=True)
    return [_with_room(alpha, now, *told) for alpha, told, now in rooms], seen


def _seen(alpha: Tensor) -> Tensor:
    """The smallest magnitude of those that have digits, and whether all have."""
    has_digits = _has_digits(alpha)
    return torch.stack((torch.where(has_digits, alpha.abs(), 1.0).amin(), has_digits.all()))


def _exactly(alpha: Tensor, smallest: float, all_digits: float) -> Factor:
    alpha = alpha.detach().float()
    return Factor(alpha, math.ceil(1 / smallest), None if all_digits else ~_has_digits(alpha))


def _with_room(alpha: Tensor, now: Tensor, smallest: float, all_digits: float) -> Factor:
    alpha = alpha.detach().float()
    if not all_digits or smallest < SMALL:
        return Factor(alpha, 1, True)
    radix = math.ceil(HEADROOM / smallest)
    fits = (now[0] >= 1 / radix) & (now[1] == 1)
    return Factor(alpha, radix, None, torch.where(fits, 0.0, LOST))


def _has_digits(alpha: Tensor) -> Tensor:
    size = alpha.abs()
    return (size >= SMALLEST) & (size < LARGEST)


def multiply(u: Tensor, factor: Factor, bits: int) -> tuple[Tensor, list[Tensor]]:
    """``alpha * u`` rounded to the grid, as :func:`decay` does, and what :func:`divide` needs.

    Args:
        u: float32 multiples of 2^-bits.
        factor: of :func:`factors`, of a shape that broadcasts to ``u``'s.
        bits: binary digits behind the point.

    Example:
        >>> import torch
        >>> (factor,), _ = factors([torch.tensor([-0.5])])
        >>> u = torch.tensor([0.75, -0.5, 0.25])
        >>> product, record = multiply(u, factor, bits=2)
        >>> product, divide(product, factor, record, bits=2)
        (tensor([-0.2500,  0.2500,  0.0000]), tensor([ 0.7500, -0.5000,  0.2500]))
    """
    product, digits = torch.empty_like(u), torch.empty(u.shape, dtype=torch.uint8, device=u.device)
    for alpha, of_u, of_product, of_digits in _pieces(factor.alpha, u, product, digits):
        y = of_u.double().mul_(2.0**bits).mul_(alpha).add_(0.5)
        whole = y.floor()
        torch.mul(whole, 2.0**-bits, out=of_product)
        if factor.radix > 1:
            of_digits.copy_(y.sub_(whole).div_(alpha.abs()).floor_().clamp_(0, factor.radix - 1))
    record = [pack_digits(digits.view(-1), factor.radix)] if factor.radix > 1 else []
    if isinstance(factor.stores, Tensor):
        record.append(u.masked_select(factor.stores))
    elif factor.stores:
        record.append(u.clone())
    return product, record


def divide(product: Tensor, factor: Factor, record: Sequence[Tensor], bits: int) -> Tensor:
    """The ``u`` of :func:`multiply`, bit for bit; see there."""
    if factor.stores is True:
        return record[0].clone()
    u = torch.empty_like(product)
    digits = product.new_zeros((), dtype=torch.uint8).expand(product.shape)
    if factor.radix > 1:
        digits = unpack_digits(record[0], factor.radix, product.numel()).view(product.shape)
    for alpha, of_u, of_product, of_digits in _pieces(factor.alpha, u, product, digits):
        units = of_product.double().mul_(2.0**bits).sub_(0.5).div_(alpha.abs()).sub_(MARGIN).ceil_()
        units.add_(of_digits).mul_(torch.where(alpha < 0, -1.0, 1.0)).add_(0.0)
        torch.mul(units, 2.0**-bits, out=of_u)
    if factor.stores is not None:
        assert isinstance(factor.stores, Tensor)
        u.masked_scatter_(factor.stores, record[-1])
    return u


def _pieces(alpha: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts along the first dimension, and their factors: float64 is kept to one part at a time."""
    alpha, first = alpha.double(), tensors[0]
    if not first.dim() or (alpha.dim() == first.dim() and len(alpha) != 1):
        return iter([(alpha, *tensors)])
    parts = max(1, min(PIECES, len(first), first.numel() // LEAST))
    return zip(itertools.repeat(alpha), *(tensor.chunk(parts) for tensor in tensors), strict=False)
