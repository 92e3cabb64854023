"""The dyadic grid: rounding to multiples of 2^-bits, on which float addition can be undone.

The one idea: multiples of 2^-bits below 2^(24 - bits) are integers in disguise. Float32 holds every one of
them, so their sums and differences are exact, and ``(x + s) - s`` is ``x`` bit for bit. Pure functions; how
far values reach is :mod:`.grid.range`'s to watch.

Source: fixed-point reversibility as in MacKay et al., "Reversible Recurrent Neural
Networks", NeurIPS 2018, and Maclaurin et al., ICML 2015, without their integer arithmetic.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.decays import MARGIN

# NOTE [When x + s - s is x]
#
# 1. Let x and y be multiples of u = 2^-bits of magnitude below 2^24 u, and s any multiple of u. If
#    y = x + s, it is a float32, so the sum was exact, and so is y - s = x. Nothing is asked of s itself.
# 2. Rounding is monotonic: a sum that leaves the range is seen by the magnitude of the rounded sum.
# 3. Hence a walk back from the last value that checks each rebuilt value is enough: as long as all values
#    so far were in range, the next one is the forward's, and shows it if that one was not. The forward
#    needs no check of its own, and a value that nobody rebuilds needs none.
# 4. A sum that cancels is +0, so a stream may not hold -0: `snap` makes none. NaN and infinity are out
#    of range.

BITS = 16  # of a grid for values on the scale of 1
_PRECISION = {torch.float32: 24, torch.float64: 53}


class _Snap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: int) -> Tensor:
        ctx.dtype = z.dtype
        z = z.to(stream_dtype(z.dtype)) * 2.0**bits
        return z.round_().mul_(2.0**-bits).add_(0.0)  # -0 + 0 is +0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g.to(ctx.dtype), None


def snap(z: Tensor, bits: int = 16) -> Tensor:
    """Round to the nearest multiple of 2^-bits, ties to even; the gradient passes straight through.

    Args:
        z: any floating-point tensor. bfloat16 and float16 come out as float32.
        bits: binary digits behind the point, 0 to 23 (52 for float64).

    Returns:
        float32 (float64 for float64), the shape of ``z``, without negative zeros.

    Raises:
        TypeError: ``z`` is not of a floating-point type.
        ValueError: ``bits`` is out of range.

    Example:
        >>> import torch
        >>> snap(torch.tensor([0.3, -0.01]), bits=2)
        tensor([0.2500, 0.0000])
    """
    check_bits(bits, stream_dtype(z.dtype))
    return _Snap.apply(z, bits)  # type: ignore[no-any-return, no-untyped-call]


def snap_number(z: float, bits: int) -> float:
    """What :func:`snap` makes of a float32 tensor that is full of a finite number.

    Example:
        >>> snap_number(0.3, bits=2)
        0.25
    """
    return round(ctypes.c_float(z).value * 2.0**bits) / 2.0**bits


def add_snapped(x: Tensor, z: Tensor, bits: int) -> Tensor:
    """``x + snap(z)`` where no gradient is wanted: x on the grid, one new tensor, fewer passes over it.

    Example:
        >>> import torch
        >>> add_snapped(torch.tensor([1.0]), torch.tensor([0.3]), bits=2)
        tensor([1.2500])
    """
    units = z.to(stream_dtype(z.dtype)).mul(2.0**bits).round_()
    # Scaling by a power of two is exact, and 0 + -0 is +0: the streams' zeros stay positive.
    out = units if units.stride() == x.stride() and units.dtype == x.dtype else None
    return torch.add(x, units, alpha=2.0**-bits, out=out)


def sub_snapped_(x: Tensor, z: Tensor, bits: int) -> None:
    """Take ``snap(z)`` away from x, in place: undoes :func:`add_snapped`.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.25])
        >>> sub_snapped_(x, torch.tensor([0.3]), bits=2)
        >>> x
        tensor([1.])
    """
    x.sub_(z.to(stream_dtype(z.dtype)).mul(2.0**bits).round_(), alpha=2.0**-bits)


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, beta: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(u if ctx.needs_input_grad[1] else None, beta)
        units = u.double() * 2.0**bits
        return units.mul_(beta.double()).add_(0.5).floor_().mul_(2.0**-bits).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        u, beta = ctx.saved_tensors
        of_u = g * beta if ctx.needs_input_grad[0] else None
        of_beta = None if u is None else (g * u).sum_to_size(beta.shape).to(beta.dtype)
        return of_u, of_beta, None


def decay(u: Tensor, beta: Tensor | float, bits: int = 16) -> Tensor:
    """``beta * u`` rounded to the grid, halves up; the gradient is that of ``beta * u``.

    Args:
        u: float32 multiples of 2^-bits of magnitude below ``limit(bits)``.
        beta: factors, float32, a number or of a shape that broadcasts to ``u``'s. Those in (0, 1] are
            undone by :func:`undecay`, any by :mod:`.grid.products`.
        bits: binary digits behind the point.

    Example:
        >>> import torch
        >>> decay(torch.tensor([0.75, -0.5]), 0.5, bits=2)
        tensor([ 0.5000, -0.2500])
    """
    return _Decay.apply(u, torch.as_tensor(beta, dtype=torch.float32, device=u.device), bits)  # type: ignore


def remainder(u: Tensor, beta: Tensor | float, bits: int = 16) -> Tensor:
    """Which of the values that decay to ``decay(u, beta, bits)`` u is, counted from the lowest: int64.

    Example:
        >>> import torch
        >>> remainder(torch.tensor([0.5, 0.75, 0.0]), 0.5, bits=2)
        tensor([1, 0, 1])
    """
    beta = torch.as_tensor(beta, dtype=torch.float32).double()
    y = u.double().mul_(2.0**bits).mul_(beta).add_(0.5)
    return (y - y.floor()).div_(beta).floor_().long()


def undecay(v: Tensor, remainder: Tensor, beta: Tensor | float, bits: int = 16) -> Tensor:
    """The inverse of :func:`decay`, exact: needs what :func:`remainder` told.

    Example:
        >>> import torch
        >>> u = torch.tensor([0.5, 0.75, 0.0])
        >>> undecay(decay(u, 0.5, bits=2), remainder(u, 0.5, bits=2), 0.5, bits=2)
        tensor([0.5000, 0.7500, 0.0000])
    """
    beta = torch.as_tensor(beta, dtype=torch.float32).double()
    q = (v.double() * 2.0**bits - 0.5).div_(beta)
    return q.sub_(MARGIN).ceil_().add_(remainder).add_(0.0).mul_(2.0**-bits).to(v.dtype)


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of a stream that values of ``dtype`` are added to.

    Example:
        >>> stream_dtype(torch.bfloat16)
        torch.float32
    """
    if not dtype.is_floating_point:
        raise TypeError(f"the grid takes floating-point tensors, not {dtype}: cast it, to float32 say")
    return torch.float64 if dtype is torch.float64 else torch.float32


