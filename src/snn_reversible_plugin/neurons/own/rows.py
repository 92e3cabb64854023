"""A recording run over a few rows of the batch at a time.

The one idea: where each operation does with each row of the batch what it does with the others, and no row
sees another, the operations give the same bits for a few rows as for all of them.

Source: the rules of ``torch.func.vmap`` for the dimension of a batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from snn_reversible_plugin.neurons.own.code import Unprovable
from snn_reversible_plugin.neurons.own.graph import Function, Programs, Recording, name_of
from snn_reversible_plugin.neurons.witness import element_wise, same_bits
from snn_reversible_plugin.ops.autocast import Autocast

# NOTE [Finding the batch]
#
# 1. A second recording, with one row less: the same operations, on other sizes at one place, the batch's. A
#    number that is another elsewhere than in a size hangs on the batch, and there is no proof.
# 2. Element-wise operators: every operand has its batch at the same place from the right, or is one number
#    for all rows. Operators that move along a dimension: along another. Those that create: one number, in
#    every size. Any other operator: no proof.
_CREATING = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor",
             "lift_fresh_copy", "zeros_like", "ones_like", "full_like"}  # fmt: skip
_INSERTING = {"stack", "select_backward", "unsqueeze"}
_ALONG = {"select", "unbind", "cat"} | _INSERTING


class Rows:
    """Which dimension of a recording is its batch, and programs for any number of rows of it.

    Raises:
        Unprovable: there is none, or the operations mix its rows.
    """

    def __init__(self, function: Function, whole: Recording, autocast: Autocast) -> None:
        shape = whole.kind.shape
        self.whole, self.dim = whole, _batch(whole)
        self.count = shape[self.dim]
        if self.count < 2:
            raise Unprovable("it has one row, which can't be cut")
        self.fewer = self.count - 1
        # Laid out like a part of the whole, so that strides are those of what will run.
        kind = whole.kind.rows(self.dim, self.fewer)
        part = Recording(function, kind, autocast)
        self._others = dict(zip(whole.nodes, part.nodes, strict=False))
        if len(whole.nodes) != len(part.nodes):
            raise Unprovable("other operations run for another batch")
        for node, other in self._others.items():
            if (node.op, node.target) != (other.op, other.target):
                raise Unprovable("other operations run for another batch")
            self._place(node)
            if node.op == "get_attr":
                self._same_constant(part, node)
        for node in whole.nodes:
            if node.op == "call_function":
                self._check(node)
        out_dim, grad_dim = self._place(whole.y), self._place(whole.g_x)
        if grad_dim != self.dim or out_dim is None:
            raise Unprovable("its output is not laid out like its input")
        self.out_dim = out_dim
        self._cache: dict[int, Programs] = {}

    def programs(self, count: int) -> Programs:
        """For so many rows."""
        if count not in self._cache:
            self._cache[count] = self.whole.programs(lambda node: self._sized(node, count))
        return self._cache[count]

    def _sized(self, node: fx.Node, count: int) -> Any:
        other = self._others[node]

        def sized(a: Any, b: Any) -> Any:
            if isinstance(a, (tuple, list)):
                return type(a)(sized(*pair) for pair in zip(a, b, strict=True))
            return count if type(a) is int and a != b else a

        kwargs = {key: sized(value, other.kwargs[key]) for key, value in node.kwargs.items()}
        return sized(node.args, other.args), kwargs

    def _place(self, node: fx.Node) -> int | None:
        """At which dimension a value has the batch; None where it has none."""
        a, b = (one.meta.get("val") for one in (node, self._others[node]))
        if not isinstance(a, Tensor):
            return None
        if not isinstance(b, Tensor) or a.dim() != b.dim() or a.dtype != b.dtype:
            raise Unprovable("other operations run for another batch")
        places = [at for at, pair in enumerate(zip(a.shape, b.shape, strict=True)) if pair[0] != pair[1]]
        if not places:
            return None
        if len(places) > 1 or (a.shape[places[0]], b.shape[places[0]]) != (self.count, self.fewer):
            raise Unprovable("its batch is folded into another dimension")
        return places[0]

    def _check(self, node: fx.Node) -> None:
        """Whether an operation does with each row what it does with the others, and nothing else."""
        other, name = self._others[node], name_of(node)
        sizes = name in _CREATING or name == "select_backward"
        for pair in zip(node.args, other.args, strict=True):
            self._same(*pair, sizes and isinstance(pair[0], (list, tuple)))
        self._same(tuple(node.kwargs.items()), tuple(other.kwargs.items()))
        if node.target is operator.getitem:
            return
        operands = list(_operands((*node.args, *node.kwargs.values())))
        places = {one: self._place(one) for one in operands}
        if name == "lift_fresh_copy" or all(place is None for place in places.values()):
            # One number for all rows, or nothing that has any.
            if self._place(node) is None or name in _CREATING - {"lift_fresh_copy"}:
                return
        elif name in _CREATING:
            return
        elif element_wise(name):
            self._check_element_wise(node, places)
            return
        elif name in _ALONG:
            dim = None if name in _INSERTING else along(node)
            if all(place is not None and place != dim for place in places.values()):
                return
        raise Unprovable(f"its {name} does not leave the rows of a batch apart")

    def _check_element_wise(self, node: fx.Node, places: dict[fx.Node, int | None]) -> None:
        out = self._place(node)
        if out is None:
            raise Unprovable("it forgets its batch")
        right = out - node.meta["val"].dim()
        for one, place in places.items():
            value = one.meta["val"]
            if place is None:
                # One for all rows.
                if value.dim() >= -right and value.shape[right] != 1:
                    raise Unprovable("it has a number of its own for each row")
            elif place - value.dim() != right:
                raise Unprovable("it turns its batch to another dimension")

    def _same(self, a: Any, b: Any, is_size: bool = False) -> None:
        """Arguments may differ where a size has the number of rows."""
        if isinstance(a, (tuple, list)):
            if type(a) is not type(b) or len(a) != len(b):
                raise Unprovable("other operations run for another batch")
            for pair in zip(a, b, strict=True):
                self._same(*pair, is_size)
        elif isinstance(a, fx.Node):
            if self._others.get(a) is not b:
                raise Unprovable("other operations run for another batch")
        elif is_size and type(a) is int and (a, b) == (self.count, self.fewer):
            return
        elif type(a) is not type(b) or repr(a) != repr(b):
            raise Unprovable("a number in it hangs on the batch")

    def _same_constant(self, part: Recording, node: fx.Node) -> None:
        """What was made of numbers in the forward."""
        a, b = (
            getattr(one.graph, str(of.target))
            for one, of in ((self.whole, node), (part, self._others[node]))
        )
        if not same_bits(a, b):
            raise Unprovable("a number in it hangs on the batch")


def _operands(arguments: Any) -> Iterator[fx.Node]:
    for one in arguments:
        if isinstance(one, fx.Node):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _operands(one)


def along(node: fx.Node) -> int:
    """The dimension of its operands that an operator works along."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(dim, int):
        raise Unprovable(f"its {name_of(node)} works along several dimensions")
    first = next(_operands(node.args))
    return dim % int(first.meta["val"].dim())


def _batch(whole: Recording) -> int:
    """The first dimension of the input that it does not walk along."""
    walked = {along(node) for node in whole.nodes[0].users if name_of(node) in ("select", "unbind")}
    free = [dim for dim in range(len(whole.kind.shape)) if dim not in walked]
    if not walked or not free:
        raise Unprovable("it does not walk through time along a dimension of its input")
    return free[0]
