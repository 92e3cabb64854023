"""The allocation counter counts what it says it counts: every byte that the CPU's allocator gives out."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import snn_reversible_plugin.reports.measure as measure
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step, measure_step

MIB = 2**20


@torch.library.custom_op("srp_tests::with_workspace", mutates_args=())
def with_workspace(x: torch.Tensor, size: int) -> torch.Tensor:
    """A kernel that takes ``size`` bytes for itself, and returns as much as it was given."""
    workspace = torch.empty(size, dtype=torch.uint8)
    del workspace
    return x.clone()


def test_live_and_peak():
    with AllocationCounter() as counter:
        a = torch.zeros(1024)
        b = a + a
        assert counter.live == 8192
        a.add_(a)  # in place, and views: nothing new
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
        x.mul_(x)
        x.view(2, 512)
        x.detach()
        del x
    assert counter.peak == counter.live == 0


def test_what_a_kernel_allocates_inside_is_seen():
    x = torch.zeros(1024)
    with AllocationCounter() as counter:
        y = with_workspace(x, 3 * MIB)
        assert counter.live == y.nbytes and counter.peak == 3 * MIB
        z = with_workspace(x, MIB)
    assert counter.live == y.nbytes + z.nbytes and counter.peak == 3 * MIB


def test_the_columns_of_a_convolution_are_seen():
    x, weight = torch.rand(1, 4, 34, 34), torch.rand(2, 4, 3, 3)
    with AllocationCounter() as counter, torch.backends.mkldnn.flags(enabled=False):
        out = F.conv2d(x, weight)
    columns = 4 * (4 * 3 * 3) * (32 * 32)
    assert counter.live == out.nbytes and counter.peak >= out.nbytes + columns


def test_what_dies_after_a_measurement_is_no_part_of_the_next():
    """The allocator tells of the death of a block that it has told of, whosever the address is by then."""
    for _ in range(20):
        with AllocationCounter():
            kept = [torch.zeros(4096) for _ in range(8)]
        kept.clear()
        kept += [torch.zeros(4096) for _ in range(8)]  # unseen, where those were
        with AllocationCounter() as counter:
            fresh = torch.zeros(1 << 16)
            kept.clear()
            assert counter.live == fresh.nbytes


def test_counters_nest():
    with AllocationCounter() as outer:
        a = torch.zeros(1024)
        with AllocationCounter() as inner:
            b = torch.zeros(512)
            del a
            assert (inner.live, inner.peak) == (2048, 2048)
        assert (outer.live, outer.peak) == (2048, 6144)
        del b
        assert outer.live == 0 and inner.live == 2048  # what it was when it was left


def test_an_exception_leaves_no_profiler_on():
    for broken in (_break, lambda: count_step(_break)):
        with pytest.raises(KeyError), AllocationCounter():
            broken()
        assert not torch.autograd._profiler_enabled() and not measure._events._counters
    with AllocationCounter() as counter:
        x = torch.zeros(16)
    assert counter.live == x.nbytes


def _break():
    raise KeyError("stop")


def test_another_profiler_is_refused():
    with torch.profiler.profile() as profiler:
        with pytest.raises(RuntimeError, match="while a profiler is on"), AllocationCounter():
            pass
        torch.zeros(1)
    assert any(event.key == "aten::zeros" for event in profiler.key_averages())
    with AllocationCounter() as counter:
        torch.zeros(16)
    assert counter.peak == 64


def test_each_thread_counts_for_itself():
    found = {}

    def work(size):
        with AllocationCounter() as counter:
            for _ in range(10):
                x = torch.zeros(size)  # the new one is born before the last one dies
            found[size] = counter.live, counter.peak
        del x

    for size in (1024, 2048):  # in turns: there is one profiler a process
        thread = threading.Thread(target=work, args=(size,))
        thread.start()
        thread.join()
    assert found == {size: (4 * size, 8 * size) for size in (1024, 2048)}


def test_a_peak_without_some_tensors():
    with AllocationCounter() as counter:
        gradient = torch.zeros(1024)
        x = torch.zeros(2048)
        del x
        y = torch.zeros(256)
    assert counter.peak == 4 * (1024 + 2048)
    assert counter.peak_beyond([gradient]) == 4 * 2048
    assert counter.peak_beyond([gradient.view(2, 512), y, torch.zeros(3)]) == 4 * 2048


def test_a_step_counts_saved_tensors_and_gradients():
    weight = torch.rand(1024, requires_grad=True)
    cost = measure_step(lambda: (weight.exp() ** 2).sum())
    assert cost.held == 4096 + 4  # exp's output, which exp and the square save, and the loss
    assert cost.peak >= 3 * 4096 and cost.seconds > 0


def test_a_step_counts_the_workspaces_of_its_backward():
    class Hungry(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return with_workspace(grad, 8 * MIB)

    layer = nn.Linear(8, 8)
    held, peak = count_step(lambda: Hungry.apply(layer(torch.rand(4, 8))).sum())
    assert held < 4096 and 8 * MIB <= peak < 8 * MIB + 8192
