"""The operations of a forward and its backward, recorded once.

The one idea: what autograd would run is recorded, forward and backward together, on tensors without values.
Those operations, in that order, on the same values, give stock's bits, whoever runs them.

Source: ``torch.fx.experimental.proxy_tensor.make_fx`` (Reed et al., MLSys 2022).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from snn_reversible_plugin.neurons.own.code import Unprovable
from snn_reversible_plugin.neurons.own.writes import Unwritten
from snn_reversible_plugin.neurons.witness import MOVING, alone, element_wise, is_uniform
from snn_reversible_plugin.ops.autocast import Autocast

Function = Callable[[Tensor], Tensor]
_aten = torch.ops.aten

# NOTE [What a recording proves]
#
# 1. Its tensors have shapes, strides and no values: a forward that asks for a value raises. What it reads
#    beside its input is `reads`' part.
# 2. It is of one shape, one layout, one dtype, one state of autocast. Others are other recordings.
# 3. Nothing that is drawn, and nothing that writes to a tensor it was given. What it writes to its own is
#    values that follow one another (`writes`).
# 4. The output has to be zeros and ones by construction: other values would be held in full, where the tape
#    computes them again.
# 5. `x[t]` leaves T gradients, zeros but for one step, to be added up. In each element that is one value
#    and zeros, and a sum of two terms is never -0: so the steps are stacked, and 0 is added.
MOST_NODES = 6000  # of a recording: about 400 time steps


class Kind(NamedTuple):
    """What a recording is of."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Kind:
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device)

    def rows(self, dim: int, count: int) -> Kind:
        """The same with fewer rows, cut out of it."""
        return self._replace(shape=(*self.shape[:dim], count, *self.shape[dim + 1 :]))


class Programs(NamedTuple):
    """``forward(x, g) -> y`` and ``backward(x, g) -> g_x``, for one number of rows; g is not looked at by
    the first."""

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


class Recording:
    """The operations of a function of one tensor, and of its gradient.

    Raises:
        Unprovable: they are not fixed, or not what is run here.
    """

    def __init__(self, function: Function, kind: Kind, autocast: Autocast) -> None:
        self.kind = kind
        recorded = _recorded(function, kind, autocast)
        with alone():
            unwritten = Unwritten(recorded)
        self.graph = unwritten.graph
        self.nodes = [node for node in self.graph.graph.nodes if node.op != "output"]
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        self.y, self.g_x = output.args[0]
        if len(self.nodes) > MOST_NODES:
            raise Unprovable(f"it has {len(self.nodes)} operations")
        for node in self.nodes:
            if node.op == "call_function":
                check_operator(node)
        self.out, self.grad = map(Kind.of, unwritten.results)
        if (self.grad.shape, self.grad.dtype) != (kind.shape, kind.dtype):
            raise Unprovable("its gradient is not laid out like its input")
        if not _is_binary(self.y):
            raise Unprovable("its output is not zeros and ones by construction")

    @property
    def uniform(self) -> bool:
        """Whether no element's bits depend on where in memory it lies."""
        return all(
            is_uniform(name_of(node), node.args, node.kwargs)
            for node in self.nodes
            if node.op == "call_function" and element_wise(name_of(node))
        )

    def programs(self, sizes: Callable[[fx.Node], tuple[Any, Any]] | None = None) -> Programs:
        """What runs it. ``sizes``: the arguments of a node, for another number of rows."""
        return Programs(*(self._program(result, sizes) for result in (self.y, self.g_x)))

    def _program(self, result: fx.Node, sizes: Any) -> Any:
        graph = fx.Graph()
        new: dict[fx.Node, Any] = {}
        for node in self.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
            if sizes is not None and node.op == "call_function":
                new[node].args, new[node].kwargs = fx.map_arg(sizes(node), new.__getitem__)
        output = graph.output(new[result])
        graph.eliminate_dead_code()
        _stack_steps(graph, output)
        return fx.GraphModule(self.graph, graph).forward


