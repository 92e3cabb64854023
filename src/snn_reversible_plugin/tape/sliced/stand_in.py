"""What autograd gets in place of a large tensor that it saved: a tensor without a storage.

The one idea: the node that unpacks it hands it to the one operator of its backward, and that is where a
tensor subclass may say how it is computed. Only nodes that are known to do so get one. Source: the contract
of ``__torch_dispatch__``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from snn_reversible_plugin.tape import handles
from snn_reversible_plugin.tape.handles import Handle, Kept
from snn_reversible_plugin.tape.operators import aten
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced.alone import spare_gradient
from snn_reversible_plugin.tape.sliced.cut import Cut
from snn_reversible_plugin.tape.sliced.filled import Filled
from snn_reversible_plugin.tape.sliced.gradients import BY_SLICES, Turned
from snn_reversible_plugin.tape.sliced.noted import size_of
from snn_reversible_plugin.tape.sliced.rows import Whole, rows_of
from snn_reversible_plugin.tape.sliced.sources import given_to_norm

# NOTE [What three ask for]
#
# A neuron's backward asks for slices of its current, and that of the batch norm in front of it, twice, for
# slices of what it was given: three products more. Where there is room (`room`) what the norm was given is
# put together for the first and stands until the last has it, so that the product runs again once. For
# example a VGG of equal layers: in the forward a layer's spikes and its convolution's result stand; in the
# backward its gradient, which each operator overwrites, and that result.

# Nodes whose backward is an operator of `gradients`.
TAKERS = frozenset(
    ["ConvolutionBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0",
     "MaxPool2DWithIndicesBackward0", "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0",
     "MmBackward0", "AddmmBackward0", "BmmBackward0", "MulBackward0"]
)  # fmt: skip
_PRODUCTS = frozenset(["MmBackward0", "AddmmBackward0"])
_UNTURNED = (aten.detach.default, aten.alias.default)
_TURNED = (aten.t.default, aten.transpose.int)


class StandIn(Tensor):
    """Stands for what a :class:`.Cut` gives, or for that with its last two dimensions exchanged."""

    cut: Cut
    turned: bool

    @staticmethod
    def __new__(cls, cut: Cut, turned: bool = False) -> StandIn:
        size, stride = list(cut.size), list(cut.stride)
        if turned:
            size[-2:], stride[-2:] = size[:-3:-1], stride[:-3:-1]
        one = Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=cut.dtype, device=cut.device)  # type: ignore[attr-defined]
        one.cut, one.turned = cut, turned
        return one  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _UNTURNED:
            return StandIn(args[0].cut, args[0].turned)
        if func in _TURNED and args[0].dim() > 1 and _exchanges_last_two(args):
            return StandIn(args[0].cut, not args[0].turned)
        by_slices = BY_SLICES.get(func)
        cuts = {id(one.cut): one.cut for one in args if isinstance(one, StandIn)}
        try:
            if by_slices is not None and not kwargs:
                spare = spare_gradient(func, args)
                beside = {} if spare is None else {"spare": spare}
                return by_slices(func, *map(_opened, args), **beside)
        except Whole:
            pass  # said to be possible: the tensor is put together
        finally:
            for cut in cuts.values():
                cut.release()
        return func(*tree_map(_whole, args), **tree_map(_whole, kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn({self.cut.treatment}, {tuple(self.shape)}, {self.dtype})"


def _exchanges_last_two(args: tuple[Any, ...]) -> bool:
    dims = args[0].dim()
    return sorted(dim % dims for dim in args[1:] or (0, 1)) == [dims - 2, dims - 1]


def _opened(arg: Any) -> Any:
    if not isinstance(arg, StandIn):
        return arg
    return Turned(arg.cut) if arg.turned else arg.cut


def _whole(arg: Any) -> Any:
    if not isinstance(arg, StandIn):
        return arg
    value = arg.cut.whole()
    return value.transpose(-1, -2) if arg.turned else value


def unpack(handle: Handle) -> Tensor:
    """The unpack hook in mode "minimal"."""
    if not isinstance(handle, Cut):
        return handles.unpack(handle)
    inner = handle.handle
    if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1 or not _is_taken(handle):
        return handles.unpack(inner)
    if isinstance(inner, Replayed) and not inner.stands():
        if not handle.is_at_hand():
            return handles.unpack(inner)
        if inner.awaited is not None:
            # A stream, which is undone by this; parameters may change before it is asked for.
            inner.awaited()
        _share_with_norm(handle)
    if inner.checksum is not None:
        inner.verified(handle.whole(), "putting it together from slices")
    return StandIn(handle)


def _share_with_norm(cut: Cut) -> None:
    """Let what a batch norm was given stand until that asks for it, where there is room."""
    given = given_to_norm(cut.handle) if cut.exact else None
    size = size_of(given)
    if given is None or size is None or given.stands() or not given.needs:
        return
    nbytes, arrives = size.numel() * cut.dtype.itemsize, _gradient_of(torch._C._current_autograd_node())
    # The gradient of what the norm was given is as large, and takes the place of what arrives if it can.
    if cut.room.has(nbytes, nbytes if arrives == nbytes else nbytes + arrives):
        whole = Filled(size)
        for part in cut.exact_parts():
            whole.put(part, rows_of(given, part, {}))
        assert whole.value is not None
        given.hold(whole.value, torch._C._current_graph_task_id())


def _is_taken(cut: Cut) -> bool:
    """Whether the node that asks can do with slices, and slices serve."""
    node: Any = torch._C._current_autograd_node()
    if node is None or not cut.is_large(_laid_out(node)):
        return False
    function = getattr(node, "_forward_cls", None)
    if function is not None:
        return not isinstance(cut.handle, Kept) and getattr(function, "takes_slices", False)
    name = node.name()
    if isinstance(cut.handle, Kept) and name in _PRODUCTS and _is_sum_large(cut, node):
        return False  # it stands anyway, as a step's input in a loop, and is cut for such a sum alone
    return name in TAKERS


def _is_sum_large(cut: Cut, node: Any) -> bool:
    """Whether the gradient of what it was multiplied with is larger than all that slices could spare."""
    columns = node._input_metadata[0].shape[-1]
    return bool(cut.size[-1] * columns * cut.dtype.itemsize > cut.nbytes + _gradient_of(node))


def _laid_out(node: Any) -> int:
    """The bytes of a gradient, or of weights that get one, that a node's kernel may lay out anew."""
    if node.name() != "ConvolutionBackward0":
        return 0
    of_weights = node.next_functions[1][0]
    return max(_gradient_of(node), 0 if of_weights is None else _gradient_of(of_weights))


def _gradient_of(node: Any) -> int:
    """The bytes of the gradient that comes to a node."""
    of_output = node._input_metadata[0]
    return math.prod(of_output.shape) * of_output.dtype.itemsize  # type: ignore[no-any-return]


def cut_of(tensor: Tensor) -> Cut | None:
    """What a saved tensor stands for, if it is a stand-in; for an autograd function that takes slices."""
    return tensor.cut if isinstance(tensor, StandIn) else None
