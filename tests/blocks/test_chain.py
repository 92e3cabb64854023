"""Reversible blocks against the same blocks run plainly: every comparison is bit for bit."""

import copy
import itertools

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import snntorch as snntorch_types
from snn_reversible_plugin.blocks import RevSBlock, RevSSequence, chain_function, chain_nodes, second_run
from snn_reversible_plugin.modules.states import reset_states
from snn_reversible_plugin.ops import allocations
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step
from snn_reversible_plugin.tape.sliced import cut, gradients, later
from two_processes import together

NEURONS = {
    "if": lambda: neuron.IFNode(step_mode="m"),
    "lif": lambda: neuron.LIFNode(step_mode="m", detach_reset=True, surrogate_function=surrogate.ATan()),
    "plif": lambda: neuron.ParametricLIFNode(step_mode="m", v_reset=None),
}

SNNTORCH = {
    "Leaky": lambda: snntorch.Leaky(0.8, init_hidden=True, learn_beta=True, learn_threshold=True),
    "Lapicque": lambda: snntorch.Lapicque(0.8, init_hidden=True, reset_mechanism="zero"),
    "Synaptic": lambda: snntorch.Synaptic(0.9, 0.8, init_hidden=True, learn_alpha=True),
    "Alpha": lambda: snntorch.Alpha(0.9, 0.8, init_hidden=True, reset_mechanism="zero"),
    "RLeaky": lambda: snntorch.RLeaky(0.8, linear_features=3, init_hidden=True),
    "RSynaptic": lambda: snntorch.RSynaptic(0.9, 0.8, all_to_all=False, V=0.5, init_hidden=True),
}


def branch(c=2, node="lif", p=0.0):
    layers = [
        NEURONS[node](),
        layer.Conv2d(c, c, 3, padding=1, bias=False, step_mode="m"),
        layer.BatchNorm2d(c, step_mode="m"),
        NEURONS[node](),
        layer.Conv2d(c, c, 3, padding=1, step_mode="m"),
    ]
    return nn.Sequential(*layers, layer.Dropout(p, step_mode="m")) if p else nn.Sequential(*layers)


def chain(depth=3, bits=16, states="carry", check=False, **kwargs):
    blocks = [RevSBlock(branch(**kwargs), branch(**kwargs), bits=bits) for _ in range(depth)]
    return RevSSequence(blocks, states=states, check=check)


class Loop(nn.Module):
    """snnTorch over time steps: a linear layer and a neuron that keeps its own state."""

    def __init__(self, kind="Leaky"):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.lif = SNNTORCH[kind]()

    def forward(self, x):
        return torch.stack([self.fc(self.lif(step)) for step in x])


def states_of(model):
    found = []
    for module in model.modules():
        found += [v for v in getattr(module, "_memories", {}).values() if isinstance(v, torch.Tensor)]
    return found


