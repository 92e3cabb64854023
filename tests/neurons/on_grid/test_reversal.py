"""Neurons reversible in time: what they compute and hand back is what autograd does on the same grid."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import snntorch
import torch
from snntorch import surrogate, utils
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based import surrogate as sj_surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import convert
from snn_reversible_plugin.grid.step import steps_on
from snn_reversible_plugin.modules.swap import NAME
from snn_reversible_plugin.neurons.on_grid import timeline
from snn_reversible_plugin.neurons.surrogates import by_autograd, in_one_pass
from snn_reversible_plugin.neurons.witness import same_bits
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.snntorch.surrogates import known_surrogate
from snn_reversible_plugin.spikingjelly import surrogates as sj_surrogates
from snntorch_against_stock import equal, make, one_thread_fixture  # noqa: F401

GRID_KINDS = ("Leaky", "Lapicque", "Synaptic", "RLeaky", "RSynaptic")
Script = Callable[[nn.Module, Tensor], list[Any]]


class Loop(nn.Module):
    """Two layers in a loop over time that the user wrote; returns every spike and state."""

    def __init__(self, make_neuron: Callable[[], nn.Module], features: int = 4) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(5, features), make_neuron()
        self.fc2, self.lif2 = nn.Linear(features, features), make_neuron()

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        seen, state1, state2 = [], (), ()
        self.lif1.reset_mem(), self.lif2.reset_mem()
        for x in x_seq:
            spikes, *state = out = self.lif1(self.fc1(x), *state1)
            state1 = out[-_states(self.lif1) :]
            out = self.lif2(self.fc2(spikes), *state2)
            state2 = out[-_states(self.lif2) :]
            seen += [*state, *out]
        return seen


def _states(lif: nn.Module) -> int:
    return 1 + isinstance(lif, (snntorch.Synaptic, snntorch.RSynaptic)) + hasattr(lif, "recurrent")


class Stepped(nn.Module):
    """The same with SpikingJelly's neurons, which keep their state."""

    def __init__(self, make_neuron: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.lif1 = layer.Linear(5, 4), make_neuron()
        self.fc2, self.lif2 = layer.Linear(4, 4), make_neuron()

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        functional.reset_net(self)
        seen = []
        for x in x_seq:
            seen.append(self.lif2(self.fc2(self.lif1(self.fc1(x)))))
            seen += [self.lif1.v, self.lif2.v]
        return seen


def weighted(outputs: list[Tensor]) -> Tensor:
    """A loss with another gradient at every element."""
    generator = torch.Generator().manual_seed(3)
    terms = [
        (out * torch.randn(out.shape, generator=generator)).sum() for out in outputs if out.requires_grad
    ]
    return torch.stack(terms).sum()


def train(net: nn.Module, x_seq: Tensor) -> list[Any]:
    x_seq = x_seq.clone().requires_grad_()
    outputs = net(x_seq)
    weighted(outputs).backward()
    return [[out.detach() for out in outputs], x_seq.grad, gradients(net)]


def gradients(net: nn.Module) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return found


def assert_as_autograd(net: nn.Module, x_seq: Tensor, script: Script = train) -> list[Any]:
    """The converted network does what autograd does on the grid; its two neurons are there."""
    net = srp.convert_to_reversible(net)
    assert all(convert.is_on_grid(lif) for lif in (net.lif1, net.lif2)), convert.settings_of(net)
    twin = copy.deepcopy(net)
    with convert.differentiated(twin):
        expected = script(twin, x_seq)
    actual = script(net, x_seq)
    assert equal(actual, expected)
    return actual


def leaky(**settings: Any) -> Loop:
    return Loop(lambda: snntorch.Leaky(**{"beta": 0.9, "learn_threshold": True} | settings))


def x_of(steps: int = 12, batch: int = 3) -> Tensor:
    return torch.randn(steps, batch, 5) * 2 + 0.3


@pytest.mark.one_in(5)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("kind", GRID_KINDS)
def test_snntorch(kind: str, reset: str, learned: bool) -> None:
    if kind == "Lapicque":
        learned = False
    found = assert_as_autograd(Loop(lambda: make(kind, learned, reset_mechanism=reset)), x_of())
    spikes = torch.stack(found[0][:: len(found[0]) // 12])
    assert spikes.abs().sum() > 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("beta", [1.0, 0.99, 0.75, 0.5, 0.3, 0.1, 1 / 300])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_decays(beta: float, reset: str) -> None:
    for learned in (False, True):
        assert_as_autograd(leaky(beta=beta, reset_mechanism=reset, learn_beta=learned), x_of())


def test_a_decay_and_a_threshold_for_each_neuron() -> None:
    for beta in (torch.tensor([0.5, 0.7, 0.9, 1.0]), torch.tensor([0.2, 0.5, 0.9, 1.0])):
        for reset in ("subtract", "zero"):
            net = leaky(beta=beta, threshold=torch.rand(4), reset_mechanism=reset, learn_beta=True)
            assert_as_autograd(net, x_of())


@pytest.mark.parametrize("surrogate_function", [
    surrogate.atan(), surrogate.fast_sigmoid(), surrogate.sigmoid(), surrogate.straight_through_estimator(),
    surrogate.triangular(), surrogate.SFS(),
])  # fmt: skip
def test_snntorch_surrogates(surrogate_function: Any) -> None:
    assert_as_autograd(leaky(spike_grad=surrogate_function), x_of())


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "function", [sj_surrogate.ATan(), sj_surrogate.Sigmoid(), sj_surrogate.PiecewiseLeakyReLU()]
)
@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3])
@pytest.mark.parametrize("make_neuron", [
    neuron.IFNode,
    lambda **k: neuron.LIFNode(tau=1.4, **k),
    lambda **k: neuron.LIFNode(tau=10.0, decay_input=False, **k),
    lambda **k: neuron.ParametricLIFNode(init_tau=1.7, **k),
    lambda **k: neuron.ParametricLIFNode(init_tau=3.0, decay_input=False, **k),
], ids=["IF", "LIF", "LIF plain input", "PLIF", "PLIF plain input"])  # fmt: skip
def test_spikingjelly(make_neuron: Any, v_reset: float | None, detach_reset: bool, function: Any) -> None:
    settings = {"v_reset": v_reset, "detach_reset": detach_reset, "surrogate_function": function}
    found = assert_as_autograd(Stepped(lambda: make_neuron(v_threshold=0.7, **settings)), x_of())
    assert torch.stack(found[0]).any()


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 0), (3, 0), (2, 1), (40, 129)])
def test_shapes(steps: int, batch: int) -> None:
    for reset in ("subtract", "zero"):
        assert_as_autograd(leaky(reset_mechanism=reset), x_of(steps, batch))
    assert_as_autograd(Stepped(neuron.LIFNode), x_of(steps, batch))


