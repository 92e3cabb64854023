"""How far values on the grid reach, and the one look at it.

The one idea: whether a value left the range shows in its magnitude, and to look at a magnitude waits for
the device that it is on. So whoever rebuilds values hands in their reaches as they arise, and all of them
are looked at together when the backward is over. Source: this package's own.
"""

from __future__ import annotations

import math
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from snn_reversible_plugin.grid.numbers import limit
from snn_reversible_plugin.ops import devices
from snn_reversible_plugin.ops.devices import may_look

# NOTE [When a reach is looked at]
#
# 1. When the backward (autograd's graph task) in which it was handed in has ended, by the callback that
#    autograd runs then; outside of a backward at once.
# 2. A backward that raised or was interrupted calls nothing back. So the callback owns what was handed in,
#    and goes with its task; here stands a weak reference. Nothing of it is left for the next backward.
# 3. A backward inside a backward is a task of its own, with its own look.
# 4. On a CPU the forward of a neuron's step has the number anyway, and looks at once: `check_step`.
# 5. While a CUDA graph is captured nothing has run yet, and nothing may wait. So what is handed in stays,
#    for each replay writes it anew, and is looked at before the next step of an optimizer that is no part
#    of a graph, with the next look that may wait, and by `look_at_graphs`. It is held as long as the
#    process, or until something of the same name is captured: a few bytes a layer.
#    Say a step is captured whole, its optimizer too: nobody looks unless the loop calls `look_at_graphs`
#    now and then.

REMEDY = "Use fewer bits (each one less doubles the range), or normalize the branches."
LOST = struct.unpack("f", struct.pack("I", 0x7FC05EED))[0]  # a NaN that no arithmetic makes
_OF_LOST = (
    "A decay has moved below what room was made for when the network was converted, or out of (0, 1], or a "
    'state out of range. Keep it there, convert again between two steps, or use arithmetic="stock".'
)
_OF_NAN = "Look for NaN in inputs and parameters (torch.isnan), and for 0 / 0 or inf - inf before it."
_OF_INFINITY = (
    "Look for infinity in inputs and parameters (torch.isinf), and for what overflowed before it."
)


class _Reached(NamedTuple):
    name: str
    reach: Tensor
    bits: int
    remedy: str
    lost: str


class _Look:
    """What one backward has handed in; autograd calls it when the backward is over."""

    __slots__ = ("__weakref__", "reached")

    def __init__(self) -> None:
        self.reached: list[_Reached] = []

    def __call__(self) -> None:
        _look_at(self.reached)


_captured: dict[str, _Reached] = {}


def _look_at(reached: Sequence[_Reached]) -> None:
    if devices.is_capturing():
        _captured.update({one.name: one for one in reached})
        return
    _check((*reached, *_captured.values()))


def look_at_graphs(*_: Any) -> None:
    """Raise if a step on the grid left its range in a CUDA graph that was replayed. Waits for the device.

    A captured step can't look by itself. It is looked at before each step of an optimizer outside of the
    graph; where that is inside, call this now and then.

    Raises:
        OverflowError: as :func:`check_range`; the gradients since the last look may be wrong.

    Example:
        >>> import snn_reversible_plugin as srp
        >>> srp.look_at_graphs()
    """
    if _captured and not devices.is_capturing():
        _check(_captured.values())


register_optimizer_step_pre_hook(look_at_graphs)
_looks: weakref.WeakValueDictionary[int, _Look] = weakref.WeakValueDictionary()