def _recorded(function: Function, kind: Kind, autocast: Autocast) -> fx.GraphModule:
    # Half a second of imports, for those who have neurons of their own.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    like: list[Tensor] = []  # the output, once it is known

    def both(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        with autocast.again():
            y = function(x)
        if not isinstance(y, Tensor) or not y.requires_grad or y is x:
            raise Unprovable("its output is no tensor with a gradient")
        if (g.shape, g.dtype) != (y.shape, y.dtype):
            like.append(y)
            raise Unprovable("its output is another at each call")
        return y, torch.autograd.grad(y, x, g)[0]

    def record(shape: Any, dtype: torch.dtype) -> fx.GraphModule:
        with FakeTensorMode():
            x = torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype, device=kind.device)
            g = torch.empty(shape, dtype=dtype, device=kind.device)
        return make_fx(both, tracing_mode="fake")(x.requires_grad_(), g)

    try:
        with alone():
            try:
                return record(kind.shape, kind.dtype)
            except Unprovable:
                if not like:
                    raise
                return record(tuple(like[0].shape), like[0].dtype)
    except Unprovable:
        raise
    except Exception as error:  # whatever somebody's code does with what has no value
        raise Unprovable(f"it can't be recorded ({type(error).__name__})") from error


def name_of(node: fx.Node) -> str:
    """Of a node's operator; empty for what is none."""
    return node.target._schema.name.partition("::")[2] if hasattr(node.target, "_schema") else ""


def check_operator(node: fx.Node) -> None:
    """Refuse an operation that is not torch's, draws, or writes to a tensor.

    Raises:
        Unprovable: saying which.
    """
    if node.target is operator.getitem:
        return
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::"):
        raise Unprovable(f"it runs {node.target}, which is not torch's")
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        raise Unprovable(f"it draws random numbers ({schema.name})")
    if schema.is_mutable:
        raise Unprovable(f"it writes to a tensor ({schema.name})")


def _is_binary(node: Any) -> bool:
    """Whether a value is zeros and ones by construction."""
    while True:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype is torch.bool:
            return True
        name = name_of(node)
        if node.target is operator.getitem:
            node = node.args[0]
        elif name in ("stack", "cat"):
            return all(map(_is_binary, node.args[0]))
        elif name in MOVING and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        elif name == "where":
            return all(map(_is_binary, node.args[1:]))
        elif name == "lift_fresh_copy":
            number = getattr(node.graph.owning_module, str(node.args[0].target))
            return bool(((number == 1) | ((number == 0) & ~number.signbit())).all())
        else:
            return name in ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones")


def _stack_steps(graph: fx.Graph, output: fx.Node) -> None:
    """Write a sum of single steps' gradients as a stack of them (see the note, 5)."""
    terms: list[fx.Node] = []
    node: Any = output.args[0]
    while name_of(node) == "add" and len(node.args) == 2 and not node.kwargs and len(node.users) == 1:
        node, last = node.args
        terms.append(last)
        if not (isinstance(node, fx.Node) and isinstance(last, fx.Node)):
            return
    terms.append(node)
    if len(terms) < 2 or any(name_of(one) != "select_backward" or len(one.users) != 1 for one in terms):
        return
    dims = {one.args[2] for one in terms}
    by_step: dict[Any, Any] = {one.args[3]: one.args[0] for one in terms}
    (dim, *others) = dims
    steps: Any = terms[0].args[1]
    if others or sorted(by_step) != list(range(steps[dim])):
        return
    with graph.inserting_before(output):
        stacked = graph.call_function(_aten.stack.default, ([by_step[t] for t in sorted(by_step)], dim))
        stacked = graph.call_function(_aten.add_.Tensor, (stacked, 0.0))
    output.args = (stacked,)
    graph.eliminate_dead_code()
