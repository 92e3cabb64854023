"""Bytes for people: in B, KiB, MiB or GiB, each 1024 times the one before.

The one idea: the unit follows the size, so that a small network's bytes are no row of zeros.
"""

from __future__ import annotations

_UNITS = "B", "KiB", "MiB", "GiB"


def unit_of(count: float) -> tuple[str, int]:
    """The unit that shows a number of bytes best, and how many bytes it is.

    Example:
        >>> unit_of(3 << 20), unit_of(100)
        (('MiB', 1048576), ('B', 1))
    """
    power = max((place for place in range(len(_UNITS)) if count >= 1024**place), default=0)
    return _UNITS[power], 1024**power


def shown(count: int) -> str:
    """A number of bytes.

    Example:
        >>> shown(0), shown(1536), shown(3 << 30)
        ('0 B', '1.50 KiB', '3.00 GiB')
    """
    unit, size = unit_of(count)
    return f"{count:,} B" if size == 1 else f"{count / size:,.2f} {unit}"
