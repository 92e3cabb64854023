"""A recording without its writes: ``out[t] = spike`` as the stack of a list, ``mem *= decay`` as a product.

The one idea: a tensor that a forward made itself is a name for its values, one after another. So each read
of it is a read of the value that it has then, and nothing writes any more: the same numbers, whoever runs
the operations, in which order, on which rows.

Source: functionalization as in ``torch._subclasses.functional_tensor``; here each step that is written to
is known by itself, where that leaves copies of the whole for each of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from snn_reversible_plugin.neurons.own.code import Unprovable
from snn_reversible_plugin.neurons.witness import MOVING, element_wise, is_uniform

# NOTE [What a write may be]
#
# 1. Into what the recording made: never into its input, a gradient that it is given, or a constant.
# 2. Into all of it, or into one index along one dimension (`out[t]`, `out[:, t]`). A part that is
#    described otherwise is refused, though it may be the same.
# 3. A view that was taken before a write and is read after it shows what was written: views are taken anew.
#    What was read before the write keeps its value.
# 4. What `empty` left is nobody's value: it is written to before it is read, or there is no proof.
# 5. A value that was written keeps the layout it had, and what is made of it has another than the forward
#    gave it. Where an operator's last bits hang on where an element lies, there is no proof.
_aten = torch.ops.aten
_EMPTY = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided"}
_SAME = {"alias", "detach"}
_ANYWHERE = MOVING | {"select_backward", "new_zeros", "new_ones", "new_full"}


class Place(NamedTuple):
    """Where a node's tensor lies: in that of ``root``, to which ``views`` lead, one after another."""

    root: fx.Node
    views: tuple[fx.Node, ...] = ()


class Values:
    """The value that a tensor has now: ``whole``, but at the indices of ``steps`` along ``dim``."""

    def __init__(self, whole: fx.Node | None) -> None:
        self.whole = whole  # None: what `empty` left
        self.dim = 0
        self.steps: dict[int, fx.Node] = {}
        self.writes = 0


