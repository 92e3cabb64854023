"""Accuracy on the N-MNIST subset of a compiled network beside stock's, from the same seeds.

The network of the experiment on ways of training, with all time steps in one call. Accuracies are those of
the weights, in eager mode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

import snn_reversible_plugin as srp

from ..experiment import Entry, Options, Tick, Work
from ..training import through_time
from . import time_accuracy

METHODS = ("stock", "srp.compile")


def works(options: Options) -> Iterator[Work]:
    for work in time_accuracy.works(options):
        yield Work(work.name, METHODS, work.settings)


def measure(method: str, options: Options, tick: Tick, seed: int, epochs: int) -> Entry:
    """Train one of the two from one seed."""
    torch.manual_seed(seed)
    model = time_accuracy.network(time_accuracy.lif).to(options.device)
    functional.set_step_mode(model, "m")
    called = srp.compile(model) if method == "srp.compile" else model

    def scores_of(network: nn.Module, x_seq: Tensor) -> Tensor:
        functional.reset_net(network)
        scores: Tensor = (called if network.training else network)(x_seq)
        return scores.mean(0)

    order = torch.Generator().manual_seed(seed), epochs
    return time_accuracy.trained(model, through_time(scores_of), scores_of, options, tick, order)
