"""What a training step of SpikingJelly's takes in all: for comparison with a budget."""

import gc

from spikingjelly.activation_based import functional

from snn_reversible_plugin.reports.measure import AllocationCounter


def train(run, model, x):
    """One step from a fresh start; ``run(model, x)`` goes forward and backward."""
    functional.reset_net(model)
    model.zero_grad()
    run(model, x)


def total(run, model, x):
    """The allocator's peak of the second step, what lives anyway included."""
    train(run, model, x)
    model.zero_grad()
    functional.reset_net(model)
    gc.collect()
    with AllocationCounter() as counter:
        run(model, x)
        peak = counter.peak
    return peak + sum(tensor.nbytes for tensor in (x, *model.parameters(), *model.buffers()))
