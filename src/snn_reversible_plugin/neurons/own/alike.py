"""Whether two functions of tensors are the same operations, forward and backward.

The one idea: what autograd would run of each is recorded, and every value is written as the expression that
it is of the tensors that went in. Where outputs and gradients are the same expressions, they are the same
bits, whatever the numbers are, and the gradients that meet are added in the same order.

Source: value numbering as in Alpern, Wegman & Zadeck, POPL 1988.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from snn_reversible_plugin.neurons.own.code import Unprovable
from snn_reversible_plugin.neurons.own.graph import Kind, check_operator, name_of
from snn_reversible_plugin.neurons.witness import alone
from snn_reversible_plugin.ops.autocast import Autocast

# NOTE [What is the same]
#
# 1. `x - 0.0`, `x * 1.0` and `x / 1.0` are x, to the sign of a zero; `x + 0.0` is not, for -0 + 0 is +0.
# 2. A product's factors commute. So do a sum's terms in the forward; in the backward they stand for the
#    order in which gradients arrive, which decides where a third one is added: there they don't.
# 3. A detached tensor has the values of the tensor. That no gradient goes through it shows elsewhere.
# 4. The gradients of the outputs come first: whatever uses an output is made after it.
# 5. Where a value lies is part of it: the next layer's kernel, and so its rounding, depends on that.
_IDENTITY = {"detach", "alias", "clone"}
_NEUTRAL = {"sub": "0.0", "mul": "1.0", "div": "1.0"}

Step = Callable[..., tuple[Tensor, ...]]


class Written(NamedTuple):
    """A function's outputs, and the gradients of its inputs, as numbers of expressions; equal, if the same.

    Attributes:
        learns: of each output, whether it has a gradient.
        values: the outputs' numbers and the gradients', None for a gradient that there is none of.
        outputs: the kinds of the outputs.
    """

    learns: tuple[bool, ...]
    values: tuple[int | None, ...]
    outputs: tuple[Kind, ...]


class Expressions:
    """What functions' outputs, and the gradients of their inputs, are of their inputs: equal, if the same.

    Args:
        given: the kinds of the tensors that the functions take; all get a gradient. What they give has the
            shape and dtype of the first.
        autocast: under which they run.

    Example:
        >>> import torch
        >>> of = Expressions([Kind.of(torch.ones(2, 3))] * 2, Autocast()).of
        >>> charge = of(lambda x, v: (v + (x - v) / 2.0,))
        >>> charge == of(lambda x, v: ((x - (v - 0.0)) / 2.0 + v,))
        True
        >>> charge == of(lambda x, v: (v * 0.5 + x * 0.5,))
        False
    """

    def __init__(self, given: Sequence[Kind], autocast: Autocast) -> None:
        self.given, self.autocast = given, autocast
        # By what an expression is: expressions written out would double with each use of a value.
        self._numbers: dict[Any, int] = {}

    def of(self, function: Step) -> Written:
        """Of one function.

        Raises:
            Unprovable: it can't be recorded, or its operations are not fixed.
        """
        graph, learns = _recorded(function, self.given, self.autocast)
        values: dict[fx.Node, int] = {}
        of_gradients: set[fx.Node] = set()
        placeholders = 0
        for node in graph.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                key: Any = ("given", placeholders)
                if placeholders >= len(self.given):
                    of_gradients.add(node)
                placeholders += 1
            elif node.op == "get_attr":
                key = _constant(getattr(graph, str(node.target)))
            else:
                check_operator(node)
                if not of_gradients.isdisjoint(node.all_input_nodes):
                    of_gradients.add(node)
                key = _expression(node, values, node in of_gradients)
            values[node] = (
                key if isinstance(key, int) else self._numbers.setdefault(key, len(self._numbers))
            )
        results = node.args[0]
        if not all(isinstance(one, (fx.Node, type(None))) for one in results):
            raise Unprovable("its output is not what it computed")
        return Written(
            learns,
            tuple(None if one is None else values[one] for one in results),
            tuple(Kind.of(one.meta["val"]) for one in results[: len(learns)]),
        )


def _expression(node: fx.Node, values: dict[fx.Node, int], of_gradients: bool) -> Any:
    """What tells one operation from another; of one that does nothing, the number of its operand."""
    name = name_of(node)
    args = [_written(one, values) for one in node.args]
    lies, first = _lies(node), next(iter(node.args), None)
    is_neutral = name in _IDENTITY or (len(args) == 2 and args[1] == _NEUTRAL.get(name))
    if is_neutral and isinstance(first, fx.Node) and not node.kwargs and lies == _lies(first):
        return args[0]
    if name == "mul" or (name == "add" and not node.kwargs and not of_gradients):
        args.sort(key=repr)
    kwargs = tuple((key, _written(value, values)) for key, value in sorted(node.kwargs.items()))
    target = "item" if node.target is operator.getitem else str(node.target)
    return target, tuple(args), kwargs, lies


def _lies(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return Kind.of(value) if isinstance(value, Tensor) else None


def _written(value: Any, values: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return values[value]
    if isinstance(value, (tuple, list)):
        return tuple(_written(one, values) for one in value)
    # Python's 1 and 1.0 are one number to an operator; texts, for values are numbers here.
    return repr(float(value)) if type(value) is int else repr(value)


def _constant(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim():
        raise Unprovable("a tensor of its own enters it")
    return "constant", value.dtype, repr(value.item())


def _recorded(
    function: Step, given: Sequence[Kind], autocast: Autocast
) -> tuple[fx.GraphModule, tuple[bool, ...]]:
    # Half a second of imports, for those who have neurons of their own.
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    like = given[0]
    learns: list[bool] = []

    def both(inputs: list[Tensor], grad: list[Tensor]) -> tuple[Any, ...]:
        with autocast.again():
            outputs = function(*inputs)
        for one in outputs:
            if not isinstance(one, Tensor) or (one.shape, one.dtype) != (like.shape, like.dtype):
                raise Unprovable("what it gives is not laid out like its input")
        learns[:] = [one.requires_grad for one in outputs]
        pairs = [pair for pair in zip(outputs, grad, strict=False) if pair[0].requires_grad]
        if not pairs:
            raise Unprovable("no gradient goes through it")
        ends, grads = zip(*pairs, strict=True)
        return *outputs, *torch.autograd.grad(ends, inputs, grads, allow_unused=True)

    try:
        with alone():
            with FakeTensorMode():
                tensors, grads = (
                    [torch.empty_strided(k.shape, k.stride, dtype=k.dtype, device=k.device) for k in kinds]
                    for kinds in (given, [like] * 3)
                )
            for one in tensors:
                one.requires_grad_()
            return make_fx(both, tracing_mode="fake")(tensors, grads), tuple(learns)
    except Unprovable:
        raise
    except Exception as error:  # whatever somebody's code does with what has no value
        raise Unprovable(f"it can't be recorded ({type(error).__name__})") from error
