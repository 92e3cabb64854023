"""Gradients of products one after the other: what is alive while they are computed."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from graph_only import GraphOnly
from snn_reversible_plugin.compiler.graph import is_view, name_of


def network():
    conv = {"padding": 1, "bias": False, "step_mode": "m"}
    return nn.Sequential(
        layer.Conv2d(2, 8, 3, **conv),
        neuron.IFNode(step_mode="m"),
        layer.Conv2d(8, 8, 3, **conv),
        neuron.IFNode(step_mode="m"),
        layer.Conv2d(8, 4, 3, **conv),
    )


def memory_of(node):
    """Whose memory a value is a view of."""
    while is_view(node) or name_of(node) in ("view", "reshape"):
        node = node.args[0]
    return node


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_a_convolution_s_input_is_gone_before_its_gradient_is_made(mode):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, x, backend = network(), torch.rand(4, 2, 2, 8, 8) * 3, GraphOnly(mode)
    torch.compile(net, backend=backend)(x).square().sum().backward()
    found = [parameter.grad for parameter in net.parameters()]
    functional.reset_net(net)
    net.zero_grad()
    net(x).square().sum().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(found, net.parameters(), strict=True))

    ((_, backward),) = backend.halves
    calls = [node for node in backward.nodes if name_of(node) == "convolution_backward"]
    # The network's input wants no gradient; the two other convolutions have two each, the weight's first.
    assert [call.args[-1][:2] for call in calls] == [[False, True], [True, False]] * 2 + [[False, True]]
    for of_weight, of_input in zip(calls[0:4:2], calls[1:4:2], strict=True):
        alike = of_weight.args[0].meta["val"].shape == of_weight.args[1].meta["val"].shape
        assert (of_input.args[1] is of_input.args[0]) == alike
        unpacked = memory_of(of_weight.args[1])
        assert name_of(unpacked) == "convert_element_type"
        seen = (unpacked, of_weight.args[1])
        readers = {user for node in seen for user in node.users if not is_view(user)}
        assert readers <= {of_weight, of_input} if not alike else readers == {of_weight}