def step(model, x, calls=1, seed=3):
    """Everything that a training step computes."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    outs = [model(x) for _ in range(calls)]
    weights = torch.linspace(-1, 1, outs[0].numel()).view(outs[0].shape)
    torch.manual_seed(seed + 1)
    sum((out * weights).pow(2).sum() for out in outs).backward()
    found = [*outs, x.grad, *(p.grad for p in model.parameters()), *model.buffers(), *states_of(model)]
    reset_states(model)
    return [t if t is None else t.detach().clone() for t in found]


def assert_same(ours, plain):
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype is b.dtype and torch.equal(a, b))


def against_plain(model, x, calls=1, steps=2):
    plain = copy.deepcopy(model)
    plain.reversible = False
    for _ in range(steps):
        assert_same(step(model, x, calls), step(plain, x, calls))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("states", ["carry", "reset"])
@pytest.mark.parametrize("node", list(NEURONS))
def test_spikingjelly_equals_the_plain_run(node, states, converted):
    model = chain(node=node, states=states, check=True)
    if converted:
        srp.convert_to_reversible(model)
    against_plain(model, torch.randn(3, 2, 4, 5, 3), calls=2 if states == "carry" else 1)
    assert model.last_rebuild.flipped_bits == 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("small", [0, second_run.SMALL])
@pytest.mark.parametrize("states", ["carry", "reset"])
def test_snntorch_equals_the_plain_run(states, small, monkeypatch):
    monkeypatch.setattr(second_run, "SMALL", small)
    model = RevSSequence([RevSBlock(Loop(), Loop()) for _ in range(3)], states=states, check=True)
    against_plain(model, torch.randn(4, 2, 6))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("small", [0, second_run.SMALL])
@pytest.mark.parametrize("states", ["carry", "reset"])
@pytest.mark.parametrize("name", list(SNNTORCH))
def test_stock_snntorch_neurons_run_as_their_reversible_types(name, states, small, monkeypatch):
    monkeypatch.setattr(second_run, "SMALL", small)
    torch.manual_seed(0)
    blocks = [RevSBlock(Loop(name), Loop(name)) for _ in range(2)]
    model, seen = RevSSequence(blocks, states=states, check=True), []
    against_plain(model, torch.randn(4, 2, 6))
    assert model.last_rebuild.flipped_bits == model.last_rebuild.flipped_spikes == 0
    stock = getattr(snntorch, name)
    neurons = [module for module in model.modules() if isinstance(module, stock)]
    for one in neurons:
        one.register_forward_pre_hook(lambda one, _: seen.append(type(one)))
    model(torch.randn(4, 2, 6)).sum().backward()
    assert seen == 2 * len(neurons) * 4 * [getattr(snntorch_types, f"Rev{name}")]
    assert [type(one) for one in neurons] == len(neurons) * [stock]


def one_layer(node="lif"):
    conv = layer.Conv2d(8, 8, 3, padding=1, bias=False, step_mode="m")
    return nn.Sequential(NEURONS[node](), conv, layer.BatchNorm2d(8, step_mode="m"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("small", [0, second_run.SMALL])
@pytest.mark.parametrize("states", ["carry", "reset"])
@pytest.mark.parametrize("node", list(NEURONS))
def test_branches_of_one_layer_equal_the_plain_run(node, states, small, monkeypatch):
    monkeypatch.setattr(second_run, "SMALL", small)
    blocks = [RevSBlock(one_layer(node), one_layer(node)) for _ in range(3)]
    model = RevSSequence(blocks, states=states, check=True)
    against_plain(model, torch.randn(5, 2, 16, 4, 3), calls=2 if states == "carry" else 1)
    assert model.last_rebuild.flipped_bits == model.last_rebuild.flipped_spikes == 0


def test_without_a_tape_one_layer_peaks_no_higher_than_a_stream(monkeypatch):
    def peak(small):
        monkeypatch.setattr(second_run, "SMALL", small)
        model = RevSSequence([RevSBlock(one_layer(), one_layer()) for _ in range(2)], states="reset")
        x = torch.randn(4, 2, 16, 16, 16)
        model(x).sum().backward()
        return count_step(lambda: model(x).sum())[1]

    assert peak(second_run.SMALL) <= peak(0) + 4 * 2 * 8 * 16 * 16 * 4


def test_stock_neurons_are_analytic_while_a_branch_runs_and_stock_again_afterwards():
    seen = []
    nodes = [neuron.LIFNode(step_mode="m"), neuron.QIFNode(step_mode="m"), neuron.IFNode(step_mode="m")]
    for node in nodes:
        node.register_forward_pre_hook(lambda node, _: seen.append(getattr(node, "treatment", None)))
    model = RevSSequence([RevSBlock(nn.Sequential(*nodes), one_layer())], states="reset")
    x = torch.randn(2, 1, 16, 3, 3, requires_grad=True)
    model(x).sum().backward()
    assert seen == 2 * ["analytic", None, "analytic"]
    assert [type(node) for node in nodes] == [neuron.LIFNode, neuron.QIFNode, neuron.IFNode]

    def fail(*_):
        raise ArithmeticError

    nodes[1].register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        model(x)
    assert type(nodes[0]) is neuron.LIFNode


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", list(SNNTORCH))
def test_snntorch_stepped_from_outside_hands_its_states_on(name):
    torch.manual_seed(0)

    class Single(Loop):
        def forward(self, x):
            return self.fc(self.lif(x))

    model = RevSSequence([RevSBlock(Single(name), Single(name), dim=1) for _ in range(3)], check=True)
    against_plain(model, torch.randn(2, 6) * 2, calls=4)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("shape", [(1, 1, 4, 3, 3), (2, 3, 4, 1, 1), (5, 1, 4, 4, 7)])
@pytest.mark.parametrize("bits", [4, 16, None])
def test_shapes_and_grids(shape, bits):
    model = chain(depth=2, bits=bits)
    if bits is not None:
        against_plain(model, torch.randn(shape))
    else:
        assert torch.isfinite(step(model, torch.randn(shape))[0]).all()


def test_dropout_and_norms_in_both_modes():
    model = chain(p=0.4, check=True)
    against_plain(model, torch.randn(3, 2, 4, 5, 5))
    assert all(int(m.num_batches_tracked) == 2 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    against_plain(model.eval(), torch.randn(3, 2, 4, 5, 5))


def test_switching_to_evaluation_before_the_backward_changes_nothing():
    model, x = chain(p=0.4), torch.randn(2, 2, 4, 3, 3)
    plain = copy.deepcopy(model)
    plain.reversible = False
    for m in (model, plain):
        torch.manual_seed(1)
        out = m(x)
        m.eval()
        torch.manual_seed(2)
        out.square().sum().backward()
        reset_states(m)
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert not any(m.training for m in model.modules())


class Scale(nn.Module):
    """Writes into the output of the convolution before it, which a rebuild has at hand."""

    def forward(self, x):
        return x.mul_(2).relu_()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize("states", ["carry", "reset"])
@pytest.mark.parametrize("end", [[], [Scale()], [layer.BatchNorm2d(2, step_mode="m"), Scale()]])
def test_modes_and_what_is_written_in_place_at_the_end_of_a_branch(end, states, mode):
    model = chain(depth=2, states=states)
    for block in model.blocks:
        block.f, block.g = (nn.Sequential(branch, *copy.deepcopy(end)) for branch in (block.f, block.g))
    model.mode = mode
    against_plain(srp.convert_to_reversible(model, mode=mode), torch.randn(3, 2, 4, 5, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = chain(check=True)
    plain = copy.deepcopy(model)
    plain.reversible = False
    x = torch.randn(2, 2, 4, 5, 5)
    results = []
    for m in (model, plain):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            out = m(leaf)
        assert out.dtype is torch.float32
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in m.parameters())])
    assert_same(*results)


def test_states_with_a_gradient_go_through_single_steps():
    def single():
        return nn.Sequential(nn.Linear(3, 3), neuron.LIFNode(), nn.Linear(3, 3))

    model = RevSSequence([RevSBlock(single(), single(), dim=1) for _ in range(3)], check=True)
    against_plain(model, torch.randn(2, 6), calls=4)


def test_a_branch_that_uses_its_input_often_and_a_shared_block():
    class Often(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.node = neuron.LIFNode()

        def forward(self, x):
            return self.node(self.fc(x)) * torch.tanh(x) + torch.sigmoid(x) * x

    against_plain(
        RevSSequence([RevSBlock(Often(), Often(), dim=1) for _ in range(3)]), torch.randn(5, 6), 2
    )
    shared = RevSBlock(Often(), Often(), dim=1)
    against_plain(RevSSequence([shared, shared], check=True), torch.randn(5, 6))


@pytest.mark.parametrize("states", ["carry", "reset"])
def test_a_pair_of_streams(states):
    model = chain(states=states)
    plain = copy.deepcopy(model)
    plain.reversible = False
    x = torch.randn(2, 2, 2, 3, 3), torch.randn(2, 2, 2, 3, 3)
    for used in (0, 1):
        results = []
        for m in (model, plain):
            m.zero_grad()
            leaves = [t.clone().requires_grad_() for t in x]
            out = m(tuple(leaves))
            assert isinstance(out, tuple)
            out[used].square().sum().backward()
            reset_states(m)
            results.append([*out, *(leaf.grad for leaf in leaves), *(p.grad for p in m.parameters())])
        assert_same(*results)


def test_accumulation_frozen_parameters_hooks_and_autograd_grad():
    model = chain()
    plain = copy.deepcopy(model)
    plain.reversible = False
    calls = []
    for m in (model, plain):
        first = next(m.parameters())
        first.requires_grad_(False)
        for p in list(m.parameters())[1:3]:
            p.register_hook(lambda g: calls.append(1) or g * 3)
    x = torch.randn(2, 2, 4, 3, 3)
    for _ in range(2):
        for m in (model, plain):
            m(x).square().sum().backward()
            reset_states(m)
    assert len(calls) == 8
    assert next(model.parameters()).grad is None
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    results = []
    for m in (model, plain):
        wanted = list(m.parameters())[3:5]
        results.append(torch.autograd.grad(m(x).square().sum(), wanted))
        reset_states(m)
    assert_same(*results)
    out = model(x).square().sum()
    first, second = (torch.autograd.grad(out, wanted, retain_graph=True) for wanted in [list(
        model.parameters())[3:5]] * 2)  # fmt: skip
    assert_same(first, second)


def test_gradients_of_a_block_do_not_wait_for_those_of_all():
    def fc():
        return nn.Linear(512, 512, bias=False)

    model = RevSSequence([RevSBlock(fc(), fc(), dim=1) for _ in range(4)])
    srp.step_in_backward(torch.optim.SGD(model.parameters(), lr=1e-3))
    with AllocationCounter() as counter:
        model(torch.randn(1, 1024)).sum().backward()
    weight = next(model.parameters())
    assert isinstance(weight.grad, torch.Tensor)
    assert counter.peak < 3 * weight.nbytes


def test_in_mode_minimal_the_first_run_takes_slices_too():
    def convs():
        return nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1, bias=False) for _ in range(2)))

    peaks, x = {}, torch.randn(16, 128, 16, 16)
    for mode in ("memory", "minimal"):
        model = RevSSequence([RevSBlock(convs(), convs(), dim=1)], mode=mode, states="reset")
        for _ in range(2):  # the first time of a shape as a whole
            with AllocationCounter() as counter:
                model(x)
        peaks[mode] = counter.peak
    assert peaks["minimal"] < peaks["memory"] - x.nbytes / 4


class Scaled(torch.autograd.Function):
    """A view of a weight with a backward of its own."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class Conv(nn.Module):
    """A convolution, its weight used in one way or another."""

    def __init__(self, how, c=192):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(c, c, 3, 3) / 40), how

    def forward(self, x):
        weight = Scaled.apply(self.weight) if self.how == "scaled" else self.weight
        y = nn.functional.conv2d(x.flatten(0, 1), weight, padding=1).unflatten(0, x.shape[:2])
        return y + self.weight.mean() if self.how == "twice" else y


