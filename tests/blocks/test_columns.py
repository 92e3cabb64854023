"""Temporal columns against the same sub-networks run plainly: every comparison is bit for bit."""

import copy
import itertools

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.grid.products import Room
from snn_reversible_plugin.ops import devices
from snn_reversible_plugin.reports.measure import count_step
from tests.blocks.test_chain import assert_same
from two_processes import together

ALPHAS = {
    "a half": [0.5],
    "learned apart": [0.7, -0.6, 1.2, 0.5],
    "next to nothing": [0.3, 1e-3, 0.0, -1e-7],
    "negative": [-0.5],
}


class Level(nn.Module):
    """Of two inputs: a spike function, a convolution, a norm; bounded, so that long sequences are."""

    def __init__(self, below, width, above, fire="atan", p=0.0):
        super().__init__()
        self.down = nn.Conv2d(below, width, 3, padding=1)
        self.up = nn.Conv2d(above, width, 1) if above else None
        self.fire = neuron.LIFNode() if fire == "lif" else surrogate.ATan()
        self.block = nn.Sequential(nn.BatchNorm2d(width), nn.Dropout(p), nn.Conv2d(width, width, 1))

    def forward(self, below, above=None):
        x = self.down(below)
        if above is not None:
            x = x + self.up(above) * 2
        return (x + self.block(self.fire(x - 0.3)) * x.sigmoid()).tanh()


def make(steps=4, widths=(4, 6, 3), alphas="a half", shared=False, seed=0, **kwargs):
    torch.manual_seed(seed)
    settings = {key: kwargs.pop(key) for key in ("fire", "p") if key in kwargs}
    below, above = (2, *widths[:-1]), (*widths[1:], 0)
    levels = [Level(*sizes, **settings) for sizes in zip(below, widths, above, strict=True)]
    subnets = [levels if shared else copy.deepcopy(levels) for _ in range(steps)]
    for level in () if shared else subnets[0]:
        level.up = None  # the first time step has nothing above
    for net in subnets:
        for p in nn.ModuleList(net).parameters():
            nn.init.normal_(p, std=0.2)
    factors = ALPHAS[alphas]
    learned = [
        [
            nn.Parameter(
                torch.tensor([factors[(i + k) % len(factors)] for i in range(width)]).view(-1, 1, 1)
            )
            for k, width in enumerate(widths)
        ]
        for _ in range(steps)
    ]
    return srp.RevSColumns(subnets, learned, **kwargs)


def step(model, xs, seed=1, used=None):
    model.zero_grad()
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in xs]
    torch.manual_seed(seed)
    states, tops = model(leaves[0] if len(leaves) == 1 else leaves)
    outs = [*states, *tops]
    torch.manual_seed(seed + 1)
    chosen = outs if used is None else [outs[index] for index in used]
    sum((out * torch.randn(out.shape)).square().sum() for out in chosen).backward()
    return [*outs, *(x.grad for x in leaves), *(p.grad for p in model.parameters()), *model.buffers()]


def against_plain(model, xs, **kwargs):
    plain = copy.deepcopy(model)
    plain.reversible = False
    for _ in range(2):
        assert_same(step(model, xs, **kwargs), step(plain, xs, **kwargs))


def frames(count=1, shape=(3, 2, 5, 4)):
    torch.manual_seed(7)
    return [torch.randn(shape) for _ in range(count)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("alphas", list(ALPHAS))
@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_columns_equal_the_plain_run(alphas, mode):
    model = make(alphas=alphas, mode=mode, check=True, tops_at=(1, 3))
    against_plain(model, frames())
    assert model.last_rebuild.flipped_bits == model.last_rebuild.flipped_spikes == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("widths", [(3,), (4, 2), (2, 3, 4, 5, 2)])
def test_any_number_of_levels_and_steps(steps, widths):
    model = make(steps, widths, alphas="learned apart", tops_at=range(steps), check=True)
    against_plain(model, frames(steps))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("fire", ["atan", "lif"])
@pytest.mark.parametrize("shared", [False, True])
def test_random_numbers_neurons_and_shared_sub_networks(fire, shared):
    model = make(fire=fire, p=0.4, check=True, steps=3 if shared else 4)
    against_plain(model, frames())
    if shared:
        # A level's terms may be summed in another order; with one term a step there is one order.
        model = make(fire=fire, p=0.4, check=True, steps=2, shared=True)
        against_plain(model, frames())


@pytest.mark.parametrize("used", [[0], [2], [3], [4, 1]])
def test_gradients_of_some_outputs_alone(used):
    against_plain(make(tops_at=(0, 2)), frames(), used=used)


def test_layouts_empty_batches_and_inputs_without_a_gradient():
    (x,) = frames(shape=(2, 2, 6, 5))
    against_plain(make(), [x.to(memory_format=torch.channels_last)])
    against_plain(make(widths=(3, 2)).eval(), frames(shape=(0, 2, 5, 4)))

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, below, above=None):
            return self.fc(below.float()) if above is None else self.fc(below.float()) + above

    torch.manual_seed(0)
    model = srp.RevSColumns([[Counts(), Counts()] for _ in range(3)], [[0.5, 1.5]] * 3, check=True)
    against_plain(model, [torch.randint(3, (2, 4)) for _ in range(3)])
    assert [p.requires_grad for p in model.alphas.parameters()] == [False] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = make(alphas="learned apart", check=True)
    plain = copy.deepcopy(model)
    plain.reversible = False
    results = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype):
            states, _ = m(frames()[0])
        assert all(state.dtype is torch.float32 for state in states)
        sum(state.square().sum() for state in states).backward()
        results.append([*states, *(p.grad for p in m.parameters())])
    assert_same(*results)