def reach(stream: Tensor) -> Tensor:
    """The largest magnitude in a stream, on its device, without waiting for it; NaN if it holds one.

    Example:
        >>> import torch
        >>> reach(torch.tensor([0.5, -2.0]))
        tensor(2.)
    """
    if stream.numel() == 0:
        return stream.new_zeros(())
    low, high = torch.aminmax(stream.detach())
    return torch.maximum(low.neg_(), high)


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two reaches, NaN above all; :data:`LOST`, one of them, stays what it is."""
    # Below their sign, the bits of floats are ordered as the floats are.
    return torch.maximum(a.view(torch.int32), b.view(torch.int32)).view(torch.float32)


def watch(name: str, reach: Tensor, bits: int, remedy: str = REMEDY, lost: str = _OF_LOST) -> None:
    """Look at a reach when the backward that runs here has ended, or now if none does.

    Args:
        name: what has that reach, for the error: a module, and which of its values.
        reach: what :func:`reach` returned.
        bits: the grid's.
        remedy: what to do against values that are too large, the error's last sentence.
        lost: the same where the reach is :data:`LOST`.

    Raises:
        OverflowError: from the backward, at its end, as :func:`check_range`.

    Example:
        >>> import torch
        >>> watch("block 3: its stream", reach(torch.tensor([200.0])), bits=16)
        >>> watch("block 3: its stream", reach(torch.tensor([300.0])), bits=16)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        OverflowError: block 3: its stream ...
    """
    reached = _Reached(name, reach, bits, remedy, lost)
    task = torch._C._current_graph_task_id()
    if task == -1:
        _look_at([reached])
        return
    look = _looks.get(task)
    if look is None:
        look = _looks[task] = _Look()
        when_over(look)
    look.reached.append(reached)


def when_over(callback: Callable[[], None]) -> None:
    """Call back when the backward that runs here has ended, where waiting for a device costs least.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> _ = x.register_hook(lambda _: when_over(lambda: print("over")))
        >>> x.sum().backward()
        over
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def check_step(reach: Any, name: str, bits: int, remedy: str) -> Tensor | None:
    """Raise if a step's reach is out of range, where looking at it doesn't wait for a device.

    Args:
        reach: a number or a tensor.
        name, bits, remedy: as for :func:`watch`.

    Returns:
        A reach that is on a device: it is to be watched in the backward.
    """
    if isinstance(reach, Tensor) and not may_look(reach.device):
        return reach
    if not reach < limit(bits):
        raise _left(name, float(reach), bits, limit(bits), remedy)
    return None


def check_range(names: Sequence[str], reaches: Sequence[Tensor], bits: int, remedy: str = REMEDY) -> None:
    """Raise if a stream left the range in which the grid is exact. Waits for the device, once.

    Args:
        names: what each stream is, for the error.
        reaches: what :func:`reach` returned for each.
        bits: the grid's.
        remedy: what to do against values that are too large, the error's last sentence.

    Raises:
        OverflowError: naming the first stream that left, its magnitude, and what to do; a stream that holds
            NaN or infinity is said to.

    Example:
        >>> import torch
        >>> check_range(["block 3: x1"], [reach(torch.tensor([300.0]))], bits=16)
        Traceback (most recent call last):
        ...
        OverflowError: block 3: x1 reaches 300, and with bits=16 a grid is exact below 256 ...
        >>> check_range(["block 3: x1"], [reach(torch.tensor([0.0, float("nan")]))], bits=16)
        Traceback (most recent call last):
        ...
        OverflowError: block 3: x1 holds NaN, ...
    """
    _check(
        [_Reached(name, value, bits, remedy, _OF_LOST) for name, value in zip(names, reaches, strict=True)]
    )


def _check(reached: Iterable[_Reached]) -> None:
    """Raise for the first that is out of range, after one wait a device."""
    groups: dict[tuple[torch.device, torch.dtype], list[_Reached]] = {}
    for one in reached:
        groups.setdefault((one.reach.device, one.reach.dtype), []).append(one)
    for (_, dtype), group in groups.items():
        values = torch.stack([one.reach for one in group]).tolist()
        for one, value in zip(group, values, strict=True):
            bound = limit(one.bits, dtype)
            if not value < bound:
                raise _left(one.name, value, one.bits, bound, one.remedy, one.lost)


def _left(
    name: str, value: float, bits: int, bound: float, remedy: str, lost: str = _OF_LOST
) -> OverflowError:
    found = f"reaches {value:g}, and with bits={bits} a grid is exact below {bound:g} only"
    if math.isnan(value) and struct.pack("f", value) == struct.pack("f", LOST):
        found, remedy = "lost more in a step than its records hold", lost
    elif math.isnan(value):
        found, remedy = "holds NaN, which no grid has", _OF_NAN
    elif math.isinf(value):
        found, remedy = "is infinite, which no grid reaches", _OF_INFINITY
    return OverflowError(f"{name} {found}: what came before it can't be rebuilt. {remedy}")
