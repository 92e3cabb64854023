"""Memory over a training step: the parts are the layers, and the causes at the peak are what really stands
there."""

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.reports.over_step import over_step

KIB = 1024
ACTIVATION = 16 * 64 * 4  # bytes of the largest one in these networks, a time step of it


@torch.library.custom_op("srp_tests::takes_room", mutates_args=())
def takes_room(x: torch.Tensor, size: int) -> torch.Tensor:
    """A kernel that takes ``size`` bytes for itself, and returns as much as it was given."""
    workspace = torch.empty(size, dtype=torch.uint8)
    del workspace
    return x.clone()


takes_room.register_autograd(lambda _, gradient: (gradient.clone(), None))


class TakesRoom(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return takes_room(x, self.size)


def test_causes_of_a_peak_by_hand():
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False))
    x, factor = torch.rand(256, 64), torch.rand(256, 64)
    found = over_step(net, lambda: (net(x) * factor).sum())
    size, weight = x.nbytes, net[0].weight.nbytes
    # The gradient of the first layer's output comes before that of its weight; the tanh is alive.
    assert found.peak.backward
    assert found.peak.held >= size
    assert found.peak.gradients == weight
    assert found.peak.bytes >= 2 * size + weight
    assert not found.peak.workspaces


def test_a_kernels_room_is_a_workspace_of_its_layer():
    net = nn.Sequential(nn.Linear(8, 8), TakesRoom(512 * KIB), nn.Linear(8, 8))
    found = over_step(net, lambda: net(torch.rand(16, 8)).sum())
    assert (found.peak.module, found.peak.backward) == ("1", False)
    assert sum(found.peak.workspaces.values()) + sum(found.peak.tensors.values()) >= 512 * KIB
    assert max({**found.peak.workspaces, **found.peak.tensors}.values()) == 512 * KIB


def multi_step():
    net = nn.Sequential(layer.Linear(32, 64), neuron.LIFNode(), layer.Linear(64, 8), neuron.IFNode())
    functional.set_step_mode(net, "m")
    return net, lambda: (functional.reset_net(net), net(torch.rand(6, 16, 32)).sum())[1]


def loop():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(32, 64), snntorch.Leaky(beta=0.9)

        def forward(self, x_seq):
            membrane, total = self.lif.init_leaky(), 0
            for x in x_seq:
                spikes, membrane = self.lif(self.fc(x), membrane)
                total = total + spikes
            return total

    net = Loop()
    return net, lambda: net(torch.rand(20, 16, 32)).sum()


def chain():
    def branch():
        return nn.Sequential(nn.Linear(16, 16), neuron.IFNode())

    net = nn.Sequential(
        nn.Linear(32, 32), srp.RevSSequence([srp.RevSBlock(branch(), branch()) for _ in range(3)])
    )
    x_seq = torch.rand(2, 16, 32)
    return net, lambda: (functional.reset_net(net), net(x_seq).sum())[1]


@pytest.mark.parametrize("make", [multi_step, loop, chain])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.one_in(3)
def test_causes_add_up_to_the_allocators_peak(make, converted):
    torch.manual_seed(0)
    net, loss_of = make()
    if converted:
        srp.convert_to_reversible(net)
    loss_of().backward()
    given = [parameter.grad for parameter in net.parameters()]
    found = over_step(net, loss_of)
    assert all(parameter.grad is grad for parameter, grad in zip(net.parameters(), given, strict=True))
    net.zero_grad()
    _, peak = count_step(loss_of)
    assert found.peak.bytes == max(max(part.curve) for part in found.parts)
    # Hooks hold a module's arguments while they run: one activation more at most.
    assert abs(found.peak.bytes - peak) <= ACTIVATION
    backwards = [part.backward for part in found.parts]
    assert backwards == sorted(backwards)
    named = {part.module for part in found.parts}
    assert (
        named >= {name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
        or make is chain
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_backward_names_layers_in_their_order():
    net, loss_of = multi_step()
    found = over_step(net, loss_of)
    assert [part.module for part in found.parts if part.backward and part.module] == ["3", "2", "1", "0"]


def test_a_report_says_and_draws_it(capsys):
    net, _ = multi_step()
    report = srp.memory_report(srp.convert_to_reversible(net), torch.rand(6, 16, 32))
    report.print()
    said = capsys.readouterr().out
    assert "peak, stock: in " in said and "peak, converted: in " in said
    figure = report.plot()
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "forward, then backward, layer by layer",
        "KiB held for the backward",
    ]
    assert max(figure.axes[0].lines[0].get_ydata()) == pytest.approx(
        report.stock_over_step.peak.bytes / KIB
    )
    assert report.to_dict()["converted_over_step"]["peak"]["held"] == report.converted_over_step.peak.held