def test_accumulation_frozen_parameters_hooks_and_autograd_grad():
    model = make(tops_at=(1,))
    plain = copy.deepcopy(model)
    plain.reversible = False
    calls = []
    for m in (model, plain):
        next(iter(m.parameters())).requires_grad_(False)
        m.alphas[2][1].requires_grad_(False)
        for p in [m.subnets[1][2].down.weight, m.alphas[3][0]]:
            p.register_hook(lambda g: calls.append(1) or g * 3)
    for _ in range(2):
        for m in (model, plain):
            m(frames()[0]).states[1].square().sum().backward()
    assert len(calls) == 8
    assert_same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert model.alphas[2][1].grad is None and not model.alphas[0][0].grad.any()
    results = []
    for m in (model, plain):
        out = sum(top.square().sum() for top in m(frames()[0]).tops)
        wanted = [m.alphas[1][0], m.subnets[0][1].down.bias]
        results.append(torch.autograd.grad(out, wanted, retain_graph=True))
        results.append(torch.autograd.grad(out, wanted))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("arithmetic", ["stock", "grid"])
def test_without_grad_mode_and_inside_a_converted_model(arithmetic):
    model = make()
    with torch.no_grad():
        states, _ = model(frames()[0])
    assert_same(states, model(frames()[0]).states)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 2, 1)
            self.columns = make(alphas="learned apart", fire="lif")

        def forward(self, x):
            return self.columns(self.stem(x)).states[-1]

    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net)
    plain.columns.reversible = False
    for m in (net, plain):
        srp.convert_to_reversible(m, arithmetic=arithmetic)
        m(frames()[0]).square().sum().backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_forty_steps_are_rebuilt_exactly_and_floats_are_not():
    found = {}
    for bits in (16, None):
        model = make(40, (8, 8), bits=bits, check=True)
        with torch.no_grad():
            for of_step in model.alphas:
                for alpha in of_step:
                    alpha.fill_(0.3)
        model(frames(shape=(2, 2, 8, 8))[0]).states[-1].sum().backward()
        found[bits] = model.last_rebuild
    assert found[16].flipped_bits == 0 and found[16].max_error == 0
    assert found[None].flipped_bits > 0 and found[None].max_error > 1e-3


def test_held_memory_is_flat_in_time():
    held = {}
    for alpha in (0.5, 1.0):
        for steps in (4, 16):
            model, x = make(steps), frames(shape=(4, 2, 16, 16))[0]
            with torch.no_grad():
                for of_step in model.alphas:
                    for factor in of_step:
                        factor.fill_(alpha)
            held[alpha, steps] = count_step(lambda model=model, x=x: sum(s.sum() for s in model(x).states))[
                0
            ]
    assert held[1.0, 16] <= 1.02 * held[1.0, 4]
    digits = 12 * 4 * (4 + 6 + 3) * 16 * 16 / 8
    assert held[0.5, 16] <= 1.02 * held[0.5, 4] + digits
    assert held[1.0, 4] < 1.1 * 4 * 4 * (4 + 6 + 3) * 16 * 16


def test_each_level_runs_twice_a_step():
    runs = []
    model = make()
    for levels in model.subnets:
        for level in levels:
            level.register_forward_hook(lambda *_: runs.append(1))
    sum(state.sum() for state in model(frames()[0]).states).backward()
    assert len(runs) == 2 * 4 * 3


def test_the_outputs_may_be_changed_after_the_backward_and_copies_train():
    model = make()
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    assert_same(step(model, frames()), step(other, frames()))


# A device: nobody looks at alpha in a forward. The CPU stands in for it.


@pytest.fixture
def looks(monkeypatch):
    """How often somebody has looked at the factors."""
    monkeypatch.setattr(devices, "HOSTS", frozenset())
    found, look = [], Room.look
    monkeypatch.setattr(Room, "look", lambda *args: found.append(1) or look(*args))
    return found


