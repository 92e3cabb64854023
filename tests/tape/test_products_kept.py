"""Mode "auto": products are kept where the peak of "memory" leaves room, and nowhere else."""

import copy
import gc
import pickle
from functools import partial
from itertools import pairwise

import pytest
import snntorch
import torch
import torch.distributed as dist
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import nn
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

import snn_reversible_plugin as srp
from snn_reversible_plugin.convert import settings_of
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step
from snn_reversible_plugin.tape.choice import choose
from snn_reversible_plugin.tape.plans import Following
from snn_reversible_plugin.tape.sizes import Layer
from two_processes import together

LIF = {"surrogate_function": surrogate.ATan(), "detach_reset": True}


def block(inputs, outputs, norm=True):
    parts = [layer.Conv2d(inputs, outputs, 3, padding=1, bias=False)]
    parts += [layer.BatchNorm2d(outputs)] if norm else []
    return nn.Sequential(*parts, neuron.LIFNode(**LIF))


def multi_step(model):
    functional.set_step_mode(model, "m")
    return model


def vgg(norm=True):
    layers = [block(2, 16, norm), block(16, 16, norm), layer.AvgPool2d(2)]
    layers += [block(16, 16, norm), block(16, 16, norm), layer.AvgPool2d(2), block(16, 16, norm)]
    return multi_step(nn.Sequential(*layers, layer.Flatten(), layer.Linear(16 * 16, 10)))


def resnet(build):
    return multi_step(build(spiking_neuron=neuron.LIFNode, **LIF))


