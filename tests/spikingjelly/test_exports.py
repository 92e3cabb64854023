"""SpikingJelly's export to NIR writes the same graph for a converted network as for stock."""

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.spikingjelly import RevLIFNode

pytest.importorskip("nirtorch")

NEURONS = {
    "IF": lambda: neuron.IFNode(v_reset=0.0),
    "LIF": lambda: neuron.LIFNode(tau=3.0, v_reset=0.0),
    "PLIF": lambda: neuron.ParametricLIFNode(v_reset=0.0),
    "a type of ours": lambda: RevLIFNode(tau=3.0, v_reset=0.0),
}


def graph_of(net):
    from spikingjelly.activation_based import nir_exchange

    return nir_exchange.export_to_nir(net, example_input=torch.ones(4, 1, 5))


def assert_same_graph(ours, theirs):
    assert ours.edges == theirs.edges
    assert {name: type(node) for name, node in ours.nodes.items()} == {
        name: type(node) for name, node in theirs.nodes.items()
    }
    for name, node in ours.nodes.items():
        for key, value in vars(node).items():
            other = vars(theirs.nodes[name])[key]
            assert np.all(value == other), (name, key)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_the_graph_is_stocks(name, arithmetic):
    def network(make):
        torch.manual_seed(0)
        net = nn.Sequential(layer.Linear(5, 5), make(), layer.Linear(5, 3), neuron.IFNode(v_reset=0.0))
        functional.set_step_mode(net, "m")
        return net

    stock = network(NEURONS["LIF"] if name == "a type of ours" else NEURONS[name])
    ours = srp.convert_to_reversible(network(NEURONS[name]), arithmetic=arithmetic)
    assert_same_graph(graph_of(ours), graph_of(stock))
    ours(torch.rand(4, 1, 5)).sum().backward()
    assert_same_graph(graph_of(ours), graph_of(stock))
    assert_same_graph(graph_of(srp.restore(ours)), graph_of(stock))
