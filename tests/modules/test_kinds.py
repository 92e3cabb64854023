"""What a framework says of modules, and the rows of neuron types."""

import pytest
import torch
from torch import nn

snntorch = pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")
from spikingjelly.activation_based import layer, neuron  # noqa: E402

from snn_reversible_plugin.modules.kinds import (  # noqa: E402
    FRAMEWORKS,
    framework_of,
    is_multi_step,
    is_neuron,
    is_spiking,
    own_neuron_types,
    spikes_of,
)
from snn_reversible_plugin.modules.registry import (  # noqa: E402
    Row,
    StaysStock,
    lean_types,
    register_reversible,
    reversible_type,
    rows_of,
)


class Own(neuron.LIFNode):
    """A user's, in a module of the user's."""


@pytest.mark.parametrize(
    ("make", "framework", "spiking", "any_neuron"),
    [
        (neuron.LIFNode, "spikingjelly", True, True),
        (Own, "spikingjelly", True, True),
        (neuron.GatedLIFNode, "spikingjelly", False, True),
        (neuron.NonSpikingIFNode, "spikingjelly", False, True),
        (layer.Dropout, "spikingjelly", False, False),
        (lambda **_: snntorch.Leaky(0.9), "snntorch", True, True),
        (lambda **_: nn.ReLU(), None, False, False),
    ],
    ids=["LIF", "a subclass", "Gated LIF", "non-spiking IF", "dropout", "Leaky", "no framework"],
)
def test_which_modules_are_neurons_and_whose(make, framework, spiking, any_neuron):
    module = make(T=2) if make is neuron.GatedLIFNode else make()
    found = framework_of(module)
    assert (found.name if found else None) == framework
    assert (is_spiking(module), is_neuron(module)) == (spiking, any_neuron)


def test_step_modes():
    assert is_multi_step(neuron.IFNode(step_mode="m"))
    assert not any(map(is_multi_step, [neuron.IFNode(), snntorch.Leaky(0.9), nn.Linear(2, 2)]))
    jelly, torch_ = FRAMEWORKS
    assert jelly.is_never_stepped(neuron.PSN(2))
    assert not jelly.is_never_stepped(neuron.IFNode(step_mode="m"))
    assert not torch_.is_never_stepped(snntorch.Leaky(0.9))


def test_spikes_are_the_first_output():
    x = torch.ones(2)
    assert torch.equal(spikes_of(neuron.IFNode(), x), x)
    assert torch.equal(spikes_of(snntorch.Leaky(0.9), (x, -x)), x)


def test_rows_of_types_that_a_release_lacks_are_left_out():
    assert rows_of(neuron, [Row("IFNode"), Row("NotYetThere")]) == {neuron.IFNode: Row("IFNode")}


def test_a_type_is_lent_by_its_flag_and_by_no_text():
    class Gate(nn.Module):
        pass

    class Told(nn.Module):
        pass

    @register_reversible(Gate)
    class RevGate(Gate):
        lean = True

    @register_reversible(Told)
    class RevTold(Told):
        treatment = "analytic"

    gate = Gate()
    assert reversible_type(Told()) is RevTold
    lent = lean_types([gate, Told(), neuron.QIFNode(), neuron.NonSpikingIFNode(), nn.ReLU()])
    assert lent == [(gate, Gate, RevGate)]


def test_derived_types_stay_stock_for_the_reason_of_the_nearest_row():
    import snn_reversible_plugin.snntorch
    import snn_reversible_plugin.spikingjelly  # noqa: F401

    class Mine(snntorch.LeakyParallel):
        pass

    with pytest.raises(StaysStock, match=r"torch\.nn\.RNN"):
        reversible_type(Mine(4, 4, beta=0.9))
    with pytest.raises(StaysStock, match="linear"):
        reversible_type(neuron.NonSpikingIFNode())


def test_neurons_of_ones_own_by_their_names_and_those_of_copied_bases():
    """As in OTTT's repository, which has copied SpikingJelly's ``base`` and ``neuron``."""
    base = type("BaseNode", (nn.Module,), {})
    model = nn.Sequential(nn.Linear(2, 2), type("Online", (base,), {})(), type("LIF", (nn.Module,), {})())
    assert own_neuron_types(model) == " (Online, LIF)"
    assert own_neuron_types(nn.Sequential(nn.ReLU(), nn.Identity(), nn.ModuleList())) == ""