def test_more_neurons_than_a_block() -> None:
    for reset in ("subtract", "zero"):
        net = Loop(lambda reset=reset: snntorch.Leaky(0.8, reset_mechanism=reset), features=700)
        assert_as_autograd(net, x_of(6, 101))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(1, 3, 3), snntorch.Leaky(0.9, learn_beta=True)
        self.conv2, self.lif2 = nn.Conv2d(3, 2, 3), snntorch.Leaky(0.6, reset_mechanism="zero")
        self.pool = nn.MaxPool2d(2)

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        mem1, mem2, seen = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for x in x_seq:
            spk1, mem1 = self.lif1(self.pool(self.conv1(x)), mem1)
            spk2, mem2 = self.lif2(self.conv2(spk1), mem2)
            seen += [spk2, mem1, mem2]
        return seen


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images(memory_format: torch.memory_format) -> None:
    net = Images().to(memory_format=memory_format)
    x_seq = torch.rand(5, 2, 1, 14, 14) * 3
    assert_as_autograd(net, x_seq)


def test_autocast() -> None:
    def script(net: nn.Module, x_seq: Tensor) -> list[Any]:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = net(x_seq)
        assert all(out.dtype is torch.float32 for out in outputs)
        weighted(outputs).backward()
        return [[out.detach() for out in outputs], gradients(net)]

    assert_as_autograd(leaky(learn_beta=True), x_of(), script)


