"""Mode "minimal": what a batch norm was given stands for all who ask, where the forward had as much."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.sliced import cut, room

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer  # noqa: E402

T, N, C, SIDE = 4, 8, 16, 16


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 14)


class InTurn(nn.Sequential):
    """A network whose forward has a handler, which may read what is handed on: it stands."""

    def forward(self, x):
        with nullcontext():
            for part in self:
                x = part(x)
            return x


def network(layers=3, norm=True, steps=False):
    torch.manual_seed(0)
    parts = []
    for index in range(layers):
        parts.append(layer.Conv2d(C if index else 2, C, 3, padding=1, bias=False))
        parts += [layer.BatchNorm2d(C)] if norm else []
        parts.append(neuron.LIFNode())
    net = InTurn(*parts)
    functional.set_step_mode(net, "m")
    srp.convert_to_reversible(net, mode="minimal")
    if steps:
        net.optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        srp.step_in_backward(net.optimizer)
    return net


X = torch.rand(T, N, 2, SIDE, SIDE)


def loss_of(net):
    functional.reset_net(net)
    return net(X).square().mean()


def again(net, gradients=()):
    """How often the convolutions run again in a backward, in all; adds to ``gradients``."""
    net.zero_grad()
    loss = loss_of(net)
    with torch.profiler.profile(record_shapes=True) as run:
        loss.backward()
    if gradients != ():
        gradients.append([p.grad.clone() for p in net.parameters()])
    if hasattr(net, "optimizer"):
        net.optimizer.step()
    convolved = [event.input_shapes[0][0] for event in run.events() if event.name == "aten::convolution"]
    return sum(convolved) / (T * N)


@pytest.mark.parametrize(("has_room", "times"), [(True, 1), (False, 2)])
def test_a_product_runs_again_once_where_there_is_room(monkeypatch, has_room, times):
    monkeypatch.setattr(room.Room, "has", lambda *_: has_room)
    assert again(network()) == 3 * times


def test_gradients_are_equal_to_rounding_either_way(monkeypatch):
    found = [None]
    for has_room in (True, False):
        monkeypatch.setattr(room.Room, "has", lambda *_, has_room=has_room: has_room)
        again(network(), found)
    for one, other in zip(*found[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


def test_gradients_of_parameters_take_room():
    """Of six equal layers the last is reached while there are none, unless each is stepped and freed."""
    assert again(network(6, steps=True)) == 6
    assert again(network(6)) == 1 + 5 * 2


def test_those_that_stood_in_the_forward_take_none():
    net = network(6)
    loss_of(net).backward()
    loss = loss_of(net)
    with torch.profiler.profile() as run:
        loss.backward()
    names = [event.name for event in run.events()]
    net = network(6, steps=True)
    loss = loss_of(net)
    with torch.profiler.profile() as stepped:
        loss.backward()
    expected = [event.name for event in stepped.events()]
    assert names.count("aten::convolution") == expected.count("aten::convolution")


def test_the_peak_is_hardly_higher(monkeypatch):
    peaks = []
    for has_room in (None, False):
        net = network(6, steps=True)
        if has_room is False:
            monkeypatch.setattr(room.Room, "has", lambda *_: False)
        again(net)
        peaks.append(count_step(lambda net=net: loss_of(net))[1])
    one = T * N * C * SIDE * SIDE * 4
    assert 2 * one < peaks[1] <= peaks[0] < peaks[1] + 0.1 * one


def test_what_is_cached_takes_room(monkeypatch):
    monkeypatch.setattr(room, "bytes_cached", lambda: 1 << 20)
    assert again(network(6, steps=True)) == 6 * 2


def test_nothing_stands_for_neurons_behind_a_convolution_alone(monkeypatch):
    """Nobody else asks for that."""
    asked = []
    monkeypatch.setattr(room.Room, "has", lambda *_: asked.append(1))
    assert again(network(norm=False)) == 3 and not asked


def test_nor_for_norms_in_evaluation(monkeypatch):
    asked = []
    monkeypatch.setattr(room.Room, "has", lambda *_: asked.append(1))
    net = network()
    for part in net:
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    again(net)
    assert not asked


def test_a_part_of_a_backward_leaves_nothing_standing(monkeypatch):
    """The norm's own backward doesn't come: what stands for it goes with the backward."""
    monkeypatch.setattr(room.Room, "has", lambda *_: True)
    held = []
    hold = cut.Replayed.hold
    monkeypatch.setattr(cut.Replayed, "hold", lambda self, *how: (held.append(self), hold(self, *how))[1])
    net = network(2)
    functional.reset_net(net)
    seen = []
    net[4].register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    torch.autograd.grad(net(X).square().mean(), seen, retain_graph=True)
    assert held and all(one.cache is None for one in held)


def test_products_of_several_results_and_of_sparse_operands_are_counted():
    found, dense = room.Room(), torch.rand(4, 4)
    found.product([dense.to_sparse(), dense], (dense, dense, None, 3))
    assert found.has(3 * dense.nbytes, 0) and not found.has(3 * dense.nbytes + 1, 0)
