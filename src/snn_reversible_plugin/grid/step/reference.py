"""One neuron's step on the grid and back in plain torch, on any device: the specification.

Records have a size that is known beforehand, so that nothing waits for the device: a digit for every
neuron where it may have one, and the whole state where a reset to a value could have lost it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snn_reversible_plugin.grid.decays import AFTER, BEFORE, SUBTRACT, Decay, Step, digits_a_byte
from snn_reversible_plugin.grid.range import LOST, larger
from snn_reversible_plugin.grid.step import Record
from snn_reversible_plugin.ops.bits import reference as bits_form


def as_pieces(chunk: Tensor) -> Tensor:
    """Bytes as this form reads and writes them."""
    return chunk


def fire(h: Tensor, threshold: Any, inclusive: bool, out: Tensor) -> Tensor:
    """See :func:`.grid.step.on_numpy.fire`."""
    flags = h.ge(threshold) if inclusive else h.gt(threshold)
    out.copy_(flags)
    return bits_form.pack_bits(flags)


def fired(bits: Tensor, out: Tensor) -> None:
    """See :func:`.grid.step.on_numpy.fired`."""
    bits_form.unpack_bits(bits, out)


def reach(state: Tensor) -> Tensor:
    """The largest magnitude; NaN if there is one."""
    if not len(state):
        return state.new_zeros(())
    low, high = state.aminmax()
    return torch.maximum(low.neg_(), high)


def charge(
    u: Tensor,
    current: Tensor,
    bits: Tensor | None,
    step: Step,
    record: Record | None,
    out: Tensor,
    fires: tuple[Any, bool, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor, Any]:
    """See :func:`.grid.step.on_numpy.charge`."""
    pieces: list[Tensor] = []
    spikes = None if bits is None else _spikes(bits, u)
    whole = step.reset in (BEFORE, AFTER)
    if whole and record is not None:
        pieces.append(u.clone().view(torch.uint8))
    a = u.double().mul_(step.scale)
    if spikes is not None and whole:
        a.mul_(1 - spikes)
    v = a.mul_(step.decay.beta).add_(0.5).floor()
    unfit = None
    if record is not None and not whole:
        digits = a.sub_(v).div_(step.decay.beta).floor_()
        if isinstance(step.decay.beta, Tensor):
            unfit = (digits >= step.decay.radix).any()  # nobody looked at its factors
        pieces += _digits(step.decay, digits)
    w = v.float()
    if spikes is not None and step.reset == SUBTRACT:
        w.sub_(spikes * step.theta)
    w.add_(_current_units(current, step))
    if spikes is not None and step.reset == AFTER:
        w = w.masked_fill_(spikes != 0, 0.0)
    torch.mul(w, 1 / step.scale, out=out)
    size = reach(out)
    if unfit is not None:
        size = torch.where(unfit, LOST, size)
    if record is not None and record.reach is not None:
        size = larger(record.reach, size)
    return pieces, size, None if fires is None else fire(out, *fires)


def undo(state: Tensor, current: Tensor, bits: Tensor | None, step: Step, record: Tensor) -> Tensor:
    """See :func:`.grid.step.on_numpy.undo`."""
    if step.reset in (BEFORE, AFTER):
        return record.clone().view(torch.float32)
    w = (state * step.scale).sub_(_current_units(current, step))
    if step.reset == SUBTRACT:
        assert bits is not None
        w.add_(_spikes(bits, state) * step.theta)
    decay = step.decay
    if decay.radix == 1:
        return w.mul_(1 / step.scale)
    lowest = w.double().mul_(decay.inverse).add_(decay.offset).ceil_()
    lowest.add_(_read_digits(decay, record, len(w)))
    return lowest.add_(0.0).mul_(1 / step.scale).float()


def reset(
    h: Tensor, spikes: Tensor, theta: Any, to: float | None, scale: float, record: bool, out: Tensor
) -> tuple[list[Tensor], Tensor]:
    """See :func:`.grid.step.on_numpy.reset`."""
    if to is None:
        torch.sub(h, spikes * (theta / scale), out=out)
        return [], reach(out)
    out.copy_(torch.where(spikes != 0, to, h))
    return [h.clone().view(torch.uint8)] if record else [], reach(out)


def unreset(v: Tensor, bits: Tensor, theta: Any, to: float | None, scale: float, record: Tensor) -> Tensor:
    """See :func:`.grid.step.on_numpy.unreset`."""
    if to is None:
        return v + _spikes(bits, v) * (theta / scale)
    return record.clone().view(torch.float32)


def gate(g: Tensor, factor: Any, bits: Tensor, out: Tensor) -> None:
    """Write ``g * factor`` times 0 where neurons fired; ``factor``: a number, or float32 [n]."""
    torch.mul(g, factor, out=out).mul_(1 - _spikes(bits, g))


def add_past_reset(h: Tensor, threshold: float, g: Tensor, out: Tensor) -> None:
    """Add the gradient g of what a hard reset leaves of ``h``: 0 where it fires, with its threshold."""
    out.add_(g * (1.0 - (h - threshold >= 0).to(h)))


def add_through_reset(h: Tensor, threshold: float, to: float | None, g_v: Tensor, g_s: Tensor) -> None:
    """Add to the spikes' gradient what comes to them through a reset, from that of what it leaves."""
    if to is None:
        g_s.add_(-g_v * threshold)
    else:
        g_s.add_(-(g_v * h)).add_(g_v * to)


def _spikes(bits: Tensor, like: Tensor) -> Tensor:
    spikes = torch.empty_like(like)
    bits_form.unpack_bits(bits, spikes)
    return spikes


def _current_units(current: Tensor, step: Step) -> Tensor:
    if step.gain is None:
        return (current * step.scale).round_()
    return (current * step.gain).mul_(step.scale).round_()


def _digits(decay: Decay, digits: Tensor) -> list[Tensor]:
    if decay.radix == 1:
        return []
    if decay.radix == 2:
        return [bits_form.pack_bits(digits)]
    if decay.radix > 256:
        low = digits.remainder(256)
        return [torch.stack((low, (digits - low) / 256), 1).to(torch.uint8).view(-1)]
    each = digits_a_byte(decay.radix)
    rows = torch.nn.functional.pad(digits, (0, -len(digits) % each)).view(-1, each)
    total = rows[:, each - 1].clone()
    for place in reversed(range(each - 1)):
        total.mul_(decay.radix).add_(rows[:, place])
    return [total.to(torch.uint8)]


def _read_digits(decay: Decay, record: Tensor, n: int) -> Tensor:
    digits = torch.empty(n, dtype=torch.float64, device=record.device)
    if decay.radix == 2:
        bits_form.unpack_bits(record, digits)
        return digits
    if decay.radix > 256:
        pairs = record.view(n, 2).double()
        return pairs[:, 0] + 256 * pairs[:, 1]
    rest = record.double()
    places = []
    for _ in range(digits_a_byte(decay.radix)):
        places.append(rest.remainder(decay.radix))
        rest = rest.div(decay.radix).floor()
    return torch.stack(places, 1).view(-1)[:n]