@pytest.mark.one_in(2)
@pytest.mark.filterwarnings("ignore:.*goes on in stock's arithmetic")
@pytest.mark.parametrize("node", [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_stocks(node: Any, half: torch.dtype, autocast: bool) -> None:
    """Where stock's spikes and membranes are half precision, so are these, to the bit."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        net, x_seq = Stepped(node), x_of()
        if not autocast:
            net, x_seq = net.to(half), x_seq.detach().to(half)
        if converted:
            srp.convert_to_reversible(net)
        with torch.autocast("cpu", half, enabled=autocast):
            outputs = net(x_seq)
        weighted([out.float() for out in outputs]).backward()
        found.append([*(out.detach() for out in outputs), net.lif1.v.detach(), *gradients(net)])
    for stock, ours in zip(*found, strict=True):
        assert stock.dtype is ours.dtype
        assert torch.equal(stock, ours)


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_modes(mode: str) -> None:
    net, x_seq = leaky(), x_of()
    found = [train(srp.convert_to_reversible(copy.deepcopy(net), mode=m), x_seq) for m in ("memory", mode)]
    assert equal(*found)


# Graphs as users treat them.


def several_backward_passes(net: nn.Module, x_seq: Tensor) -> list[Any]:
    outputs, found = net(x_seq), []
    for part in (outputs[-1:], outputs[2:5], outputs[:1], outputs):
        if any(out.requires_grad for out in part):
            weighted(part).backward(retain_graph=True)
            found.append(gradients(net))
    weighted(outputs).backward()
    return [found, gradients(net)]


def partial_gradients(net: nn.Module, x_seq: Tensor) -> list[Any]:
    outputs = [out for out in net(x_seq) if out.requires_grad]
    last = [
        torch.autograd.grad(weighted([out]), net.fc1.weight, retain_graph=True, allow_unused=True)
        for out in reversed(outputs[::3])
    ]
    return [last, torch.autograd.grad(weighted(outputs), [*outputs[:4], net.fc2.weight])]


def a_loss_on_the_stack(net: nn.Module, x_seq: Tensor) -> list[Any]:
    outputs = net(x_seq)
    torch.stack([out for out in outputs if out.requires_grad]).square().mean().backward()
    return gradients(net)


def retained_gradients(net: nn.Module, x_seq: Tensor) -> list[Any]:
    outputs = [out for out in net(x_seq) if out.requires_grad]
    for out in outputs:
        out.retain_grad()
    weighted(outputs).backward()
    return [out.grad for out in outputs]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "script", [several_backward_passes, partial_gradients, a_loss_on_the_stack, retained_gradients]
)
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("kind", ["Leaky", "Synaptic", "ParametricLIFNode"])
def test_backward_passes(script: Script, reset: str, kind: str) -> None:
    v_reset = None if reset == "subtract" else 0.0
    net = {
        "Leaky": lambda: leaky(reset_mechanism=reset, learn_beta=True),
        "Synaptic": lambda: Loop(lambda: make("Synaptic", True, reset_mechanism=reset)),
        "ParametricLIFNode": lambda: Stepped(lambda: neuron.ParametricLIFNode(v_reset=v_reset)),
    }[kind]()
    assert_as_autograd(net, x_of(), script)


class Delays(Loop):
    """Spikes reach the second layer three steps late, and its current feels the first one's membrane."""

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        mem1, mem2, late, seen = self.lif1.reset_mem(), self.lif2.reset_mem(), [], []
        for x in x_seq:
            spk, mem1 = self.lif1(self.fc1(x), mem1)
            late.append((spk, mem1))
            spk, felt = late[max(len(late) - 4, 0)]
            spk2, mem2 = self.lif2(self.fc2(spk * felt) + mem1.tanh(), mem2)
            seen += [spk2, mem2]
        return seen


def test_delays_and_currents_from_membranes() -> None:
    assert_as_autograd(Delays(lambda: snntorch.Leaky(0.9, learn_beta=True)), x_of(20))


class FromItsOwnMembrane(Loop):
    """Both layers get a current from each other's membrane, and from their own."""

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        mem1 = mem2 = torch.zeros(x_seq.shape[1], 4)
        seen = []
        for x in x_seq:
            spk1, mem1 = self.lif1(self.fc1(x) + self.fc2(mem1).sin() + mem2.cos(), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1) + (mem1 * mem2).sin(), mem2)
            seen += [spk1, spk2, mem2]
        return seen


def test_a_current_that_depends_on_the_neurons_own_membrane() -> None:
    assert_as_autograd(FromItsOwnMembrane(lambda: snntorch.Leaky(0.5)), x_of(8))


class Branches(Loop):
    """States used twice, changed between steps, given, and passed to another neuron."""

    def forward(self, x_seq: Tensor) -> list[Tensor]:
        seen = []
        mem1 = (torch.ones(x_seq.shape[1], 4) * 0.123456789).requires_grad_()
        mem2 = torch.zeros(x_seq.shape[1], 4)
        for t, x in enumerate(x_seq):
            current = self.fc1(x)
            _, other = self.lif1(current * 2, mem1)
            spk, mem1 = self.lif1(current, mem1)
            _, third = self.lif1(current - 1, mem1)
            if t % 3 == 1:
                mem1 = mem1 * 0.75 + other
            if t % 4 == 2:
                mem2 += 0.1
                spk *= 0.5
            _, passed = self.lif2(third, mem1)
            spk, mem2 = self.lif2(self.fc2(spk), mem2)
            seen += [spk, mem2, other, passed, mem1]
        return seen


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_states_used_twice_and_changed(reset: str) -> None:
    def script(net: nn.Module, x_seq: Tensor) -> list[Any]:
        outputs = net(x_seq)
        weighted(outputs).backward()
        return [[out.detach() for out in outputs], gradients(net)]

    net = Branches(lambda: snntorch.Leaky(0.8, reset_mechanism=reset, learn_threshold=True))
    assert_as_autograd(net, x_of(), script)


def test_spikes_changed_in_place_after_they_were_used() -> None:
    class Masked(Loop):
        def forward(self, x_seq: Tensor) -> list[Tensor]:
            mem1, mem2, seen = self.lif1.reset_mem(), self.lif2.reset_mem(), []
            for x in x_seq:
                spk, mem1 = self.lif1(self.fc1(x), mem1)
                current = self.fc2(spk * 1)
                spk.mul_(0.5)
                spk2, mem2 = self.lif2(current, mem2)
                seen += [spk2, spk]
            return seen

    assert_as_autograd(Masked(lambda: snntorch.Leaky(0.8, learn_threshold=True)), x_of())


def hidden() -> nn.Module:
    class Hidden(nn.Sequential):
        lif1 = property(lambda self: self[1])
        lif2 = property(lambda self: self[3])

    return Hidden(
        nn.Linear(5, 4), snntorch.Leaky(0.9, init_hidden=True, learn_beta=True),
        nn.Linear(4, 3), snntorch.Leaky(0.7, init_hidden=True, output=True),
    )  # fmt: skip


def call_by_call(net: nn.Module, x_seq: Tensor) -> list[Any]:
    """Hidden states, one call of the network a step, and truncation every three steps."""
    snntorch.SpikingNeuron.instances = [net.lif1, net.lif2]
    utils.reset(net)
    optimizer, losses = torch.optim.SGD(net.parameters(), 0.1), []
    for first in range(0, len(x_seq), 3):
        loss = torch.zeros(())
        for x in x_seq[first : first + 3]:
            spikes, mem = net(x)
            loss = loss + (spikes - 0.3).square().mean() + mem.square().mean()
        loss.backward()
        optimizer.step()
        losses.append([loss.detach(), gradients(net)])
        snntorch.Leaky.detach_hidden()
    return losses


def test_hidden_states_and_truncation() -> None:
    assert_as_autograd(hidden(), x_of(), call_by_call)


@pytest.mark.slow
def test_truncation_frees_what_came_before() -> None:
    net = srp.convert_to_reversible(hidden())
    snntorch.SpikingNeuron.instances = [net.lif1, net.lif2]
    alive, before = [], len(timelines())
    for x in x_of(8):
        spikes, mem = net(x)
        (spikes.sum() + mem.sum()).backward()
        snntorch.Leaky.detach_hidden()
        gc.collect()
        alive.append(len(timelines()) - before)
    assert max(alive) == 0


def timelines() -> list[timeline.Timeline]:
    with warnings.catch_warnings(action="ignore"):  # of modules whose attributes gc looks at
        return [one for one in gc.get_objects() if type(one) is timeline.Timeline]


@pytest.mark.parametrize("make_net", [leaky, lambda: Stepped(neuron.LIFNode)])
def test_nothing_is_left_after_the_backward(make_net: Any) -> None:
    """Also while outputs, states and the loss live on."""
    net, before = srp.convert_to_reversible(make_net()), set(map(id, timelines()))
    outputs = net(x_of())
    loss = weighted(outputs)
    refs = [weakref.ref(one) for one in timelines() if id(one) not in before]
    assert len(refs) == 2
    loss.backward()
    gc.collect()
    assert not any(ref() for ref in refs)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_evaluation_computes_what_training_does() -> None:
    for net in (leaky(), Stepped(neuron.ParametricLIFNode), Loop(lambda: make("RSynaptic"))):
        srp.convert_to_reversible(net)
        x_seq = x_of()
        expected = [out.detach() for out in net(x_seq)]
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert equal(net(x_seq), expected)
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        assert equal(net(x_seq), expected)


def test_outside_a_converted_root_the_step_is_the_same() -> None:
    """The user's loop calls submodules itself: with srp.reversible it is recorded, without it is not."""
    net, x_seq = srp.convert_to_reversible(leaky(learn_beta=True)), x_of()
    expected = train(net, x_seq)
    with srp.reversible(net):
        outputs = Loop.forward(net, x_seq)
    weighted(outputs).backward()
    assert equal(gradients(net), expected[2])
    outputs = Loop.forward(net, x_seq)
    weighted(outputs).backward()
    assert equal([[out.detach() for out in outputs], gradients(net)], [expected[0], expected[2]])


def test_copies_and_files() -> None:
    for net in (leaky(), Stepped(neuron.LIFNode)):
        keys = list(net.state_dict())
        stock_type = type(net.lif1)
        srp.convert_to_reversible(net)
        assert list(net.state_dict()) == keys
        x_seq = x_of()
        twins = [copy.deepcopy(net)]
        if stock_type is neuron.LIFNode:  # snnTorch's surrogates can't be pickled
            twins.append(pickle.loads(pickle.dumps(net)))
        for twin in twins:
            assert type(twin.lif1) is type(net.lif1) and convert.is_on_grid(twin.lif1)
            assert equal(train(twin, x_seq), train(net, x_seq))
        srp.restore(net)
        assert type(net.lif1) is stock_type
        assert NAME.of(net.lif1) is None


# Errors.


def test_leaving_the_range_names_the_neuron_and_the_remedy() -> None:
    for net in (leaky(), Stepped(neuron.IFNode)):
        srp.convert_to_reversible(net, arithmetic="grid")
        with pytest.raises(OverflowError, match=r"lif1 \(\w+\).*reaches .*below 256"):
            net(x_of() * 1e4)
        with pytest.raises(OverflowError, match="holds NaN"):
            net(x_of() * float("nan"))
        net(x_of())


@pytest.mark.parametrize("v_reset", [None, 0.0])
def test_a_charged_membrane_out_of_range_is_seen_though_the_reset_brings_it_back(
    v_reset: float | None,
) -> None:
    net = nn.Sequential(nn.Identity(), neuron.IFNode(10.0, v_reset))
    srp.convert_to_reversible(net, arithmetic="grid")
    with pytest.raises(OverflowError, match=r"1 \(\w*IFNode\).*reaches 2050"):
        net(torch.full((1, 3), 2050.0, requires_grad=True))


@pytest.mark.one_in(13)
@pytest.mark.parametrize("make", [leaky, lambda: Stepped(neuron.IFNode), lambda: Stepped(neuron.LIFNode)])
@pytest.mark.parametrize("gain", [1e4, 1e30, float("nan"), float("inf")])
def test_a_sequence_that_leaves_the_range_goes_on_in_stocks_arithmetic(make: Any, gain: float) -> None:
    """By default; and is on the grid again once its states are fresh."""
    stock, net = make(), make()
    net.load_state_dict(stock.state_dict())
    srp.convert_to_reversible(net)
    x_seq = x_of()
    large = torch.cat((x_seq[:2], x_seq[2:] * gain))
    with pytest.warns(UserWarning, match=r"lif1 \(\w+\): it goes on in stock's arithmetic"):
        outputs = net(large)
    for ours, theirs in zip(outputs, stock(large), strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.allclose(ours, theirs, atol=1e-2, rtol=1e-3, equal_nan=True)
    weighted(outputs).backward()
    assert net.lif1.off_grid_reason
    report = srp.verify(net, large, loss=weighted, repeats=1)
    assert report.ok, report
    assert report.off_grid["lif1"] and report.guarantees["lif1"] == "grid"
    rows = {row.name: row.neuron for row in srp.memory_report(net, large, loss=weighted).modules}
    assert report.off_grid["lif1"] in rows["lif1"]
    for module in net.modules():
        if isinstance(module, neuron.BaseNode):
            module.reset()
    net.zero_grad()
    outputs = net(x_seq)
    assert not net.lif1.off_grid_reason
    weighted(outputs).backward()
    ours = gradients(net)
    again = srp.convert_to_reversible(make())
    again.load_state_dict(net.state_dict())
    weighted(again(x_seq)).backward()
    assert equal(ours, gradients(again))


@pytest.mark.parametrize("alpha", [1.0, 1.7, 4.0])
@pytest.mark.parametrize("name", sj_surrogates._DERIVATIVES)
def test_closed_forms_have_the_bits_of_autograd(name: str, alpha: float) -> None:
    function = getattr(sj_surrogate, name)(alpha=alpha)
    u, grad = torch.randn(2, 5000)
    expected = by_autograd(function)(grad, u)
    with torch.inference_mode():
        known = sj_surrogates.as_autograd(function)
    assert same_bits(known.vjp(grad, u.clone()), expected)
    assert known.name in (f"spikingjelly.{name}", f"spikingjelly.{name}.backward")
    assert known.parameters == (("alpha", alpha),)


def test_fewer_bits_reach_farther() -> None:
    net = leaky(learn_beta=True)
    net.lif1.grid_bits = net.lif2.grid_bits = 10
    assert_as_autograd(net, x_of() * 200)
    net = Stepped(neuron.LIFNode)
    net.lif1.grid_bits = net.lif2.grid_bits = 10
    assert_as_autograd(net, x_of() * 200)
    net.lif1.grid_bits = 24
    with pytest.raises(ValueError, match="bits must be"):
        net(x_of())


@pytest.mark.filterwarnings("ignore:.*goes on in stock's arithmetic")
@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.0}, {"beta": 1e-6}, {"beta": torch.tensor([0.9, 0.0, 0.5, 1e-7])}, {"beta": -0.5},
        {"beta": 0.9, "threshold": float("inf")}, {"beta": 0.9, "threshold": float("nan")},
    ],
)  # fmt: skip
def test_settings_that_the_grid_cannot_take_train_as_stock_does(settings: dict[str, Any]) -> None:
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        net, x_seq = leaky(**settings), x_of()
        if converted:
            srp.convert_to_reversible(net)
        outputs = net(x_seq)
        weighted(outputs).backward()
        found.append([[out.detach() for out in outputs], gradients(net)])
    for stock, ours in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(stock.nan_to_num(7.0), ours.nan_to_num(7.0))
    for stock, ours in zip(found[0][1], found[1][1], strict=True):
        assert (stock is None) == (ours is None)
        assert stock is None or torch.equal(stock.nan_to_num(7.0), ours.nan_to_num(7.0))