class Loop(nn.Module):
    """Convolutions stepped by a loop of the network's own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.lif1 = nn.Conv2d(2, 16, 3, padding=1), snntorch.Leaky(beta=0.9)
        self.conv2, self.lif2 = nn.Conv2d(16, 16, 3, padding=1), snntorch.Leaky(beta=0.9)
        self.fc = nn.Linear(16 * 64, 10)

    def forward(self, x_seq):
        mem1, mem2, total = self.lif1.init_leaky(), self.lif2.init_leaky(), 0
        for x in x_seq:
            spk1, mem1 = self.lif1(self.conv1(x), mem1)
            spk2, mem2 = self.lif2(self.conv2(nn.functional.avg_pool2d(spk1, 2)), mem2)
            total = total + self.fc(spk2.flatten(1))
        return total


NETWORKS = {
    "vgg": (vgg, (4, 4, 2, 16, 16), True),
    "vgg without norms": (lambda: vgg(norm=False), (4, 4, 2, 16, 16), True),
    "sew": (lambda: resnet(partial(sew_resnet.sew_resnet18, cnf="ADD")), (2, 2, 3, 32, 32), True),
    "spiking resnet": (lambda: resnet(spiking_resnet.spiking_resnet18), (2, 2, 3, 32, 32), True),
    "loop": (Loop, (6, 4, 2, 16, 16), None),
}  # fmt: skip


def step(model, x):
    functional.reset_net(model)
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()


def gradients(model, x):
    step(model, x)
    return [parameter.grad for parameter in model.parameters()]


def peak_and_products(run):
    """Bytes at the peak of a step, and how many convolutions ran in it."""
    gc.collect()
    with AllocationCounter() as counter:
        run()
        peak = counter.peak
    with profile() as counted:
        run()
    return peak, sum(event.name == "aten::convolution" for event in counted.events())


def kept(model):
    return [list(plan.kept) for plan in settings_of(model).plans.by_first.values() if plan is not None]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_peak_is_memory_s_and_products_run_once_where_it_leaves_room(network):
    build, shape, runs_less = NETWORKS[network]
    stock, x, found, bits = build(), torch.rand(shape), {}, {}
    bits["stock"] = gradients(srp.convert_to_reversible(copy.deepcopy(stock)), x)
    for mode in ("memory", "auto", "speed"):
        model = srp.convert_to_reversible(copy.deepcopy(stock), mode=mode)
        functional.reset_net(model)
        step(model, x)
        bits[mode] = gradients(model, x)
        model.zero_grad()
        found[mode] = peak_and_products(lambda model=model: step(model, x))
    assert all(torch.equal(a, b) for a, b in zip(bits["stock"], bits["auto"], strict=True))
    assert found["auto"][0] <= found["memory"][0]
    if runs_less:
        assert found["speed"][1] < found["auto"][1] < found["memory"][1] or (
            found["speed"][1] == found["auto"][1] < found["memory"][1]
        )


def test_gradients_are_stock_s():
    stock, x = vgg(), torch.rand(4, 4, 2, 16, 16)
    model = srp.convert_to_reversible(copy.deepcopy(stock), mode="auto")
    for _ in range(3):
        stock.load_state_dict(model.state_dict())
        for mine, theirs in zip(gradients(model, x), gradients(stock, x), strict=True):
            assert torch.equal(mine, theirs)
    assert any(kept(model)[0])


def test_equal_shapes_give_equal_plans_and_a_new_shape_a_new_one():
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = srp.convert_to_reversible(vgg(), mode="auto")
        for batch in (4, 3, 4):
            step(model, torch.rand(4, batch, 2, 16, 16))
        plans.append(kept(model))
    assert len(plans[0]) == 2
    assert plans[0] == plans[1]


def plans_of_a_process(rank):
    """The plans of one of two processes, and what collectives it called."""
    torch.manual_seed(rank)  # other weights and other data
    model = srp.convert_to_reversible(vgg(), mode="auto")
    collectives = []
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"):
        setattr(dist, name, lambda *_, **__: collectives.append(1))
    with profile() as counted:
        for batch in (4, 3, 4) if rank else (4,):
            step(model, torch.rand(4, batch, 2, 16, 16))
    ran = [event.name for event in counted.events() if "gloo" in event.name or "c10d" in event.name]
    return kept(model), len(collectives), ran


def test_processes_make_equal_plans_and_say_nothing_to_each_other(tmp_path):
    """One has more steps than the other: a collective would wait for ever."""
    first, second = together(tmp_path, plans_of_a_process)
    assert first[0] == second[0][:1]
    assert any(first[0][0])
    assert len(second[0]) == 2
    assert first[1:] == second[1:] == (0, [])


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.way, self.other = block(2, 16), block(16, 16), block(16, 16)
        self.pool, self.last = layer.AvgPool2d(2), block(16, 8)
        self.goes_on = True
        multi_step(self)

    def forward(self, x):
        x = self.other(self.way(self.first(x))) if self.goes_on else self.first(x)
        return self.last(self.pool(x))


@pytest.mark.parametrize("longer_first", [True, False])
def test_a_forward_that_goes_another_way_runs_as_memory_from_then_on(longer_first):
    stock = TwoWays()
    x = torch.rand(4, 4, 2, 16, 16)
    model = srp.convert_to_reversible(copy.deepcopy(stock), mode="auto")
    model.goes_on = longer_first
    for _ in range(2):
        step(model, x)
    assert len(kept(model)) == 1
    model.goes_on = stock.goes_on = not longer_first
    stock.load_state_dict(model.state_dict())
    assert all(
        a is b is None or torch.equal(a, b)
        for a, b in zip(gradients(model, x), gradients(stock, x), strict=True)
    )
    assert kept(model) == []
    step(model, x)
    assert kept(model) == []


def test_a_model_called_several_times_before_a_backward_keeps_no_products():
    x, found = torch.rand(4, 4, 2, 16, 16), {}

    def two_calls(model):
        functional.reset_net(model)
        first = model(x)
        functional.reset_net(model)
        (first + model(x)).square().sum().backward()

    stock = vgg()
    for mode in ("memory", "auto"):
        model = srp.convert_to_reversible(copy.deepcopy(stock), mode=mode)
        for _ in range(2):
            two_calls(model)
        found[mode], _ = peak_and_products(lambda model=model: two_calls(model))
    assert settings_of(model).plans.overlapping
    assert found["auto"] <= found["memory"]


def test_a_forward_without_a_backward_ends_nothing():
    model, x = srp.convert_to_reversible(vgg(), mode="auto"), torch.rand(4, 4, 2, 16, 16)
    outputs = []
    for _ in range(4):
        model(x)
        functional.reset_net(model)
        outputs.append(model(x).sum())  # as a script does that adds up its losses
        outputs[-1].backward()
        functional.reset_net(model)
    assert not settings_of(model).plans.overlapping
    assert any(kept(model)[0])


def test_an_output_may_be_written_to():
    class Current(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.conv = vgg()[:3], multi_step(layer.Conv2d(16, 16, 3))

        def forward(self, x):
            self.current = self.conv(self.net(x))
            return (self.current * self.current).sum()

    stock, x = Current(), torch.rand(4, 4, 2, 16, 16)
    model = srp.convert_to_reversible(copy.deepcopy(stock), mode="auto")
    for _ in range(3):
        model.zero_grad()
        functional.reset_net(model)
        loss = model(x)
        model.current.detach().numpy()[:] = 7
        loss.backward()
    stock(x).backward()
    for mine, theirs in zip(model.conv.parameters(), stock.conv.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_graph_may_be_walked_twice():
    stock, x = vgg(), torch.rand(4, 4, 2, 16, 16)
    model = srp.convert_to_reversible(copy.deepcopy(stock), mode="auto")
    step(model, x)
    functional.reset_net(model)
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss.backward()
    for first, second in zip(once, model.parameters(), strict=True):
        assert torch.equal(first, second.grad)


class WithCheckpoint(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        widths = (8, 32, 32, 8)
        convolutions = [nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths)]
        self.inner = nn.Sequential(*(part for one in convolutions for part in (one, nn.ReLU())))
        self.first, self.last = block(2, 8), nn.Sequential(block(8, 8), block(8, 8))
        self.pool, self.reentrant = layer.AvgPool2d(2), reentrant
        multi_step(self)

    def forward(self, x):
        x = self.pool(self.first(x))
        inner = checkpoint(self.inner, x.flatten(0, 1), use_reentrant=self.reentrant)
        return self.last(self.pool(inner.unflatten(0, x.shape[:2])))


@pytest.mark.parametrize("reentrant", [True, False])
def test_nothing_is_kept_before_what_is_checkpointed(reentrant):
    model = srp.convert_to_reversible(WithCheckpoint(reentrant), mode="auto")
    x = torch.rand(4, 4, 2, 16, 16)
    for _ in range(2):
        step(model, x)
    (plan,) = kept(model)
    assert not plan[0]
    assert any(plan[4:])


def test_nothing_is_kept_before_a_chain_of_reversible_blocks():
    def branch():
        return multi_step(nn.Sequential(neuron.IFNode(**LIF), layer.Conv2d(8, 8, 3, padding=1)))

    chain = srp.RevSSequence([srp.RevSBlock(branch(), branch()) for _ in range(2)], states="reset")
    pool = multi_step(layer.AvgPool2d(2))
    model = nn.Sequential(multi_step(block(2, 16)), pool, chain, pool, multi_step(block(16, 8)))
    srp.convert_to_reversible(model, mode="auto")
    for _ in range(2):
        step(model, torch.rand(4, 4, 2, 16, 16))
    (plan,) = kept(model)
    assert plan == [False, True]


def test_copies_and_pickles_start_without_plans():
    model = srp.convert_to_reversible(vgg(), mode="auto")
    x = torch.rand(4, 4, 2, 16, 16)
    step(model, x)
    functional.reset_net(model)
    assert kept(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert settings_of(twin).mode == "auto"
        assert kept(twin) == []
        step(twin, x)
        assert kept(twin) == kept(model)


def test_the_tape_alone_keeps_its_plans_from_one_use_to_the_next():
    model, x = vgg(), torch.rand(4, 4, 2, 16, 16)
    products = []
    for _ in range(2):
        functional.reset_net(model)
        with profile() as counted:
            with srp.reversible(model, mode="auto"):
                loss = model(x).square().sum()
            loss.backward()
        products.append(sum(event.name == "aten::convolution" for event in counted.events()))
    assert products[1] < products[0]


@pytest.mark.slow
def test_reports_show_what_is_kept():
    x = torch.rand(4, 4, 2, 16, 16)
    found = {
        mode: srp.memory_report(srp.convert_to_reversible(vgg(), mode=mode), x)
        for mode in ("memory", "auto")
    }
    held = {mode: sum(module.bytes for module in report.modules) for mode, report in found.items()}
    assert held["memory"] < held["auto"]
    verification = srp.verify(srp.convert_to_reversible(vgg(), mode="auto"), x)
    assert verification.gradients_equal
    assert verification.replay_error is None


def test_the_example_of_the_choice():
    layers = [
        Layer(result, 9 * result, 3 * result, 5 * result, needed=True, shared=True)
        for result in (4, 4, 2, 1)
    ]
    assert choose(layers) == [False, False, True, True]
    assert choose(layers, 20) == [False, True, True, True]
    assert choose(layers, 1000) == [True] * 4
    layers[2].unknown = True
    assert choose(layers) == [False, False, False, True]


def test_a_forward_that_keeps_nothing_is_not_followed(monkeypatch):
    followed = []
    computed = Following.computed
    monkeypatch.setattr(Following, "computed", lambda *a: followed.append(1) or computed(*a))
    cell = nn.Linear(8, 8, bias=False)  # used in every step, so that its products are not kept
    net = srp.convert_to_reversible(Loop(cell), mode="auto")
    counts = []
    for _ in range(3):
        followed.clear()
        net(torch.rand(6, 4, 8)).sum().backward()
        counts.append(len(followed))
    assert counts[0] > 6 and counts[1] == counts[2] == 1, counts  # up to the first product


class Loop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.fire = cell, neuron.LIFNode()

    def forward(self, x_seq):
        self.fire.reset()
        return torch.stack([self.fire(self.cell(x)) for x in x_seq])


def test_two_graphs_that_are_alive_at_once_are_why_it_is_not_the_default():
    """What the first keeps below its own peak stands on top of the second's."""
    x, found = torch.rand(4, 8, 2, 16, 16), {}
    for mode in ("memory", "auto"):
        torch.manual_seed(0)
        pooled = [block(2, 16), layer.AvgPool2d(2), *(block(16, 16) for _ in range(4))]
        behind = [block(16, 16), layer.AvgPool2d(2), *(block(16, 16) for _ in range(4))]
        first, second = (
            srp.convert_to_reversible(multi_step(nn.Sequential(*parts)), mode=mode)
            for parts in (pooled, behind)
        )

        def loss_of(models):
            out = x
            for at, model in enumerate(models):
                functional.reset_net(model)
                model.zero_grad()
                out = model(out.repeat_interleave(2, -1).repeat_interleave(2, -2) if at else out)
            return out.square().mean()

        for models in ((first,), (first, second)):
            for _ in range(2):
                loss_of(models).backward()
            for model in models:
                model.zero_grad()
            found[mode, len(models)] = count_step(lambda models=models: loss_of(models))[1]
            for model in models:
                model.zero_grad()
    assert found["auto", 1] <= found["memory", 1]
    assert found["auto", 2] > 1.1 * found["memory", 2]
