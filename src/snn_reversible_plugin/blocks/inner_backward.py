"""The backward inside a backward: gradients of a branch that has just been run again.

The one idea: nothing that the caller held before may live on while the branch is differentiated, and
parameters that somebody else gathers for the time of a run get their gradients where that one looks.
Source: the reentrant form of ``torch.utils.checkpoint``; ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from snn_reversible_plugin.ops.layouts import is_plain
from snn_reversible_plugin.tape.sliced.later import Computed

# NOTE [Whose gradients]
#
# 1. The outputs are differentiated through one more node (`_Root`), so that their values can be let go: a
#    graph keeps nodes, and a caller's frame would keep the tensors. (A bare edge of the graph does not do:
#    in torch 2.6 a node of a Python function is cleared when its output dies.)
# 2. Parameters that `fully_shard` manages inside a chain exist only while their module runs. FSDP gathers
#    them for the second run as it does for activation checkpointing, and reduces their gradients when it
#    has seen them accumulated. So there the inner backward accumulates, and the chain's autograd function
#    returns no gradient for them. Where the chain or the model around it is sharded as a whole, the
#    parameters are gathered when the chain runs, and there is nothing to do.
# 3. FSDP takes a module that runs again after its backward for a recomputation of that same backward, and
#    would neither gather nor reduce for it. The next branch of the block, or an earlier call of the chain,
#    is another run, so the module is set back to where a forward begins.


class _Root(torch.autograd.Function):
    """One number whose backward hands out the gradients that it was given."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *outputs: Tensor) -> Tensor:
        ctx.grads = grads
        return outputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _one: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.grads)


def gradients(
    outputs: list[Tensor], g_outputs: list[Tensor], inputs: Sequence[Tensor], *, accumulate: bool
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` that empties ``outputs``; with ``accumulate`` other leaves get theirs too."""
    with torch.enable_grad():
        root = _Root.apply(g_outputs, *outputs)  # type: ignore[no-untyped-call]
    outputs.clear()
    if not accumulate:
        return torch.autograd.grad(root, inputs, allow_unused=True)
    found: list[Tensor | None] = [None] * len(inputs)

    def catch(index: int) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:  # accumulation may change the layout
            found[index] = grad

        return hook

    for index, tensor in enumerate(inputs):
        tensor.register_hook(catch(index))
    root.backward()
    return found


def convolved_once(
    outputs: Iterable[Tensor], aliases: dict[int, nn.Parameter], among: Set[int]
) -> dict[int, int]:
    """Those parameters that a graph uses once, as a convolution's weight, and their addresses.

    No other node, and no view with a backward of its own, has a part in their gradients.

    Args:
        outputs: of the graph.
        aliases: its leaves, by ids of parameters.
        among: ids of the parameters that are looked for.
    """
    if among.isdisjoint(aliases):
        return {}
    nodes: list[Any] = [output.grad_fn for output in outputs]
    seen: set[Any] = set()
    uses: Counter[int] = Counter()
    as_weight: set[int] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for place, (following, _) in enumerate(node.next_functions):
            leaf = id(getattr(following, "variable", None))
            uses[leaf] += 1
            if place == 1 and node.name() == "ConvolutionBackward0":
                as_weight.add(leaf)
            nodes.append(following)
    addresses = Counter(alias.data_ptr() for alias in aliases.values() if is_plain(alias))
    return {
        of: alias.data_ptr()
        for of, alias in aliases.items()
        if of in among
        and is_plain(alias)
        and id(alias) in as_weight
        and uses[id(alias)] == 1
        and addresses[alias.data_ptr()] == 1
    }


class Totals(dict[int, Tensor]):
    """Gradients by the ids of their parameters, added up in place as they come.

    ``shared`` are those that get several terms: the first may be a tensor of somebody else's, so it is
    copied.
    """

    def __init__(self, shared: set[int]) -> None:
        super().__init__()
        self._shared = shared
        self._later: dict[int, Computed] = {}

    def add(self, parameter: nn.Parameter, g: Tensor | Computed | None) -> None:
        """One more term, or how to compute the only one."""
        if g is None:
            return
        key = id(parameter)
        if not isinstance(g, Tensor):
            self._later[key] = g
            return
        if key in self:
            self[key].add_(g)
        else:
            self[key] = g.clone() if key in self._shared else g

    def take(self, key: int) -> Tensor | None:
        """A whole gradient, which is somebody else's from now on."""
        later = self._later.pop(key, None)
        return self.pop(key, None) if later is None else later()


def sharded_modules(module: nn.Module) -> list[nn.Module]:
    """The modules inside a module, itself included, that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever sharded something has imported it
    sharded = getattr(fsdp, "FSDPModule", None)
    return [] if sharded is None else [inner for inner in module.modules() if isinstance(inner, sharded)]


def sharded_parameters(module: nn.Module) -> set[int]:
    """The ids of the parameters that ``fully_shard`` manages inside a module."""
    return {id(p) for inner in sharded_modules(module) for p in inner.parameters()}


def settle(module: nn.Module) -> None:
    """Tell FSDP that the run is over (note 3)."""
    for inner in sharded_modules(module):
        state: Any = inner._get_fsdp_state()  # type: ignore[operator]
        state._training_state = type(state._training_state).IDLE