def test_a_decay_that_training_moves_to_zero_and_back() -> None:
    net = srp.convert_to_reversible(leaky(learn_beta=True))
    net(x_of())
    assert convert.is_on_grid(net.lif1)
    net.lif1.beta.data.fill_(-0.1)
    with pytest.warns(UserWarning, match=r"lif1.*decay of 0 .*\(0, 1\]"):
        weighted(net(x_of())).backward()
    assert "decay of 0" in net.lif1.off_grid_reason
    net.lif1.beta.data.fill_(0.5)
    net(x_of())
    assert convert.is_on_grid(net.lif1)


@pytest.mark.parametrize("write", ["clamp", "assign", "vector", "numpy"])
def test_writes_that_move_no_version_are_seen(write: str) -> None:
    """Of decays and thresholds: an optimizer that works on ``.data``, a target network."""
    outputs = []
    for made_anew in (False, True):
        torch.manual_seed(0)
        net, x_seq = leaky(learn_beta=True, learn_threshold=True), x_of()
        if not made_anew:
            srp.convert_to_reversible(net)
            net(x_seq)
        if write == "clamp":
            net.lif1.beta.data.clamp_(0.0, 0.25)
        elif write == "assign":
            net.lif1.threshold.data = torch.tensor(0.3)
        elif write == "numpy":
            net.lif1.beta.detach().numpy()[...] = 0.3
        else:
            flat = nn.utils.parameters_to_vector(net.parameters()).detach()
            nn.utils.vector_to_parameters(flat * 0.5, net.parameters())
        if made_anew:
            srp.convert_to_reversible(net)
        outputs.append([out.detach() for out in net(x_seq)])
    assert equal(*outputs)


