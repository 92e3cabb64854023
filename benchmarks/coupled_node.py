"""``python -m benchmarks.coupled_node``: the coupled node's two backward procedures, and what a node holds.

Streamlined: gradients come in the sweep that undoes the steps. Plain: each step is undone, run forward
again under autograd, and differentiated, as any reversible layer can be. Both start from the same forward,
and their gradients are compared bit for bit. Beside them autograd through the same equations, and
SpikingJelly's stock LIFNode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from snn_reversible_plugin.neurons.coupled import reference as coupled
from snn_reversible_plugin.neurons.coupled.call import Call, run_sequence
from snn_reversible_plugin.neurons.coupled.in_place import _Work, forward
from snn_reversible_plugin.reports.measure import count_step, time_step
from snn_reversible_plugin.spikingjelly.coupled import firing_of

from . import store, time_tables

SHAPES = {
    "linear, T=100, N=128, 512 wide": (100, 128, 512),
    "convolution, T=8, N=16, 64x32x32": (8, 16, 64, 32, 32),
}
Node = Callable[[Tensor], tuple[Tensor, Any]]


class PlainProcedure(torch.autograd.Function):
    """Undo a step, run it forward under autograd, differentiate; and so on, the last step first."""

    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        y_seq, s, remainders = forward(x_seq, None, call.rule, call.firing)
        ctx.call, ctx.parts = call, [part for part, _ in remainders]
        ctx.save_for_backward(y_seq, s, *(stored for _, stored in remainders))
        return y_seq, s

    @staticmethod
    def backward(ctx: Any, g_y: Tensor, g_s: Tensor) -> tuple[Tensor, None]:
        y_seq, s, *bits = ctx.saved_tensors
        rule, firing = ctx.call.rule, ctx.call.firing
        g_x = torch.empty_like(y_seq)
        for part, stored in zip(ctx.parts, bits, strict=True):
            y, s_part = y_seq[:, part], s[part]
            half = y.shape[2] // 2
            work = _Work(y[0].unflatten(1, (2, half)).movedim(1, 0), rule, firing, None)
            work.start(s_part.unflatten(1, (2, half)).movedim(1, 0))
            g_state = g_s[part]
            for t in reversed(range(len(y))):
                work.read(y[t].unflatten(1, (2, half)).movedim(1, 0), work.y, rule.bits)
                work.undo_second(stored[t])
                work.undo_first()
                torch.sub(work.y[0], work.o, alpha=work.unit, out=work.x[1])
                x = torch.cat([*work.x], 1).mul_(2.0**rule.shift / work.unit).requires_grad_()
                before = torch.cat(work.s, 1).mul_(1 / work.unit).requires_grad_()
                with torch.enable_grad():
                    outputs = coupled.sequence(x.unsqueeze(0), before, rule, firing)
                g_outputs = (g_y[t : t + 1, part], g_state)
                g_x[t, part], g_state = torch.autograd.grad(outputs, (x, before), g_outputs)
        return g_x, None


def main(
    repeats: Annotated[int, typer.Option(help="timed rounds, after one warm-up")] = 5,
    tau: float = 2.0,
    beta: float = 0.25,
    scale: Annotated[float, typer.Option(help="of the batch: 1 is N as named")] = 1.0,
    device: str = "cpu",
    save: Annotated[bool, typer.Option(help="write benchmarks/results/coupled-node.json")] = True,
) -> None:
    """Time both backward procedures, and count what is held as T grows."""
    function = surrogate.ATan()
    rule = coupled.rule_of(
        "node", tau=tau, alpha=0.0, beta=beta, v_threshold=1.0, bits=16, detach_reset=False
    )
    step = torch.Size((1, 2))
    call = Call(rule, firing_of(function, torch.float32, torch.device(device), step), "node")
    stock = neuron.LIFNode(tau=tau, surrogate_function=function, step_mode="m").to(device)

    def run_stock(x_seq: Tensor) -> tuple[Tensor, Any]:
        functional.reset_net(stock)
        return stock(x_seq), None

    nodes: dict[str, Node] = {
        "streamlined": lambda x_seq: run_sequence(x_seq, None, call),
        "plain procedure": lambda x_seq: PlainProcedure.apply(x_seq, call),
        "autograd": lambda x_seq: coupled.sequence(x_seq, None, rule, coupled.Firing(function, None, None)),
        "stock LIFNode": run_stock,
    }
    console = Console(width=120)
    found: dict[str, list[dict[str, Any]]] = {"times": [], "held": _held(nodes, device)}
    for name, (steps, batch, *rest) in SHAPES.items():
        shape = (steps, max(1, round(batch * scale)), *rest)
        found["times"] += _times(name, nodes, torch.randn(shape, device=device), repeats)
    console.print(time_tables.coupled_times(found["times"]).rich(f"tau={tau:g}, beta={beta:g}"))
    title = "held beyond inputs and outputs, bytes a neuron (N=16, 64 wide)"
    console.print(time_tables.coupled_held(found["held"]).rich(title))
    if save:
        store.write("coupled-node", found, tau=tau, beta=beta, scale=scale, **store.machine(device))


def _times(name: str, nodes: dict[str, Node], x_seq: Tensor, repeats: int) -> list[dict[str, Any]]:
    x_seq.mul_(2).requires_grad_()
    weights = torch.randn_like(x_seq)
    forwards: dict[str, list[float]] = {node: [] for node in nodes}
    backwards: dict[str, list[float]] = {node: [] for node in nodes}
    gradients: dict[str, Tensor] = {}
    for round_ in range(repeats + 1):
        for node, run in nodes.items():
            x_seq.grad = None
            start = time.perf_counter()
            loss = (run(x_seq)[0] * weights).sum()
            if loss.is_cuda:
                torch.cuda.synchronize()
            forward_time = time.perf_counter() - start
            backward_time = time_step(lambda loss=loss: loss)
            del loss
            assert x_seq.grad is not None
            gradients[node] = x_seq.grad
            if round_:
                forwards[node].append(forward_time)
                backwards[node].append(backward_time)
    base = "plain procedure"
    steps = {node: [a + b for a, b in zip(forwards[node], backwards[node], strict=True)] for node in nodes}
    found = []
    for node in nodes:
        equal = torch.equal(gradients[node], gradients[base])
        found.append(
            {
                "layer": name, "node": node, "forward": statistics.median(forwards[node]),
                "backward": statistics.median(backwards[node]), "step": statistics.median(steps[node]),
                "backward_ratio": _ratio(backwards[node], backwards[base]),
                "step_ratio": _ratio(steps[node], steps[base]),
                "gradient": "" if node.startswith("stock") else "equal" if equal else "differs",
            }
        )  # fmt: skip
    return found


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _held(nodes: dict[str, Node], device: str) -> list[dict[str, Any]]:
    """What lives between forward and backward, beyond inputs, and outputs that the next layer saves too."""
    lengths, found = (10, 100, 1000), []
    for node, run in nodes.items():
        if node == "plain procedure":
            continue
        row: list[float] = []
        for steps in lengths:
            x_seq = torch.randn(steps, 16, 64, device=device, requires_grad=True)
            weights = torch.randn_like(x_seq, requires_grad=True)
            held, _ = count_step(lambda run=run, x=x_seq, w=weights: (run(x)[0] * w).sum())
            row.append((held - 4 * x_seq.numel()) / (16 * 64))
        more = (row[-1] - row[0]) / (lengths[-1] - lengths[0])
        found.append({"node": node, "held": dict(zip(map(str, lengths), row, strict=True)), "more": more})
    return found


if __name__ == "__main__":
    store.settle()
    typer.run(main)