class Fork(nn.Module):
    """What a neuron and a convolution both get: the neuron writes its gradient over what is rebuilt."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = Conv("once"), layer.BatchNorm2d(192, step_mode="m"), Conv("once")
        self.before, self.neuron = NEURONS["lif"](), NEURONS["lif"]()

    def forward(self, x):
        current = self.norm(self.conv(self.before(x)))
        spikes = self.neuron(current)
        return self.last(current) + spikes


def large_weights(how="once", mode="minimal", first=False):
    """Weights of 1.3 MB, and streams of 74 kB."""
    torch.manual_seed(0)

    of_all = Conv("once")

    def of():
        if how == "fork":
            return Fork()
        neurons = [NEURONS["lif"](), NEURONS["lif"]()]
        convs = [of_all, Conv("once")] if how == "shared" else [Conv(how), Conv(how)]
        if how == "repeated":
            convs[1] = convs[0]
        layers = [convs[0], neurons[0], convs[1]] if first else [neurons[0], convs[0], neurons[1], convs[1]]
        return nn.Sequential(*layers)

    def small():
        return nn.Sequential(NEURONS["lif"](), layer.BatchNorm2d(192, step_mode="m"))

    # The first large weight shares its segment with small ones of branches that are undone before it ends.
    blocks = [RevSBlock(small(), small()), RevSBlock(of(), of()), RevSBlock(of(), of())]
    return RevSSequence(blocks, states="reset", mode=mode)


def stepped_peak(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    arrangement = srp.step_in_backward(optimizer)
    for _ in range(2):
        loss = model(x).square().mean()
        recorded = allocations.start()
        loss.backward()
        peak = max(itertools.accumulate(event.size for event in allocations.stop(recorded)))
        optimizer.step()
    arrangement.remove()
    return peak


def test_in_mode_minimal_one_weights_gradient_stands_at_a_time(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 12)
    x = torch.randn(2, 4, 384, 4, 4)
    model = large_weights()
    weight = next(p for p in model.parameters() if p.dim() == 4)
    assert stepped_peak(model, x) < 2 * weight.nbytes < stepped_peak(large_weights(mode="memory"), x)


@pytest.mark.parametrize("first", [False, True])  # a convolution of the stream itself
@pytest.mark.parametrize("how", ["once", "twice", "scaled", "repeated", "shared", "fork"])
def test_weights_gradients_that_are_computed_later(how, first, monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 12)
    waited = []
    x = torch.randn(2, 4, 384, 4, 4)

    def asked(weight):
        found = later.waits_for(weight)
        waited.append(found is not None)
        return found

    monkeypatch.setattr(gradients, "waits_for", asked)
    found = {}
    for mode in ("memory", "minimal"):
        model = large_weights(how, mode, first=first)
        seen = []
        weight = next(p for p in model.parameters() if p.dim() == 4)
        weight.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        leaf = x.clone().requires_grad_()
        loss = model(leaf).square().mean()
        for again in (True, False):
            loss.backward(retain_graph=again)
        assert len(seen) == 2
        torch.testing.assert_close(weight.grad, seen[0] + seen[1])
        found[mode] = [leaf.grad, *(p.grad for p in model.parameters())]
        loss = model(leaf).square().mean()
        found[mode] += torch.autograd.grad(loss, [weight, leaf])
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
    assert any(waited) == (how in ("once", "shared", "fork"))


def test_a_chain_whose_weights_wait_is_compared_once(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 12)
    compared, difference = [], chain_function.difference

    def noting(*how):
        compared.append(how)
        return difference(*how)

    monkeypatch.setattr(chain_function, "difference", noting)
    model = RevSSequence(large_weights().blocks[1:], states="reset", mode="minimal", check=True)
    model(torch.randn(2, 4, 384, 4, 4, requires_grad=True)).sum().backward()
    assert len(compared) == 1 and model.last_rebuild.flipped_bits == 0


def test_a_chain_in_segments_equals_the_plain_run(monkeypatch):
    monkeypatch.setattr(chain_nodes, "WAITING", 1)
    x = torch.randn(2, 2, 4, 3, 3)
    against_plain(chain(node="plif"), x, 2)
    shared = RevSBlock(branch(), branch())
    against_plain(RevSSequence([shared, RevSBlock(branch(), branch()), shared], check=True), x)
    for frozen in (0, 1, 2):
        model = chain(states="reset")
        model.blocks[frozen].requires_grad_(False)
        plain = copy.deepcopy(model)
        plain.reversible = False
        found = []
        for m in (model, plain):
            leaf, out = x.clone().requires_grad_(), None
            last, first = list(m.blocks[-(frozen == 0)].parameters())[:2], list(m.parameters())
            out = m(leaf)
            some = (
                torch.autograd.grad(out.sum(), last, retain_graph=True, allow_unused=True) if frozen else ()
            )
            both = torch.stack([torch.ones_like(out), out.detach()])
            wanted = [leaf, *(p for p in first if p.requires_grad)]
            batch = torch.autograd.grad(out, wanted, both, is_grads_batched=True, retain_graph=True)
            out.square().sum().backward()
            found.append([*some, *batch, leaf.grad, *(p.grad for p in m.parameters())])
            m(x).sum().backward()
            found[-1] += [p.grad for p in m.parameters()]
        assert_same(*found)


def test_two_hundred_blocks_are_rebuilt_exactly_and_floats_are_not():
    def wide():
        fc = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            fc.weight.mul_(3)
        return nn.Sequential(neuron.IFNode(step_mode="m"), fc)

    found = {}
    for bits in (16, None):
        torch.manual_seed(0)
        blocks = [RevSBlock(wide(), wide(), bits=bits) for _ in range(200)]
        model = RevSSequence(blocks, states="reset", check=True)
        model(torch.randn(4, 256, 64)).sum().backward()
        found[bits] = model.last_rebuild
    assert found[16].flipped_bits == 0 and found[16].max_error == 0
    assert found[None].flipped_bits > 0 and found[None].max_error > 0.1  # a spike flipped, then more


@pytest.mark.slow
def test_held_memory_of_snntorch_neurons_is_flat_in_depth():
    held = {}
    for depth in (8, 32):
        torch.manual_seed(0)
        chain = srp.RevSSequence([srp.RevSBlock(Loop(), Loop()) for _ in range(depth)], states="reset")
        x = torch.randn(4, 4096, 6, requires_grad=True)
        chain(x).sum().backward()  # what a first call leaves, a second one may keep
        held[depth] = count_step(lambda chain=chain, x=x: chain(x).sum())[0]
    assert held[32] <= 1.02 * held[8]


def test_held_memory_is_flat_in_depth():
    held = {}
    for depth in (8, 32):
        model, x = chain(depth, states="reset"), torch.randn(2, 1, 4, 8, 8)
        held[depth] = count_step(lambda model=model, x=x: model(x).sum())[0]
    assert held[32] <= 1.02 * held[8]
    assert held[8] < 2 * 2 * 4 * 8 * 8 * 4


@pytest.mark.parametrize("bits", [16, None])
def test_the_peak_of_a_forward_that_resets_is_flat_in_depth(bits):
    peaks, x = {}, torch.randn(2, 4, 4, 16, 16)
    for depth in (2, 16):
        blocks = [RevSBlock(branch(), branch(), bits=bits) for _ in range(depth)]
        model = RevSSequence(blocks, states="reset")
        model(x)
        with AllocationCounter() as counter:
            model(x)
        peaks[depth] = counter.peak
    assert peaks[16] < peaks[2] + x.nbytes / 8  # a membrane is an eighth of it


def test_a_block_that_comes_again_finds_the_states_that_it_left():
    shared = RevSBlock(branch(), branch())
    model = RevSSequence([shared, RevSBlock(branch(), branch()), shared], states="reset", check=True)
    against_plain(model, torch.randn(2, 2, 4, 3, 3))


def test_each_branch_runs_twice_a_step():
    runs = []
    model = chain(states="reset")
    for block in model.blocks:
        for branch in (block.f, block.g):
            branch.register_forward_hook(lambda *_: runs.append(1))
    model(torch.randn(2, 1, 4, 3, 3)).sum().backward()
    assert len(runs) == 2 * 2 * 3


def test_without_grad_mode_it_is_the_plain_run():
    model, x = chain(states="reset").eval(), torch.randn(2, 1, 4, 3, 3)
    with torch.no_grad():
        out = model(x)
    assert torch.equal(out, model(x)) and not out.requires_grad


def test_neurons_are_left_alone_by_the_backward():
    model, x = chain(), torch.randn(2, 1, 4, 3, 3)
    out = model(x)
    functional.reset_net(model)
    out.sum().backward()
    assert not states_of(model)


def test_inside_a_converted_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, step_mode="m"),
        chain(states="reset"),
        neuron.LIFNode(step_mode="m"),
        layer.Conv2d(4, 1, 3, step_mode="m"),
    )
    plain = copy.deepcopy(net)
    plain[1].reversible = False
    x = torch.randn(3, 2, 1, 5, 5)
    assert_same(step(srp.convert_to_reversible(net), x), step(plain, x))


def test_copies_and_state_dict():
    model = chain()
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 4, 3, 3)
    assert_same(step(model, x), step(other, x))


# Errors.


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"5 channels .* don't split"):
        chain()(torch.randn(2, 1, 5, 3, 3))
    with pytest.raises(ValueError, match=r"block 0: g \(Linear\) returned .*\(2, 4\).*\(2, 3\)"):
        RevSSequence([RevSBlock(nn.Linear(3, 3), nn.Linear(3, 4), dim=1)])(torch.randn(2, 6))
    with pytest.raises(ValueError, match="one shape"):
        chain()((torch.randn(2, 1, 2, 3, 3), torch.randn(2, 1, 4, 3, 3)))
    with pytest.raises(ValueError, match="dim=7"):
        RevSBlock(nn.Identity(), nn.Identity(), dim=7)(torch.randn(2, 6))


def test_blocks_that_do_not_go_together_are_refused():
    f = nn.Identity()
    with pytest.raises(ValueError, match="share dim and bits"):
        RevSSequence([RevSBlock(f, f), RevSBlock(f, f, bits=8)])
    with pytest.raises(ValueError, match="at least one"):
        RevSSequence([])
    with pytest.raises(TypeError, match="not a RevSBlock"):
        RevSSequence([f])
    with pytest.raises(ValueError, match="mode must be"):
        RevSSequence([RevSBlock(f, f)], mode="fast")
    with pytest.raises(ValueError, match="states must be"):
        RevSSequence([RevSBlock(f, f)], states="keep")
    with pytest.raises(TypeError, match="must be an"):
        RevSBlock(lambda x: x, f)
    with pytest.raises(ValueError, match="bits must be"):
        RevSBlock(f, f, bits=30)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (200.0, r"reaches .*bits=16.*256.*fewer bits"),
        (float("inf"), "is infinite|holds NaN"),
        (float("nan"), "holds NaN"),
    ],
)
def test_leaving_the_range_is_refused_in_the_backward(value, said):
    model = RevSSequence([RevSBlock(Times(1), Times(-1), dim=1) for _ in range(6)])
    out = model(torch.full((1, 2), value))
    with pytest.raises(OverflowError, match=said):
        out.sum().backward()


def test_in_place_changes_are_refused():
    model, x = chain(), torch.randn(2, 1, 4, 3, 3)
    out = model(x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    reset_states(model)
    out = model(x)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.f\.1\.weight was modified"):
        out.sum().backward()
    inplace = RevSSequence([RevSBlock(nn.ReLU(inplace=True), Times(1), dim=1)])
    with pytest.raises(RuntimeError, match=r"block 0: f \(ReLU\) changed its input in place"):
        inplace(torch.randn(2, 6))


def test_a_branch_that_is_not_deterministic_is_named_in_check_mode():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = [0]
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            self.calls[0] += 1
            return self.fc(x) * self.calls[0]

    model = RevSSequence([RevSBlock(nn.Linear(3, 3), Counting(), dim=1)], check=True)
    with pytest.raises(RuntimeError, match=r"block 0: g \(Counting\).*deterministic"):
        model(torch.randn(2, 6)).sum().backward()


def test_a_gradient_that_would_be_lost_is_refused():
    outside = torch.ones(3, requires_grad=True)

    class Closure(nn.Module):
        def forward(self, x):
            return x * outside

    model = RevSSequence([RevSBlock(Closure(), nn.Linear(3, 3), dim=1)])
    with pytest.raises(RuntimeError, match=r"block 0: f \(Closure\) uses a tensor of shape \(3,\)"):
        model(torch.randn(2, 6)).sum().backward()


def test_double_backward_is_refused():
    x = torch.randn(2, 6, requires_grad=True)
    model = RevSSequence([RevSBlock(nn.Linear(3, 3), nn.Linear(3, 3), dim=1)])
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def _worker(rank):
    found = []
    for reversible in (True, False):
        torch.manual_seed(0)
        model = chain(states="reset")
        model.reversible = reversible
        parallel = nn.parallel.DistributedDataParallel(model)
        for seed in range(2):
            torch.manual_seed(10 * seed + rank)
            parallel(torch.randn(2, 2, 4, 3, 3)).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    return found


def test_two_processes(tmp_path):
    first, *others = itertools.chain(*together(tmp_path, _worker))
    for other in others:
        assert_same(first, other)