def test_parameters_changed_before_the_backward() -> None:
    for net in (leaky(learn_beta=True), Stepped(neuron.ParametricLIFNode)):
        srp.convert_to_reversible(net)
        for name in ("fc1.weight", "lif1.beta" if hasattr(net.lif1, "beta") else "lif1.w"):
            loss = weighted(net(x_of()))
            with torch.no_grad():
                net.get_parameter(name).mul_(0.9)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_a_replay_that_differs_is_named() -> None:
    net = srp.convert_to_reversible(leaky())
    for change in (0, 1):
        with srp.reversible(net, check=True):
            loss = weighted(net(x_of()))
        net.fc2.weight.data[0, 0] += change  # behind the version counter's back
        if not change:
            loss.backward()
            continue
        with pytest.raises(RuntimeError, match=r"fc2: .* written to past its version counter"):
            loss.backward()


@pytest.mark.filterwarnings("ignore:.*goes on in stock's arithmetic")
@pytest.mark.parametrize("what", ["input", "state", "network"])
def test_float64_is_stocks(what: str) -> None:
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        lif, x_seq = snntorch.Leaky(0.9), x_of().detach()
        mem = torch.zeros(x_seq.shape[1:])
        if converted:
            srp.convert_to_reversible(lif)
        if what == "network":
            lif.double()
        if what != "state":
            x_seq = x_seq.double()
        if what != "input":
            mem = mem.double()
        x_seq.requires_grad_()
        outputs = []
        for x in x_seq:
            spikes, mem = lif(x, mem)
            outputs += [spikes, mem]
        sum(out.double().square().sum() for out in outputs).backward()
        found.append([*(out.detach() for out in outputs), x_seq.grad])
    for stock, ours in zip(*found, strict=True):
        assert stock.dtype is ours.dtype
        assert torch.equal(stock, ours)