def limit(bits: int, dtype: torch.dtype = torch.float32) -> float:
    """The magnitude that streams must stay below, 2^(24 - bits) in float32.

    Example:
        >>> limit(16)
        256.0
    """
    return 2.0 ** (_PRECISION[dtype] - bits)


def bits_for(scale: float) -> int:
    """Binary digits behind the point for a neuron whose threshold (or reset) has this magnitude.

    A threshold of 1 gets 16: multiples of 2^-16 below 256. Each factor of two above it takes a bit, so that
    there is always room for 128 thresholds. Each factor of sixteen below it adds three, not four: inputs
    rarely shrink as far as a threshold does.

    Args:
        scale: 0, infinity and NaN count as 1.

    Returns:
        0 to 23.

    Example:
        >>> [bits_for(threshold) for threshold in (0.001, 0.01, 0.1, 0.5, 1.0, 1.9, 20.0, 300.0, 1e9)]
        [22, 20, 18, 16, 16, 16, 12, 8, 0]
    """
    if not math.isfinite(scale) or scale == 0:
        return BITS
    exponent = math.log2(abs(scale))
    finer = -math.floor(exponent) if exponent >= 0 else 3 * -math.ceil(exponent) // 4
    return min(max(BITS + finer, 0), _PRECISION[torch.float32] - 1)


def check_bits(bits: int, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a number of bits that the type has no room for.

    Example:
        >>> check_bits(16)
        >>> check_bits(24)
        Traceback (most recent call last):
        ValueError: bits must be an integer from 0 to 23 for torch.float32, not 24
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 0 <= bits < _PRECISION[dtype]:
        raise ValueError(
            f"bits must be an integer from 0 to {_PRECISION[dtype] - 1} for {dtype}, not {bits!r}"
        )
