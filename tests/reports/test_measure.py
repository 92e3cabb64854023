"""The allocation counter counts what it says it counts."""

import torch

from snn_reversible_plugin.reports.measure import AllocationCounter, measure_step


def test_live_and_peak():
    with AllocationCounter() as counter:
        a = torch.zeros(1024)
        b = a + 1
        assert counter.live == 8192
        a.add_(1)  # in place, and views: nothing new
        view = b.view(32, 32)
        assert counter.live == 8192
        del a
        assert counter.live == 4096 and counter.peak == 8192
        del b
        assert counter.live == 4096
        del view
        assert counter.live == 0 and counter.peak == 8192


def test_what_was_born_outside_is_not_counted():
    x = torch.zeros(1024)
    with AllocationCounter() as counter:
        x.mul_(2)
        x.view(2, 512)
        x.detach()
    assert counter.peak == 0


def test_a_step_counts_saved_tensors_and_gradients():
    weight = torch.rand(1024, requires_grad=True)
    cost = measure_step(lambda: (weight.exp() ** 2).sum())
    assert cost.held == 4096 + 4  # exp's output, which exp and the square save, and the loss
    assert cost.peak >= 3 * 4096 and cost.seconds > 0