def test_a_float64_neuron_is_off_the_grid_from_the_start() -> None:
    net = leaky()
    net.lif1.double()
    srp.convert_to_reversible(net)
    assert convert.settings_of(net).off_grid == {"lif1": "it is float64"}
    assert convert.is_on_grid(net.lif2)


def test_what_is_not_on_the_grid_says_why() -> None:
    net = nn.Sequential(nn.Linear(5, 4), snntorch.Leaky(0.9, init_hidden=True, spike_grad=torch.sigmoid))
    srp.convert_to_reversible(net)
    assert convert.settings_of(net).off_grid == {"1": "its surrogate is no comparison with the threshold"}
    with pytest.raises(ValueError, match="no comparison with the threshold"):
        srp.convert_to_reversible(net, arithmetic="grid")
    assert type(net[1]) is snntorch.Leaky
    srp.convert_to_reversible(leaky(), arithmetic="stock")


def test_multi_step_neurons_stay_bit_identical_to_stock() -> None:
    net = nn.Sequential(layer.Linear(5, 4), neuron.LIFNode(step_mode="m"))
    report = srp.verify(srp.convert_to_reversible(net), x_of())
    assert report.as_autograd is None and report.ok and report.guarantees == {"1": "stock"}


@pytest.mark.slow
def test_verify_tells_how_far_the_grid_is_from_stock() -> None:
    report = srp.verify(leaky(), x_of(), loss=weighted)
    assert report.ok and report.as_autograd
    assert report.guarantees == {"lif1": "grid", "lif2": "grid"}
    assert 0 < report.output_difference < 1e-2 and not report.outputs_equal
    report.print()
    assert report.to_dict()["as_autograd"] is True
    table = srp.memory_report(srp.convert_to_reversible(leaky()), x_of(), loss=weighted)
    row = next(row for row in table.modules if row.name == "lif1")
    assert row.neuron == "reversed in time, grid arithmetic" and row.treatment["reversed"]


