"""Pipeline stages in two gloo processes: chains, columns, wrapped and converted nets train as in one."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks import RevSSequence
from snn_reversible_plugin.blocks.wrapped import wrapped_chains
from tests.blocks.test_chain import branch, chain
from tests.blocks.test_columns import make
from tests.blocks.test_leapfrog import network
from two_processes import together

pipelining = pytest.importorskip("torch.distributed.pipelining")


class Half(nn.Module):
    """One stage: takes and gives [N, T, C, H, W], and starts its neurons fresh."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        functional.reset_net(self.layers)
        return self.layers(x.transpose(0, 1)).transpose(0, 1).contiguous()


class Top(nn.Module):
    """Columns over the time steps of [T, N, C, H, W]; their states at the end, for every time step."""

    def __init__(self):
        super().__init__()
        self.columns = make(2, (4, 4))
        self.stem = nn.Conv2d(4, 2, 1)

    def forward(self, x_seq):
        states, _ = self.columns([self.stem(x) for x in x_seq[:2]])
        return torch.stack([*states, states[-1]])


def halves(kind, reversible):
    torch.manual_seed(0)
    if kind == "chain":
        found = [Half(chain(2)), Half(chain(1), neuron.IFNode(step_mode="m"))]
    elif kind == "parallel":
        blocks = [srp.RevSBlock(branch(), branch()) for _ in range(4)]
        found = [Half(RevSSequence(two, parallel=2)) for two in (blocks[:2], blocks[2:])]
    elif kind == "columns":
        found = [Half(chain(1)), Half(Top())]
    else:
        conv = [layer.Conv2d(4, 4, 3, padding=1, step_mode="m") for _ in range(2)]
        found = [Half(conv[0], network(4)), Half(network(2), conv[1], neuron.LIFNode(step_mode="m"))]
    for half in found:
        if kind == "wrapped":
            srp.wrap_residual_blocks(half)
        if kind in ("wrapped", "converted") and reversible:
            srp.convert_to_reversible(half)
    return found


def batches():
    torch.manual_seed(1)
    return torch.randn(6, 3, 4, 5, 5), torch.randn(6, 3, 4, 5, 5)


def loss_of(out, target):
    return (out - target).square().sum()


def in_stages(rank, kinds):
    found = {}
    for kind in kinds:
        half = halves(kind, True)[rank]
        (x, target), shape = batches(), (2, 3, 4, 5, 5)
        taken, given = torch.empty(shape, requires_grad=rank > 0), torch.empty(shape, requires_grad=True)
        device = torch.device("cpu")
        stage = pipelining.PipelineStage(half, rank, 2, device, input_args=taken, output_args=given)
        schedule = pipelining.ScheduleGPipe(stage, 3, loss_fn=loss_of)
        for _ in range(2):
            schedule.step(*([] if rank else [x]), **({"target": target} if rank else {}))
        found[kind] = [p.grad for p in half.parameters()]
    return found


def in_one(kind):
    """The same micro-batches, plainly or stock."""
    found = halves(kind, False)
    for module in nn.ModuleList(found).modules():
        if isinstance(module, (RevSSequence, srp.RevSColumns)):
            module.reversible = False
    for wrapped in wrapped_chains(nn.ModuleList(found)):
        wrapped.chain.reversible = False
    for _ in range(2):
        for x, target in zip(*(whole.chunk(3) for whole in batches()), strict=True):
            loss_of(found[1](found[0](x)), target).backward()
        for half in found:
            for p in half.parameters():
                p.grad.div_(3)
    return [[p.grad for p in half.parameters()] for half in found]


def test_two_stages_have_the_gradients_of_one_process(tmp_path):
    kinds = ["chain", "parallel", "columns", "wrapped", "converted"]
    stages = together(tmp_path, in_stages, kinds)
    for kind in kinds:
        for ours, plain in zip(stages, in_one(kind), strict=True):
            assert len(ours[kind]) == len(plain) > 3
            assert all(torch.equal(a, b) for a, b in zip(ours[kind], plain, strict=True)), kind
