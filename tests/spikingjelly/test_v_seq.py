"""The membranes of all steps that a neuron is told to store, held once somebody reads them."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from old_spikingjelly import make, release
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step

KINDS = ["2.0", "2.0, float64", "0.0.0.0.14", "0.0.0.0.12"]


def network(kind, width=64, depth=3):
    """Layers whose neurons all store v_seq; in float64 2.0 runs without its operators."""
    layers = []
    for _ in range(depth):
        if kind.startswith("2.0"):
            linear = layer.Linear(width, width, step_mode="m")
            node = neuron.LIFNode(
                step_mode="m", store_v_seq=True, surrogate_function=surrogate.ATan(), v_reset=None
            )
        else:
            old = release(kind)
            linear = nn.Linear(width, width)
            store = {"store_v_seq": True} if kind == "0.0.0.0.14" else {}
            node = make(old, "LIFNode", v_reset=None, **store)
        layers += [linear, node]
    net = nn.Sequential(*layers)
    return net.double() if "float64" in kind else net


def reset(net):
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()


def given(kind, *shape):
    x = (torch.rand(shape) > 0.5).float()
    return x.double() if "float64" in kind else x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_in(2)
def test_unread_ones_cost_nothing(kind):
    net, x = network(kind), given(kind, 32, 16, 64)

    def loss():
        reset(net)
        return net(x).mean()

    stock, _ = count_step(loss)
    srp.convert_to_reversible(net, arithmetic="stock")
    ours, _ = count_step(loss)
    assert ours < stock / 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "in the loss", "after the backward", "new weights", "last"])
def test_read_ones_are_stocks(kind, when):
    found, stock = [], network(kind, width=16)
    reset(stock)
    # TorchScript adds up in another order at first, so stock runs twice before.
    converted = srp.convert_to_reversible(copy.deepcopy(stock), arithmetic="stock")
    for net in (*(copy.deepcopy(stock) for _ in range(3)), converted):
        reset(net)
        torch.manual_seed(1)
        seen = []

        def read(net=net, seen=seen):
            seen.extend(node.v_seq for node in list(net)[1::2])
            seen.extend(node.v for node in list(net)[1::2])

        out = net(given(kind, 6, 40, 16))
        if when in ("before", "in the loss"):
            read()
        loss = out.square().sum()
        if when == "in the loss":
            loss = loss + sum((one * (index + 1.5)).sin().sum() for index, one in enumerate(seen))
        if when == "last":
            read = lambda net=net, seen=seen: seen.extend(node.v for node in list(net)[1::2])  # noqa: E731
        loss.backward()
        if when == "new weights":
            torch.optim.SGD(net.parameters(), lr=0.5).step()
            with torch.no_grad():
                net[0].weight.mul_(2)
        if when in ("after the backward", "new weights", "last"):
            read()
        found.append([out, *seen, *(p.grad for p in net.parameters())])
    assert len(found[-1]) > 9
    assert [torch.equal(*pair) for pair in zip(*found[-2:], strict=True)] == [True] * len(found[-1])


@pytest.mark.parametrize("store", [False, True])
def test_the_time_between_backward_and_reset_holds_no_membranes(store):
    width, steps, batch = 16, 4, 8
    net = nn.Sequential(
        *[
            one
            for _ in range(4)
            for one in (
                layer.Conv2d(width, width, 3, padding=1, bias=False, step_mode="m"),
                neuron.LIFNode(step_mode="m", store_v_seq=store),
            )
        ]
    )
    srp.convert_to_reversible(net)
    x = (torch.rand(steps, batch, width, 16, 16) > 0.5).float()
    net(x).mean().backward()  # gradients have their place
    functional.reset_net(net)
    with AllocationCounter() as counter:
        net(x).mean().backward()
        left = counter.live
    a_membrane = 4 * batch * width * 16 * 16
    of_bits = steps * a_membrane // 32 + net[0].weight.nbytes
    # The first layer's current is made of real numbers, which are no smaller than what they make.
    assert left < (1 + steps * store) * a_membrane + 3 * of_bits + 20_000
    functional.reset_net(net)


def test_a_copy_of_the_network_has_no_promise():
    net = srp.convert_to_reversible(network("2.0"))
    net(given("2.0", 4, 2, 64)).sum().backward()
    reset(net)
    assert copy.deepcopy(net)[1].v_seq is None