def test_verify_notices_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:

    form = steps_on(torch.device("cpu"))
    right = form.undo
    monkeypatch.setattr(form, "undo", lambda *args: right(*args) + 2.0**-16)
    assert not srp.verify(leaky(), x_of(), loss=weighted).ok


# What it is for.


@pytest.mark.one_in(2)
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_a_thousand_steps_back(beta: float, reset: str) -> None:
    class Recorded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 16), snntorch.Leaky(beta, reset_mechanism=reset)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mem, memories, spikes = self.lif.reset_mem(), [], []
            for _ in range(1000):
                spk, mem = self.lif(self.fc(x), mem)
                memories.append(mem)
                spikes.append(spk)
            return torch.stack(spikes), torch.stack(memories)

    net, before = srp.convert_to_reversible(Recorded()), set(map(id, timelines()))
    spikes, memories = net(torch.randn(2, 5) * (0.5 if beta > 0.9 else 3))
    (line,) = (one for one in timelines() if id(one) not in before)
    assert line.length == 1000
    for t in range(1000, 0, -1):
        assert torch.equal(line.state(t).view(2, 16), memories[t - 1])
    assert spikes.any()


@pytest.mark.parametrize(("beta", "most"), [(0.5, 0.26), (0.9, 0.16)])
def test_bytes_held(beta: float, most: float) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(64, 64), snntorch.Leaky(beta)
            self.fc2, self.lif2 = nn.Linear(64, 64), snntorch.Leaky(beta)

        def forward(self, x_seq: Tensor) -> Tensor:
            mem1, mem2, total = self.lif1.reset_mem(), self.lif2.reset_mem(), 0
            for x in x_seq:
                spk, mem1 = self.lif1(self.fc1(x), mem1)
                spk, mem2 = self.lif2(self.fc2(spk), mem2)
                total = total + spk
            return total

    net, x_seq = srp.convert_to_reversible(Net()), torch.rand(200, 32, 64) * 2
    held, _ = count_step(lambda: net(x_seq).sum())
    ends = 2 * 4 * 3 * 32 * 64  # the newest membrane and two more tensors a layer
    assert (held - ends) / (200 * 2 * 32 * 64) < most


