"""SLTT beside back-propagation through time, from T = 10 to T = 1,000.

Peak memory of a training step beyond parameters and inputs, its time, and the cosine between its gradient
and that of back-propagation through time. The peer is SpikingJelly's ``SLTTLIFNode``, which detaches
itself, in the loop that its users write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.training import sltt_backward

from ..experiment import Entries, Entry, Options, Tick, Work
from ..measure import alternate, counter_on

BATCH = 16


def network(of: type[nn.Module]) -> nn.Sequential:
    """Two convolutional layers and a hidden one, for a frame [N, 2, 16, 16]."""

    def lif() -> nn.Module:
        return of(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())

    return nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), lif(), layer.MaxPool2d(2),
        layer.Conv2d(16, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), lif(),
        layer.Flatten(), layer.Linear(16 * 64, 64), lif(), layer.Linear(64, 10),
    )  # fmt: skip


def loss_fn(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, torch.arange(BATCH, device=output.device) % 10)


def through_time(model: nn.Module, x_seq: Tensor) -> None:
    torch.stack([loss_fn(model(x)) for x in x_seq]).mean().backward()


def by_hand(model: nn.Module, x_seq: Tensor) -> None:
    for x in x_seq:
        (loss_fn(model(x)) / len(x_seq)).backward()


def sltt(model: nn.Module, x_seq: Tensor) -> None:
    sltt_backward(model, x_seq, loss_fn)


def sltt_5(model: nn.Module, x_seq: Tensor) -> None:
    sltt_backward(model, x_seq, loss_fn, 5, generator=torch.Generator().manual_seed(0))


# Of each method: its neurons, whether the network is converted, and its backward.
METHODS: dict[str, tuple[type[nn.Module], bool, Callable[[nn.Module, Tensor], None]]] = {
    "through time, stock": (neuron.LIFNode, False, through_time),
    "through time, converted": (neuron.LIFNode, True, through_time),
    "SLTTLIFNode by hand": (neuron.SLTTLIFNode, False, by_hand),
    "SLTT, stock": (neuron.LIFNode, False, sltt),
    "SLTT, converted": (neuron.LIFNode, True, sltt),
    "SLTT-5, converted": (neuron.LIFNode, True, sltt_5),
}


def works(options: Options) -> Iterator[Work]:
    for steps in (6,) if options.quick else (10, 100, 1000):
        yield Work(str(steps), tuple(METHODS), {"steps": steps, "repeats": options.rounds(2)})


def together(methods: Sequence[str], options: Options, tick: Tick, steps: int, repeats: int) -> Entries:
    found, gradients = {}, {}
    for name in methods:
        tick(f"SLTT: T = {steps}, {name}")
        found[name], gradients[name] = _measured(name, steps, repeats, options.device)
    reference = gradients["through time, stock"]
    for name, gradient in gradients.items():
        found[name]["cosine"] = nn.functional.cosine_similarity(reference, gradient, dim=0).item()
    return found


def _measured(name: str, steps: int, repeats: int, device: str) -> tuple[Entry, Tensor]:
    of, converted, backward = METHODS[name]
    torch.manual_seed(0)
    model = network(of).to(device)
    if converted:
        srp.convert_to_reversible(model)
    x_seq = torch.rand(1, BATCH, 2, 16, 16, device=device).mul_(2).expand(steps, -1, -1, -1, -1)

    def step() -> None:
        model.zero_grad()
        functional.reset_net(model)
        backward(model, x_seq)

    seconds = alternate({name: step}, repeats, x_seq.device)[name]
    with counter_on(x_seq.device) as counter:
        step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {"peak": counter.peak, "seconds": min(seconds)}, gradient
