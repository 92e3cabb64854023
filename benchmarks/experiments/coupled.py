"""The coupled node's two backward procedures, and what a node holds.

Streamlined: gradients come in the sweep that undoes the steps. Plain: each step is undone, run forward
again under autograd, and differentiated, as any reversible layer can be. Both start from the same forward,
and their gradients are compared bit for bit. Beside them autograd through the same equations, and
SpikingJelly's stock LIFNode.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from snn_reversible_plugin.neurons.coupled import reference as coupled
from snn_reversible_plugin.neurons.coupled.call import run_sequence
from snn_reversible_plugin.neurons.coupled.in_place import Work as Buffers
from snn_reversible_plugin.neurons.coupled.in_place import by_group, forward
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.spikingjelly.coupled import surrogate_of

from ..experiment import Entries, Entry, Options, Tick, Work
from ..measure import alternate, ratio

LAYERS = {
    "linear, T=100, N=128, 512 wide": [100, 128, 512],
    "convolution, T=8, N=16, 64x32x32": [8, 16, 64, 32, 32],
}
QUICK = {"linear, T=3, N=2, 8 wide": [3, 2, 8]}
NODES = ("plain procedure", "streamlined", "autograd", "stock LIFNode")
TAU, BETA, SURROGATE = 2.0, 0.25, surrogate.ATan()
Node = Callable[[Tensor], tuple[Tensor, Any]]


class PlainProcedure(torch.autograd.Function):
    """Undo a step, run it forward under autograd, differentiate; and so on, the last step first."""

    @staticmethod
    def forward(ctx: Any, x_seq: Tensor, node: coupled.Node) -> tuple[Tensor, Tensor]:
        y_seq, s, remainders = forward(x_seq, None, node)
        ctx.node, ctx.parts = node, [part for part, _ in remainders]
        ctx.save_for_backward(y_seq, s, *(stored for _, stored in remainders))
        return y_seq, s

    @staticmethod
    def backward(ctx: Any, g_y: Tensor, g_s: Tensor) -> tuple[Tensor, None]:
        y_seq, s, *bits = ctx.saved_tensors
        constants = ctx.node.constants
        g_x = torch.empty_like(y_seq)
        for part, stored in zip(ctx.parts, bits, strict=True):
            y = y_seq[:, part]
            work = Buffers(by_group(y[0], 1), ctx.node)
            work.start(by_group(s[part], 1))
            g_state = g_s[part]
            for t in reversed(range(len(y))):
                work.read(by_group(y[t], 1), work.y, constants.bits)
                work.undo_second(stored[t])
                work.undo_first()
                torch.sub(work.y[0], work.o, alpha=work.unit, out=work.x[1])
                x = torch.cat([*work.x], 1).mul_(2.0**constants.shift / work.unit).requires_grad_()
                before = torch.cat(work.s, 1).mul_(1 / work.unit).requires_grad_()
                with torch.enable_grad():
                    outputs = coupled.sequence(x.unsqueeze(0), before, constants, SURROGATE)
                g_outputs = (g_y[t : t + 1, part], g_state)
                g_x[t, part], g_state = torch.autograd.grad(outputs, (x, before), g_outputs)
        return g_x, None


def nodes(device: str) -> dict[str, Node]:
    """Each gives its outputs first."""
    constants = coupled.constants_of(
        "node", tau=TAU, alpha=0.0, beta=BETA, v_threshold=1.0, bits=16, detach_reset=False
    )
    known = surrogate_of(SURROGATE, torch.float32, torch.device(device), torch.Size((1, 2)))
    node = coupled.Node(constants, known, "node")
    stock = neuron.LIFNode(tau=TAU, surrogate_function=SURROGATE, step_mode="m").to(device)

    def run_stock(x_seq: Tensor) -> tuple[Tensor, Any]:
        functional.reset_net(stock)
        return stock(x_seq), None

    runs: tuple[Node, ...] = (
        lambda x_seq: PlainProcedure.apply(x_seq, node),
        lambda x_seq: run_sequence(x_seq, None, node),
        lambda x_seq: coupled.sequence(x_seq, None, constants, SURROGATE),
        run_stock,
    )
    return dict(zip(NODES, runs, strict=True))


def layers(options: Options) -> Iterator[Work]:
    for layer, shape in (QUICK if options.quick else LAYERS).items():
        yield Work(layer, NODES, {"layer": layer, "shape": shape, "repeats": options.rounds(5)})


def times(
    names: Sequence[str], options: Options, tick: Tick, layer: str, shape: list[int], repeats: int
) -> Entries:
    x_seq = torch.randn(shape, device=options.device).mul_(2).requires_grad_()
    weights, known = torch.randn_like(x_seq), nodes(options.device)
    losses: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}

    def run_forward(name: str) -> None:
        losses[name] = (known[name](x_seq)[0] * weights).sum()

    def run_backward(name: str) -> None:
        (gradients[name],) = torch.autograd.grad(losses.pop(name), x_seq)

    runs = {(name, run): partial(run, name) for name in names for run in (run_forward, run_backward)}
    seconds = alternate(runs, repeats, x_seq.device, lambda run: tick(f"coupled node: {layer}, {run[0]}"))
    found = {}
    steps = {}
    for name in names:
        forward_, backward_ = (seconds[name, run] for run in (run_forward, run_backward))
        steps[name] = [a + b for a, b in zip(forward_, backward_, strict=True)]
        equal = torch.equal(gradients[name], gradients[NODES[0]])
        found[name] = {
            "node": name, "forward": statistics.median(forward_), "backward": statistics.median(backward_),
            "step": statistics.median(steps[name]),
            "backward_ratio": ratio(backward_, seconds[NODES[0], run_backward]),
            "step_ratio": ratio(steps[name], steps[NODES[0]]),
            "gradient": "" if name.startswith("stock") else "equal" if equal else "differs",
        }  # fmt: skip
    return found


def small(options: Options) -> Iterator[Work]:
    yield Work("N=16, 64 wide", NODES[1:], {"lengths": [4, 8] if options.quick else [10, 100, 1000]})


def held(name: str, options: Options, _tick: Tick, lengths: list[int]) -> Entry:
    """What lives between forward and backward, beyond inputs, and outputs that the next layer saves too."""
    run, row = nodes(options.device)[name], []
    for steps in lengths:
        x_seq = torch.randn(steps, 16, 64, device=options.device, requires_grad=True)
        weights = torch.randn_like(x_seq, requires_grad=True)
        bytes_held, _ = count_step(lambda x=x_seq, w=weights: (run(x)[0] * w).sum())  # type: ignore[misc]
        row.append((bytes_held - 4 * x_seq.numel()) / (16 * 64))
    more = (row[-1] - row[0]) / (lengths[-1] - lengths[0])
    return {"node": name, "held": dict(zip(map(str, lengths), row, strict=True)), "more": more}
