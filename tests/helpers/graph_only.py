"""A backend of ``torch.compile`` that partitions as Inductor does, and runs forward and backward eagerly.

What the pass does can be seen, and compared bit for bit, without a C++ compiler and in a second.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch._inductor.lowering  # decompositions look into it
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from snn_reversible_plugin.compiler.backend import Backend, as_planned
from snn_reversible_plugin.compiler.graph import is_view
from snn_reversible_plugin.compiler.membranes import Region
from snn_reversible_plugin.compiler.passes import Packing


class GraphOnly:
    """``saved``: the tensors that forwards hand to their backwards, parameters and inputs aside."""

    def __init__(self, mode: str | None = "memory") -> None:
        self.packing = None if mode is None else Packing(mode)
        self.saved: list[torch.Tensor] = []
        self.halves: list[tuple[fx.Graph, fx.Graph]] = []

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        from torch._inductor.decomposition import select_decomp_table

        compiler = aot_autograd(
            fw_compiler=nop,
            bw_compiler=nop,
            partition_fn=self._partition,
            decompositions=select_decomp_table(),
        )
        return compiler(module, inputs)

    def _partition(self, module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        if self.packing is not None:
            self.packing(module.graph)
            module.recompile()
        with nullcontext() if self.packing is None else as_planned():
            forward, backward = min_cut_rematerialization_partition(module, inputs, **options)
        results = next(iter(reversed(forward.graph.nodes))).args[0][options["num_fwd_outputs"] :]
        self.saved += [
            node.meta["val"] for node in results if node.op == "call_function" and not is_view(node)
        ]
        self.halves.append((forward.graph, backward.graph))
        return forward, backward

    @property
    def saved_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self.saved if isinstance(one, torch.Tensor))


class WithoutInductor(Backend):
    """The backend of ``srp.compile``: regions as Inductor gets them, run eagerly."""

    def __call__(self, module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiler = GraphOnly(self.mode)
        compiler.packing = self.packing
        return Region(compiler(module, inputs), self.calls)