def change(model, by):
    with torch.no_grad():
        for alpha in model.alphas.parameters():
            alpha.mul_(by)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("alphas", list(ALPHAS))
def test_on_a_device_the_columns_equal_the_plain_run(alphas, looks):
    model = make(alphas=alphas, check=True, tops_at=(1,))
    against_plain(model, frames())
    assert len(looks) == 3  # in the first forward, and at the end of both backwards
    change(model, -0.6)
    states, _ = model(frames()[0])
    assert len(looks) == 3
    states[0].sum().backward(retain_graph=True)
    states[0].sum().backward()
    against_plain(model, frames())


def test_on_a_device_an_alpha_that_left_its_room_is_named_and_has_room_then(looks):
    model = make()
    change(model, 0.99)
    step(model, frames())
    change(model, 0.4)
    states, _ = model(frames()[0])
    with pytest.raises(
        OverflowError, match=r"step 3: level 2 .*'s product with alpha lost more.*run this step"
    ):
        sum(state.sum() for state in states).backward()
    against_plain(model, frames())
    weights = {name: value * 1e-3 for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    against_plain(model, frames())


# Errors.


def test_what_does_not_go_together_is_refused():
    level = nn.Identity()
    with pytest.raises(ValueError, match=r"levels \[1, 2\]"):
        srp.RevSColumns([[level], [level, level]], [[0.5], [0.5, 0.5]])
    with pytest.raises(ValueError, match=r"alphas \[1\]"):
        srp.RevSColumns([[level, level]], [[0.5]])
    with pytest.raises(ValueError, match="at least one"):
        srp.RevSColumns([], [])
    with pytest.raises(ValueError, match="from 0 to 0"):
        srp.RevSColumns([[level]], [[0.5]], tops_at=(1,))
    with pytest.raises(ValueError, match="mode must be"):
        srp.RevSColumns([[level]], [[0.5]], mode="fast")
    with pytest.raises(ValueError, match="4 sub-networks, and got inputs for 2"):
        make()(frames(2))
    with pytest.raises(TypeError, match=r"step 0: level 0 \(Identity\) returned float64"):
        srp.RevSColumns([[level]], [[0.5]])(torch.zeros(2, requires_grad=True, dtype=torch.float64))


def test_a_state_that_changes_its_shape_is_refused():
    subnets = [[nn.Linear(3, 3)], [nn.Linear(3, 4)]]
    with pytest.raises(ValueError, match=r"step 1: level 0 \(Linear\) returned .*\(2, 4\).*\(2, 3\)"):
        srp.RevSColumns(subnets, [[0.5], [0.5]])(torch.zeros(2, 3))


@pytest.mark.parametrize("alpha", [0.5, 3.0, float("nan")])
def test_leaving_the_range_is_refused_in_the_backward(alpha):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor([200.0]))

        def forward(self, below):
            return below * self.factor

    model = srp.RevSColumns([[Large()] for _ in range(8)], [[alpha]] * 8)
    states, _ = model(torch.ones(2))
    with pytest.raises(OverflowError, match=r"RevSColumns: .*(reaches|holds NaN)"):
        states[0].sum().backward()


def test_in_place_changes_are_refused():
    model = make()
    states, _ = model(frames()[0])
    with torch.no_grad():
        model.alphas[1][0].mul_(2)
    with pytest.raises(RuntimeError, match=r"alphas\.1\.0 was modified"):
        states[0].sum().backward()
    states, _ = model(frames()[0])
    states[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        states[0].sum().backward()


def test_a_level_that_is_not_deterministic_is_named_in_check_mode():
    calls = [0]

    class Counting(nn.Linear):
        def forward(self, below):
            calls[0] += 1
            return super().forward(below) * calls[0]

    model = srp.RevSColumns([[Counting(3, 3)] for _ in range(3)], [[0.5]] * 3, check=True)
    with pytest.raises(RuntimeError, match=r"step 2: level 0 \(Counting\).*deterministic"):
        model(torch.randn(2, 3)).states[0].sum().backward()


def _worker(rank):
    found = []
    for reversible in (True, False):
        model = make(alphas="learned apart", tops_at=(1,))
        model.reversible = reversible
        parallel = nn.parallel.DistributedDataParallel(model)
        for seed in range(2):
            torch.manual_seed(10 * seed + rank)
            states, tops = parallel(torch.randn(2, 2, 4, 3))
            sum(out.square().sum() for out in (*states, *tops)).backward()
        found.append([p.grad for p in model.parameters()])
    return found


def test_two_processes(tmp_path):
    first, *others = itertools.chain(*together(tmp_path, _worker))
    for other in others:
        assert_same(first, other)