def test_the_spikes_of_the_last_reset_are_kept_as_bits() -> None:
    net = srp.convert_to_reversible(leaky(learn_threshold=False))
    twin, x_seq = copy.deepcopy(net), x_of()
    with convert.differentiated(twin):
        twin(x_seq)
    net(x_seq)
    assert net.lif1.reset.any() and not net.lif1.reset.all()
    assert equal(net.lif1.reset, twin.lif1.reset) and equal(net.lif2.reset, twin.lif2.reset)
    assert not any(value is net.lif1.reset for value in vars(net.lif1).values())
    with torch.no_grad():
        net(x_seq)
    assert equal(copy.deepcopy(net).lif1.reset, twin.lif1.reset)
    with pytest.raises(AttributeError, match="reset"):
        _ = srp.convert_to_reversible(leaky()).lif1.reset


@pytest.mark.parametrize("factory", [surrogate.atan, surrogate.fast_sigmoid])
@pytest.mark.parametrize("parameter", [0.3, 1, 2.0, 25])
@pytest.mark.parametrize("threshold", [0.7, torch.linspace(-1, 2, 5003)])
def test_surrogates_in_one_pass(factory: Any, parameter: float, threshold: Any) -> None:
    pytest.importorskip("numba")
    known = known_surrogate(factory(parameter))
    assert known is not None
    write = in_one_pass(known, torch.device("cpu"))
    assert write is not None
    mem, grad = 3 * torch.randn(5003), torch.randn(5003)
    mem[:5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.7, 1e38])
    out = torch.empty_like(mem)
    write(mem, threshold, grad, out)
    assert equal(out.view(torch.int32), known.vjp(grad, mem - threshold).view(torch.int32))


def test_surrogates_that_nothing_is_compiled_for() -> None:
    for factory in (surrogate.sigmoid, surrogate.straight_through_estimator):
        known = known_surrogate(factory())
        assert known is not None and in_one_pass(known, torch.device("cpu")) is None
