"""What a neuron hands back in the backward is what stock hands back, or nothing where stock has nothing."""

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import snn_reversible_plugin as srp


def test_weights_without_a_gradient_stay_without_one():
    """RAFNode: its first spikes depend on the state that the current doesn't enter."""
    for converted in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), neuron.RAFNode(step_mode="m"), nn.Linear(3, 2))
        if converted:
            srp.convert_to_reversible(net, arithmetic="stock")
        before = net[0].weight.detach().clone()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
        net(torch.ones(1, 2, 3)).sum().backward()
        optimizer.step()
        assert net[0].weight.grad is None
        assert torch.equal(net[0].weight, before)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("decay_input", [True, False])
def test_zeros_have_stocks_sign(decay_input, steps):
    found = []
    for converted in (False, True):
        node = neuron.ParametricLIFNode(decay_input=decay_input, step_mode="m")
        if converted:
            srp.convert_to_reversible(node, arithmetic="stock")
        node(torch.full((steps, 4), 0.3, requires_grad=True)).sum().backward()
        found.append(node.w.grad)
    assert torch.equal(*found)
    assert torch.equal(*map(torch.signbit, found))


class Own(neuron.LIFNode):
    def neuronal_charge(self, x):
        self.v = self.v * 0.9 + x


@pytest.mark.parametrize(
    "node", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode, neuron.QIFNode, Own]
)
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_gradients_carry_no_graph(node, mode):
    seen = []
    net = nn.Sequential(
        layer.Linear(8, 8, step_mode="m"), node(step_mode="m"), layer.Linear(8, 4, step_mode="m")
    )
    srp.convert_to_reversible(net, mode=mode, arithmetic="stock")
    net[0].register_forward_hook(lambda _module, _inputs, out: out.register_hook(seen.append) and None)
    net(torch.rand(4, 3, 8)).sum().backward()
    assert [(grad.requires_grad, grad.grad_fn) for grad in seen] == [(False, None)]


def test_the_namespace_may_be_patched(monkeypatch):
    from snn_reversible_plugin.spikingjelly import RevLIFNode

    monkeypatch.setattr(neuron, "LIFNode", RevLIFNode)
    net = srp.convert_to_reversible(nn.Sequential(nn.Linear(3, 3), neuron.LIFNode()))
    assert net[1].arithmetic == "grid"


def test_a_parametrization_survives_conversion_and_restore():
    snntorch = pytest.importorskip("snntorch")
    from torch.nn.utils import parametrize

    net = nn.Sequential(nn.Linear(4, 4), snntorch.Leaky(beta=0.9, learn_beta=True, init_hidden=True))
    srp.convert_to_reversible(net, arithmetic="stock")
    parametrize.register_parametrization(net[1], "beta", nn.Sigmoid())
    for again in (srp.restore, srp.convert_to_reversible, lambda net: srp.verify(net, torch.ones(2, 4))):
        again(net)
        assert 0 < float(net[1].beta) < 1
        net[1].mem = net[1].reset_mem()
        net(torch.ones(2, 4)).sum().backward()
    assert type(srp.restore(net)[1]).__name__ == "ParametrizedLeaky"
