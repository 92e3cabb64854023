"""Networks that Inductor really compiles, beside stock compiled the same way."""

import copy
import time

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from for_compilers import Broken, Loop

pytestmark = pytest.mark.slow
ROWS = torch.rand(5, 16, 12, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()


def convolutions():
    return nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1, bias=False, step_mode="m"),
        layer.BatchNorm2d(8, step_mode="m"),
        neuron.LIFNode(step_mode="m"),
        layer.MaxPool2d(2, step_mode="m"),
        layer.Dropout(0.3, step_mode="m"),
        layer.Conv2d(8, 4, 3, padding=1, step_mode="m"),
        neuron.IFNode(step_mode="m"),
    )


class Steps(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x_seq):
        return sum(self.net(x) for x in x_seq)


@pytest.mark.parametrize(
    ("make", "mode"),
    [(Loop, "memory"), (lambda: srp.convert_to_reversible(Broken()), "memory"), (Broken, "speed")],
    ids=["own neurons in a loop", "a converted network, and a break", "speed"],
)
def test_verified(make, mode):
    torch.manual_seed(1)
    compiled = srp.compile(make(), mode=mode)
    found = srp.verify(compiled, ROWS, repeats=1)
    assert found.ok and found.outputs_equal and found.on_tape is None
    assert found.stored["codes"] > 0 and found.compiled.held < found.stock.held
    assert found.compile_seconds > 0 and found.stock_compile_seconds > 0


def test_by_name():
    """``backend="srp"``. A budget of the user's, which has a mask drawn again, changes nothing."""
    net, x = convolutions(), torch.rand(4, 8, 2, 8, 8) * 3
    twin = copy.deepcopy(net)
    outputs, gradients = [], []
    for module, backend, budget in ((net, "srp", 0.1), (twin, "inductor", 1.0)):
        torch.manual_seed(3)
        with torch._functorch.config.patch(activation_memory_budget=budget):
            out = torch.compile(module, backend=backend)(x)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append([parameter.grad for parameter in module.parameters()])
    assert torch.equal(*outputs) and 0 < float(outputs[0].mean()) < 1
    assert all(map(torch.equal, *gradients))


def test_report():
    """Also of a network that came out of the compiler's caches, where no pass has seen it."""
    compiled = srp.compile(Broken())
    compiled(ROWS).sum().backward()
    functional.reset_net(compiled)
    report = srp.memory_report(compiled, ROWS)
    (region, *_) = [one for one in compiled.forward.backend.packing.regions if one.packed]
    assert {row.name: row.bytes for row in report.modules}["codes"] == region.stored["codes"]
    assert report.converted.held < report.stock.held
    report.print()


def test_a_loops_membranes_are_not_written_out_again_at_every_step():
    """SpikingJelly's read twice a step: ten steps took the compiler ten times as long as stock's."""
    seconds = {}
    for compiler in (torch.compile, srp.compile):
        net = nn.Sequential(nn.Linear(6, 6), neuron.LIFNode())
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():
            start = time.process_time()
            compiler(Steps(net))(torch.rand(10, 2, 6)).sum().backward()
            seconds[compiler] = time.process_time() - start
    assert seconds[srp.compile] < 3 * seconds[torch.compile]
