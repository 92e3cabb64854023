"""What a loop on the grid asks of a node at each step is found once, and again when it may be another."""

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.neurons.on_grid import neuron as on_grid
from snn_reversible_plugin.spikingjelly import on_grid as adapter


def node_on_grid(cls=neuron.LIFNode, **settings):
    node = cls(surrogate_function=surrogate.ATan(), **settings)
    srp.convert_to_reversible(nn.Sequential(nn.Linear(2, 2), node))
    assert not isinstance(node.grid_settings(), str)
    return node


@pytest.fixture
def asked(monkeypatch):
    found = []
    why_not = adapter.why_not
    monkeypatch.setattr(adapter, "why_not", lambda node: found.append(node) or why_not(node))
    return found


@pytest.mark.parametrize("cls", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode])
def test_settings_are_found_once(cls, asked):
    node = node_on_grid(cls)
    first, asked[:] = node.grid_settings(), []
    for _ in range(3):
        node(torch.rand(3, 2))
        assert node.grid_settings() == first
    assert not asked


CHANGES = {
    "threshold": lambda node: setattr(node, "v_threshold", 0.5),
    "an equal threshold": lambda node: setattr(node, "v_threshold", float("1.0")),
    "a threshold that is a tensor": lambda node: setattr(node, "v_threshold", torch.tensor(1.0)),
    "soft reset": lambda node: setattr(node, "v_reset", None),
    "detached reset": lambda node: setattr(node, "detach_reset", True),
    "tau": lambda node: setattr(node, "tau", 3.0),
    "input as it is": lambda node: setattr(node, "decay_input", False),
    "all steps at once": lambda node: setattr(node, "step_mode", "m"),
    "membranes stored": lambda node: setattr(node, "store_v_seq", True),
    "a precision": lambda node: setattr(node, "_neuron_precision", ("fp16", "fp16", "fp16")),
    "another state": lambda node: node.register_memory("w", 0.0),
    "another slope": lambda node: setattr(node.surrogate_function, "alpha", 3.0),
    "a slope that is a tensor": lambda node: setattr(node.surrogate_function, "alpha", torch.tensor(2.0)),
    "no spikes": lambda node: setattr(node.surrogate_function, "spiking", False),
    "another surrogate": lambda node: setattr(node, "surrogate_function", surrogate.Sigmoid()),
    "a hook": lambda node: node.surrogate_function.register_forward_hook(lambda *_: None),
    "a forward of its own": lambda node: setattr(node.surrogate_function, "forward", torch.sigmoid),
    "a grid of its own": lambda node: setattr(node, "grid_bits", 12),
    "a grid of its class": lambda node: setattr(type(node), "grid_bits", 11),
}


@pytest.mark.parametrize("change", CHANGES)
def test_settings_are_found_again(change):
    """They are what a node gives that nobody has asked before."""
    node = node_on_grid(type("Own", (neuron.LIFNode,), {}))
    node.grid_settings()
    CHANGES[change](node)
    found = node.grid_settings()
    adapter._found.clear()
    anew = node.grid_settings()
    assert isinstance(found, str) == isinstance(anew, str)
    if isinstance(found, str):
        assert found == anew
    else:
        assert all(one is other or (one == other and type(one) is type(other))
                   for one, other in zip(found, anew, strict=True))  # fmt: skip


def test_a_learned_decay_is_read_at_each_step():
    node = node_on_grid(neuron.ParametricLIFNode)
    node(torch.rand(3, 2))
    before = node.grid_settings()
    node.w.data.add_(1.0)
    assert node.grid_settings() != before
    first = on_grid._constants[node]["v"][1]
    node(torch.rand(3, 2))
    assert on_grid._constants[node]["v"][1] is not first


def test_nothing_is_kept_of_a_surrogate_of_a_users():
    class Mine(surrogate.ATan):
        pass

    node = neuron.LIFNode(surrogate_function=Mine())
    srp.convert_to_reversible(nn.Sequential(nn.Linear(2, 2), node))
    node.grid_settings()
    assert node not in adapter._found