class Unwritten:
    """A recorded graph, written anew without the writes in it: ``graph``; ``results``: its outputs, as the
    forward lays them out.

    Raises:
        Unprovable: it writes to what is not its own, or in a way that can't be told.
    """

    def __init__(self, recorded: fx.GraphModule) -> None:
        self._new = fx.Graph()
        self._places: dict[fx.Node, Place] = {}
        self._values: dict[fx.Node, Values] = {}
        self._views: dict[tuple[fx.Node, int], fx.Node] = {}
        (output,) = (node for node in recorded.graph.nodes if node.op == "output")
        for node in recorded.graph.nodes:
            if node is not output:
                self._run(node)
        if not all(isinstance(node, fx.Node) for node in output.args[0]):
            raise Unprovable("its output is not what it computed")
        self.results: list[Tensor] = [node.meta["val"] for node in output.args[0]]
        self._new.output(tuple(map(self._read, output.args[0])))
        self.graph = fx.GraphModule(recorded, self._new)

    def _run(self, node: fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            self._write(node)
            return
        seen = _viewed(node)
        if seen is not None:
            place = self._places[seen]
            same = _name(node) in _SAME or _is_all_of(node)
            self._places[node] = place if same else place._replace(views=(*place.views, node))
            return
        self._places[node] = Place(node)
        self._values[node] = Values(None if _name(node) in _EMPTY else self._copied(node, self._read))

    def _copied(self, node: fx.Node, read: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """A node on what its operands are by now, which may be laid out otherwise."""
        new, name = self._new.node_copy(node, read), _name(node)
        if any(_is_relaid(read(one), one) for one in node.all_input_nodes):
            if not (is_uniform(name, node.args, node.kwargs) or name in _ANYWHERE):
                raise Unprovable("its last bits hang on how it lays out what it writes to")
            new.meta["val"] = _computed(new)
        return new

    # -- reads -----------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> fx.Node:
        place = self._places[node]
        values, at = self._values[place.root], _index(place.views)
        if at is not None and at[0] == values.dim and values.steps:
            return values.steps.get(at[1]) or self._step_of(values, at[1])
        return self._seen(place.root, place.views)

    def _seen(self, root: fx.Node, views: tuple[fx.Node, ...]) -> fx.Node:
        values = self._values[root]
        if not views:
            return self._whole(root, values)
        key = views[-1], values.writes
        if key not in self._views:
            *before, last = views
            base = self._seen(root, tuple(before))
            seen = _viewed(last)
            self._views[key] = self._copied(last, lambda one: base if one is seen else self._read(one))
        return self._views[key]

    def _whole(self, root: fx.Node, values: Values) -> fx.Node:
        if values.steps:
            size = root.meta["val"].shape[values.dim]
            steps = [values.steps.get(at) or self._step_of(values, at) for at in range(size)]
            values.whole = self._call(_aten.stack.default, steps, values.dim)
            values.steps = {}
        if values.whole is None:
            raise Unprovable("it reads what nobody has written")
        return values.whole

    def _step_of(self, values: Values, at: int) -> fx.Node:
        if values.whole is None:
            raise Unprovable("it leaves a part unwritten of what it fills")
        return self._call(_aten.select.int, values.whole, values.dim, at)

    # -- writes ----------------------------------------------------------------------------------------

    def _write(self, node: fx.Node) -> None:
        name = node.target._schema.name  # type: ignore[union-attr]
        written, *others = node.args
        writes = [arg.alias_info is not None and arg.alias_info.is_write for arg in _arguments(node)]
        if not isinstance(written, fx.Node) or not writes[0] or any(writes[1:]):
            raise Unprovable(f"it writes to a tensor ({name})")
        place = self._places[written]
        if place.root.op != "call_function":
            raise Unprovable(f"it writes to a tensor that is not its own ({name})")
        values, at = self._values[place.root], _index(place.views)
        if place.views and at is None:
            raise Unprovable(f"it writes to a part of a tensor ({name})")
        held = written.meta["val"]
        value = self._written(node, held, others)
        if (value.meta["val"].shape, value.meta["val"].dtype) != (held.shape, held.dtype):
            raise Unprovable(f"it writes a tensor of another shape or dtype ({name})")
        if at is None:
            values.whole, values.steps = value, {}
        else:
            if values.steps and values.dim != at[0]:
                self._whole(place.root, values)
            values.dim = at[0]
            values.steps[at[1]] = value
        values.writes += 1
        self._places[node] = place

    def _written(self, node: fx.Node, held: Tensor, others: list[Any]) -> fx.Node:
        """What stands where a node has written."""
        name = _name(node)
        if name == "copy_" and len(others) == 1:
            return self._cast(self._read(others[0]), held)
        if name == "fill_" and not isinstance(others[0], fx.Node):
            return self._call(_aten.full_like.default, self._like(node.args[0]), others[0])
        if name == "zero_":
            return self._call(_aten.zeros_like.default, self._like(node.args[0]))
        before = self._read(node.args[0])  # type: ignore[arg-type]
        if name == "index_put_" and _is_mask(held, *others):
            (mask,), value = others
            return self._call(_aten.where.self, self._read(mask), self._read(value), before)
        function = getattr(_aten, name.removesuffix("_"), None)
        overload = getattr(function, node.target._overloadname, None)  # type: ignore[union-attr]
        if overload is None or not element_wise(name.removesuffix("_")):
            raise Unprovable(f"it writes to a tensor ({name})")
        args = fx.map_arg(tuple(others), self._read)
        return self._call(overload, before, *args, **fx.map_arg(node.kwargs, self._read))  # type: ignore[arg-type]

    def _like(self, node: Any) -> fx.Node:
        """Something of a tensor's size, where its values are no matter."""
        root = self._places[node].root
        if self._values[root].whole is None and not self._values[root].steps:
            if node is not root:
                raise Unprovable("it writes to a part of what nobody has written")
            return self._new.node_copy(root, self._read)
        return self._read(node)

    def _cast(self, value: fx.Node, held: Tensor) -> fx.Node:
        if value.meta["val"].dtype is not held.dtype:
            value = self._call(_aten._to_copy.default, value, dtype=held.dtype)
        if value.meta["val"].shape != held.shape:
            value = self._call(_aten.expand.default, value, list(held.shape))
        return value

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._new.call_function(target, args, kwargs)
        node.meta["val"] = _computed(node)
        return node


def _computed(node: fx.Node) -> Any:
    """The value, without numbers, of a node that has operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda one: one.meta["val"])
    (first, *_) = (one for operand in node.all_input_nodes for one in _tensors_of(operand))
    with first.fake_mode:  # type: ignore[attr-defined]
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_relaid(new: fx.Node, old: fx.Node) -> bool:
    pairs = zip(_tensors_of(new), _tensors_of(old), strict=True)
    return any(a.stride() != b.stride() for a, b in pairs)


def _tensors_of(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [
        one for one in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(one, Tensor)
    ]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).partition("::")[2]


def _arguments(node: fx.Node) -> Iterator[Any]:
    yield from node.target._schema.arguments  # type: ignore[union-attr]


def _viewed(node: fx.Node) -> fx.Node | None:
    """What a node's result shares its memory with, if it does."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return node.args[0]
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(one.alias_info is not None for one in schema.returns)
    if not shares and _name(node) != "_unsafe_view":
        return None
    first = node.args[0]
    if not isinstance(first, fx.Node):
        raise Unprovable(f"it runs {node.target}, which may share memory")
    return first


def _is_all_of(node: fx.Node) -> bool:
    """Whether it is a slice of everything."""
    if _name(node) != "slice":
        return False
    before: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    after: Tensor = node.meta["val"]
    return before.shape == after.shape and node.args[4:5] in ((), (1,))


def _index(views: tuple[fx.Node, ...]) -> tuple[int, int] | None:
    """The dimension and the index, where views lead to one step of a tensor."""
    if len(views) == 1 and _name(views[0]) == "select":
        seen, dim, at = views[0].args
    elif len(views) == 2 and _name(views[0]) == "unbind" and views[1].target is operator.getitem:
        seen, dim = (*views[0].args, 0)[:2]
        at = views[1].args[1]
    else:
        return None
    shape = seen.meta["val"].shape  # type: ignore[union-attr]
    return int(dim) % len(shape), int(at) % shape[int(dim)]  # type: ignore[arg-type]


def _is_mask(held: Tensor, indices: Any, value: Any, accumulate: bool = False, *_: Any) -> bool:
    """Whether one number is put where a mask of the same shape says."""
    if accumulate or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        return False
    mask, number = indices[0].meta["val"], value.meta["val"]
    return mask.dtype is torch.bool and mask.shape == held.shape and not number.dim()
