"""Wrappers for several devices, as far as a CPU goes: converted trains as stock does."""

import importlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import differentiated
from two_processes import together

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
snntorch = pytest.importorskip("snntorch")
from spikingjelly.activation_based import functional, layer  # noqa: E402


def make(neurons=2):
    """With the first neuron alone it compiles in half the time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        neuron.LIFNode(),
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(8 * 16, 32),
        *([neuron.ParametricLIFNode(), layer.Linear(32, 4)] if neurons == 2 else []),
    )
    functional.set_step_mode(model, "m")
    return model


def train(rank):
    parameters = []
    for convert in (False, True):
        model = srp.convert_to_reversible(make()) if convert else make()
        ddp = DistributedDataParallel(model, static_graph=False)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(10 + rank)
        for _ in range(3):
            optimizer.zero_grad()
            functional.reset_net(model)
            ddp(torch.rand(4, 3, 2, 8, 8) * 3).square().sum().backward()
            optimizer.step()
        parameters.append([p.detach().clone() for p in model.parameters()])
    same = all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    moved = not torch.equal(parameters[0][0], next(make().parameters()))
    return same, moved


def train_compiled(rank):
    """DistributedDataParallel around a compiled network, with the pass and without."""
    from graph_only import GraphOnly, WithoutInductor
    from snn_reversible_plugin.compiler import entry

    entry.Backend = WithoutInductor
    parameters = []
    for compiled in (torch.compile(make(1), backend=GraphOnly(None)), srp.compile(make(1))):
        ddp = DistributedDataParallel(compiled)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(10 + rank)
        for _ in range(3):
            optimizer.zero_grad()
            functional.reset_net(compiled)
            ddp(torch.rand(4, 3, 2, 8, 8) * 3).square().sum().backward()
            optimizer.step()
        parameters.append([p.detach().clone() for p in (*compiled.parameters(), compiled._orig_mod[2].v)])
    regions = compiled.forward.backend.packing.regions
    return all(map(torch.equal, *parameters)), sum(region.packed for region in regions) >= 2, parameters[0]


def test_two_processes_compiled(tmp_path):
    """The same parameters in both, and as without the pass; each has the membranes of its own batch."""
    (same, packed, ours), (same_too, packed_too, theirs) = together(tmp_path, train_compiled)
    assert same and same_too and packed and packed_too
    assert all(map(torch.equal, ours[:-1], theirs[:-1])) and not torch.equal(ours[-1], theirs[-1])


def test_two_processes(tmp_path):
    assert together(tmp_path, train) == [(True, True), (True, True)]


class Stepped(nn.Module):
    """One time step a call; the model itself computes with the membrane, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.lif = snntorch.Leaky(beta=0.9, init_hidden=True, learn_threshold=True)
        self.last = snntorch.Leaky(beta=0.8, init_hidden=True, output=True)

    def forward(self, x):
        _, mem = self.last(self.out(self.lif(self.fc(x))))
        return mem * mem, mem


def train_step_by_step(rank, arithmetic, around):
    """A loop calls the wrapped network: each call overwrites the buffers first, membranes among them."""
    reference, net = Stepped(), srp.convert_to_reversible(Stepped(), arithmetic=arithmetic)
    if arithmetic != "stock":
        srp.convert_to_reversible(reference, arithmetic=arithmetic)
    gradients = []
    for model in (reference, net):
        ddp = DistributedDataParallel(model)
        torch.manual_seed(rank + 1)
        whole = srp.reversible(net) if around and model is net else nullcontext()
        by_autograd = (
            differentiated(model) if model is reference and arithmetic != "stock" else nullcontext()
        )
        loss = 0.0
        with whole, by_autograd:
            for x in torch.rand(6, 4, 8) * 2:
                square, mem = ddp(x)
                # What saves the membrane by reference is overwritten before its backward, in stock too.
                loss = loss + square.mean() + mem.square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def step_by_step(rank):
    return [
        train_step_by_step(rank, arithmetic, around)
        for arithmetic in ("stock", "auto")
        for around in (False, True)
    ]


def test_membranes_that_the_wrapper_overwrites_between_two_calls(tmp_path):
    assert together(tmp_path, step_by_step) == [[True] * 4] * 2


class NormOfBoth(torch.autograd.Function):
    """Batch norm over both processes, as SyncBatchNorm computes it, whose kernels no CPU has."""

    sums = 0

    @staticmethod
    def forward(ctx, x, weight):
        mean, square = x.mean(0), x.square().mean(0)
        for statistic in (mean, square):
            dist.all_reduce(statistic)
            NormOfBoth.sums += 1
        mean, square = mean / 2, square / 2
        scale = (square - mean * mean + 1e-5).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        return (x - mean) * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, scale = ctx.saved_tensors
        normed = (x - mean) * scale
        sums = torch.stack([grad.mean(0), (grad * normed).mean(0)])
        dist.all_reduce(sums)
        NormOfBoth.sums += 1
        sums = sums / 2
        of_x = (grad - sums[0] - normed * sums[1]) * scale * weight
        return of_x, (grad * normed).sum(0)


class BothNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return NormOfBoth.apply(x.flatten(0, 1), self.weight).view_as(x)


def train_with_statistics_of_both(rank):
    found, sums = [], []
    for convert in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 16), neuron.LIFNode(step_mode="m"), nn.Linear(16, 16), BothNorm(16),
            neuron.LIFNode(step_mode="m"), nn.Linear(16, 4), BothNorm(4),
        )  # fmt: skip
        ddp = DistributedDataParallel(srp.convert_to_reversible(model) if convert else model)
        torch.manual_seed(rank + 1)
        NormOfBoth.sums = 0
        ddp(torch.rand(4, 3, 8) * 3).square().sum().backward()
        sums.append(NormOfBoth.sums)
        found.append([p.grad.clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True)), sums


def test_a_norm_over_both_processes_sums_no_second_time(tmp_path):
    assert together(tmp_path, train_with_statistics_of_both) == [(True, [6, 6])] * 2


@pytest.mark.parametrize("first", ["converted", "synchronized"])
def test_synchronized_batch_norm(first):
    """On a CPU and in one process it computes what batch norm computes."""

    def synchronized(model):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def plain():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), neuron.IFNode(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        )

    expected = synchronized(plain())
    net = plain()
    convert = partial(srp.convert_to_reversible, arithmetic="stock")
    for change in (convert, synchronized)[:: 1 if first == "converted" else -1]:
        net = change(net)
    assert isinstance(net, srp.convert.Recorded) and isinstance(net[1], nn.SyncBatchNorm)
    x = torch.rand(3, 2, 8, 8) * 2
    for model in (expected, net):
        model(x).square().sum().backward()
    for a, b in zip(expected.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_data_parallel_without_a_gpu_and_replicas():
    """A replica shares its module's ``__dict__`` but for parameters, which are tensors with a graph."""
    expected, net = make(), srp.convert_to_reversible(make())
    x = torch.rand(4, 3, 2, 8, 8) * 3
    for model in (expected, nn.DataParallel(net)):
        model(x).square().sum().backward()
    for a, b in zip(expected.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_replicas_of_data_parallel(monkeypatch):
    """What replicate makes, with copies on the CPU in place of copies on GPUs, run in a thread each."""
    parallel = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(parallel, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(
        parallel,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    parts = (torch.rand(4, 6, 2, 8, 8) * 3).chunk(2, 1)
    found = []
    for net in (make(), srp.convert_to_reversible(make())):
        replicas = parallel.replicate(net, [0, 1])
        with ThreadPoolExecutor(2) as threads:
            outputs = list(threads.map(lambda replica, x: replica(x), replicas, parts))
        torch.cat(outputs, 1).square().sum().backward()
        found.append([*outputs, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


class Split(nn.Module):
    """A loop whose first layer is split by columns, and the second by rows."""

    def __init__(self, lif, node):
        super().__init__()
        self.fc1, self.lif, self.fc2, self.node = nn.Linear(6, 8), lif, nn.Linear(8, 4), node

    def forward(self, x_seq):
        functional.reset_net(self)
        mem, total = self.lif.init_leaky(), 0
        for x in x_seq:
            spikes, mem = self.lif(self.fc1(x), mem)
            total = total + self.node(self.fc2(spikes))
        return total + self.node.v


def train_split(rank):
    """For whether neurons get DTensors, and whether the layers are split after the conversion: whether two
    steps leave the stock network's parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for local in (True, False):
        for late in (True, False):
            parameters = []
            for converts in (False, True):
                torch.manual_seed(0)
                net = Split(snntorch.Leaky(beta=0.9), neuron.LIFNode())
                plan = {"fc1": ColwiseParallel(use_local_output=local), "fc2": RowwiseParallel()}
                if converts and late:
                    srp.convert_to_reversible(net, arithmetic="stock")
                parallelize_module(net, mesh, plan)
                if converts and not late:
                    srp.convert_to_reversible(net, arithmetic="stock")
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
                torch.manual_seed(1)
                for _ in range(2):
                    optimizer.zero_grad()
                    net(torch.rand(5, 3, 6) * 2).square().sum().backward()
                    optimizer.step()
                parameters.append([p.full_tensor() for p in net.parameters()])
            found[local, late] = all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))
    return found


def test_layers_that_are_split_over_processes(tmp_path):
    expected = {(local, late): True for local in (True, False) for late in (True, False)}
    assert together(tmp_path, train_split) == 2 * [expected]
