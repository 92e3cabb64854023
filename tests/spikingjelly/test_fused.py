"""arithmetic="fused": float32 membranes where half precision comes in, by name and never by default."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from against_stock import assert_trains_like_autograd
from snn_reversible_plugin.convert import differentiated
from spikingjelly_against_stock import REV, make, outcome, same, settings_of

HALVES = [torch.float16, torch.bfloat16]


def in_float32(node, x, **how):
    """What stock makes of the same numbers, in float32 between two casts."""

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = node

        def forward(self, x):
            return node(x.float()).to(x.dtype)

    return outcome(Between(), x, **how)


def weighted(seen):
    spikes = seen[0].float()
    return (spikes * torch.linspace(-1, 1, spikes.numel()).view(spikes.shape)).sum()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reset", [None, 0.0, -0.3])
def test_it_is_stocks_float32_between_two_casts(reset, dtype):
    for cls in REV:
        for settings in settings_of(cls):
            stock = make(cls, "ATan", reset=reset, **settings)
            ours = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="fused")
            x = torch.randn(4, 3, 9).mul(1.5).to(dtype).requires_grad_()
            for store in (False, True):
                stock.store_v_seq = ours.store_v_seq = store
                results = []
                for run, node in ((outcome, ours), (in_float32, stock)):
                    seen, gradients = run(node, x, membrane=False, loss=weighted)
                    results.append([seen[0], *gradients, node.v])
                assert all(same(a, b) for a, b in zip(*results, strict=True))
                assert results[0][0].dtype is dtype and ours.v.dtype is torch.float32
            assert ours.arithmetic == "fused"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            layer.Conv2d(2, 6, 3, padding=1, step_mode="m"), layer.BatchNorm2d(6, step_mode="m"),
            neuron.LIFNode(step_mode="m", surrogate_function=surrogate.ATan()),
            layer.Conv2d(6, 4, 3, padding=1, step_mode="m"),
            neuron.ParametricLIFNode(step_mode="m", detach_reset=True, v_threshold=0.1),
        )  # fmt: skip

    def forward(self, x_seq):
        with torch.autocast(x_seq.device.type, dtype=torch.bfloat16):
            return self.body(x_seq)


def test_networks_train_as_their_specification():
    assert_trains_like_autograd(Net, (torch.rand(4, 2, 2, 6, 6) * 2,), arithmetic="fused")


def test_stored_membranes_have_float32_gradients_on_the_tape():
    node, found = srp.convert_to_reversible(make(neuron.LIFNode, store=True), arithmetic="fused"), []
    x = torch.randn(4, 3, 9).mul(1.5).half().requires_grad_()
    for around in (differentiated, srp.reversible):
        functional.reset_net(node)
        with around(node):
            node(x)
            (node.v_seq * torch.linspace(-1, 1, 108).view(4, 3, 9)).sum().backward()
        found.append((node.v_seq, x.grad))
        x.grad = None
    assert all(map(same, *found)) and found[1][0].dtype is torch.float32


def test_membranes_that_are_computed_in_slices_are_not_rounded():
    """Weights larger than a membrane, so that this is made in the backward."""
    layers = [
        each
        for width in (2, 64)
        for each in (layer.Conv2d(width, 64, 3, padding=1, step_mode="m"), neuron.LIFNode(step_mode="m"))
    ]
    net = srp.convert_to_reversible(nn.Sequential(*layers), mode="minimal", arithmetic="fused")
    x, found = torch.rand(2, 4, 2, 12, 12) * 3, []
    for around in (differentiated, srp.reversible):
        functional.reset_net(net)
        with around(net), torch.autocast("cpu", dtype=torch.bfloat16):
            net(x).float().square().mean().backward()
        found.append([one.v for one in net[1::2]])
    assert all(map(same, *found)) and found[1][0].dtype is torch.float32


@pytest.mark.slow
def test_reports_name_it_and_verify_shows_the_difference():
    net, x = Net(), torch.rand(8, 4, 2, 6, 6) * 3
    srp.convert_to_reversible(net, arithmetic="fused")
    found = srp.verify(net, x, repeats=1)
    assert found.ok and found.as_autograd and not found.outputs_equal and found.flipped_spikes
    assert set(found.guarantees.values()) == {"fused"}
    found.print()
    assert "fused arithmetic" in str(srp.memory_report(net, x).to_dict())
    srp.convert_to_reversible(net)
    assert srp.verify(net, x, repeats=1).outputs_equal


def test_what_is_not_in_half_precision_is_stocks():
    node = srp.convert_to_reversible(make(neuron.LIFNode), arithmetic="fused")
    found = srp.verify(node, torch.randn(3, 2, 5, requires_grad=True), repeats=1)
    assert found.outputs_equal and found.guarantees == {"": "stock"}


def test_a_network_with_nothing_to_fuse_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), neuron.QIFNode(step_mode="m"))
    with pytest.raises(ValueError, match="no neuron of the model is fused"):
        srp.convert_to_reversible(net, arithmetic="fused")
    assert type(net[1]) is neuron.QIFNode
