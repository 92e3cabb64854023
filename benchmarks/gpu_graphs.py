"""Rows of benchmarks/gpu.py that hold gradients to others': steps in CUDA graphs, and SyncBatchNorm.

The one idea: a row that compares says so in a field of its own, which the exit status follows.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import snn_reversible_plugin as srp
from benchmarks.measure import _now
from benchmarks.workloads import WORKLOADS


class Loss(torch.nn.Module):
    """A network and its loss as one module, which is what make_graphed_callables takes."""

    def __init__(self, net: torch.nn.Module, loss_of: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.net, self.loss_of = net, loss_of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss_of(self.net, x)


def whole_step(loss: Loss, x: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward captured in one graph, whose gradients are its own: a replay adds nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(x).backward()
    return graph.replay


def callables(loss: Loss, x: torch.Tensor) -> Callable[[], Any]:
    """A graph of the forward and one of the backward, by torch's own function."""
    graphed: Any = torch.cuda.make_graphed_callables(loss, (x,))

    def step() -> None:
        loss.zero_grad(set_to_none=True)
        graphed(x).backward()

    return step


GRAPHS = {"captured in a graph": whole_step, "by make_graphed_callables": callables}


def graphs(run: Any) -> None:
    """A step in CUDA graphs: its gradients to the eager step's, and its time."""

    def captured(name: str, shape: tuple[int, ...], method: str, how: str) -> dict[str, Any]:
        if run.device.type != "cuda":
            return {"note": "there are no CUDA graphs here"}
        workload = WORKLOADS[name]
        model, x = workload.make().to(run.device), torch.rand(shape, device=run.device)
        if method != "stock":
            srp.convert_to_reversible(model)
        loss = Loss(model, workload.loss_of)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad()
                loss(x).backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()
        loss(x).backward()
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        step, times = GRAPHS[how](loss, x), []
        for _ in range(10):
            start = _now(run.device)
            step()
            times.append(_now(run.device) - start)
        srp.look_at_graphs()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        return {"ms": round(1e3 * statistics.median(times), 2)} | compared(same, "the eager step's")

    for name, shape in (("vgg", (8, 16, 2, 32, 32)), ("leaky-loop", (50, 32, 512))):
        for how in GRAPHS:
            for method in ("stock", "memory"):
                run.row(f"{name}, {how}", method, 30, partial(captured, name, shape, method, how))


def compared(same: bool, to: str) -> dict[str, Any]:
    """What a row says of its gradients; whoever runs this learns of ``equal`` from the exit status."""
    return {"equal": same, "note": f"gradients are {to}" if same else f"GRADIENTS DIFFER from {to}"}


def synchronized(run: Any) -> None:
    """SyncBatchNorm in a group of one: gradients to stock's."""

    def step() -> dict[str, Any]:
        if run.device.type != "cuda":
            return {"note": "SyncBatchNorm wants a GPU"}
        with tempfile.NamedTemporaryFile() as file:
            torch.distributed.init_process_group(
                "nccl", init_method=f"file://{file.name}.store", rank=0, world_size=1
            )
            try:
                workload = WORKLOADS["vgg"]
                stock = torch.nn.SyncBatchNorm.convert_sync_batchnorm(workload.make()).to(run.device)
                ours = srp.convert_to_reversible(copy.deepcopy(stock))
                x, gradients = torch.rand(4, 8, 2, 32, 32, device=run.device), []
                for model in (stock, ours):
                    workload.loss_of(model, x).backward()
                    gradients.append([p.grad for p in model.parameters()])
                same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
            finally:
                torch.distributed.destroy_process_group()
        return compared(same, "stock's")

    run.row("VGG, SyncBatchNorm", "memory", 30, step)
