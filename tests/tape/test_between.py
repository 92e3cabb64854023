"""Mode "minimal": what a layer of a Sequential hands on to the next one need not stand as it is."""

import copy
import gc
import itertools
import pickle
import random

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.ops import allocations
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.sliced import between, cut

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer  # noqa: E402

T, N, C, SIDE = 4, 8, 16, 16
ONE = T * N * C * SIDE * SIDE * 4  # bytes of one tensor of a layer


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 14)


def stack(*parts):
    torch.manual_seed(0)
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, "m")
    return net


def convolution(inputs=C, outputs=C, **how):
    return layer.Conv2d(inputs, outputs, 3, **({"padding": 1, "bias": False} | how))


def network(layers=3):
    torch.manual_seed(0)
    parts = []
    for index in range(layers):
        parts += [convolution(C if index else 2), layer.BatchNorm2d(C), neuron.LIFNode(detach_reset=True)]
    return stack(*parts)


X = torch.rand(T, N, 2, SIDE, SIDE)


def step(net, x=X, amp=None):
    functional.reset_net(net)
    net.zero_grad()
    with torch.autocast("cpu", amp, enabled=amp is not None):
        out = net(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).cos().view_as(out)).sum().backward()
    return out.detach().clone()


def assert_as_stock(stock, x=X, amp=None, steps=3, tolerance=1e-5):
    """Outputs and buffers of several steps to the bit; gradients to rounding."""
    net = srp.convert_to_reversible(copy.deepcopy(stock), mode="minimal")
    for _ in range(steps):
        x_stock, x_ours = (x.clone().requires_grad_() for _ in range(2))
        expected, found = step(stock, x_stock, amp), step(net, x_ours, amp)
        assert torch.equal(expected, found)
        for one, other in zip(stock.buffers(), net.buffers(), strict=True):
            assert torch.equal(one, other)
        pairs = [(x_stock, x_ours), *zip(stock.parameters(), net.parameters(), strict=True)]
        assert [one.grad is None for one, _ in pairs] == [other.grad is None for _, other in pairs]
        pairs = [pair for pair in pairs if pair[0].grad is not None]
        largest = max(float(one.grad.abs().max()) if one.numel() else 0.0 for one, _ in pairs)
        for one, other in pairs:
            torch.testing.assert_close(other.grad, one.grad, rtol=tolerance, atol=tolerance * largest)
    return net


def test_half_of_what_stood_in_the_forward():
    """Convolution, norm and neuron: n and bits, where each alone has its input and its result, 2 n."""
    net = stack(*network(3), layer.AvgPool2d(2), layer.Flatten(), layer.Linear(C * SIDE * SIDE // 4, 2))
    srp.convert_to_reversible(net, mode="minimal")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
    srp.step_in_backward(optimizer)

    x = torch.rand(T, 8 * N, 2, SIDE, SIDE)  # large beside the buffers of a neuron

    def loss():
        functional.reset_net(net)
        return net(x).square().mean()

    loss().backward()  # the first step of a shape runs as a whole
    optimizer.step()
    net.zero_grad()
    gc.collect()
    held, peak = count_step(loss)
    assert 8 * ONE < peak < 1.6 * 8 * ONE + held


def test_trains_as_stock():
    assert_as_stock(network())


@pytest.mark.parametrize("shape", [(1, 8), (4, 1), (4, 0), (1, 1), (3, 5)])
def test_odd_shapes(shape):
    assert_as_stock(network(), torch.rand(*shape, 2, SIDE, SIDE))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_under_autocast(amp):
    assert_as_stock(network(), amp=amp, tolerance=3e-2)


def test_in_float64_and_channels_last():
    assert_as_stock(network().double(), X.double())
    x = X.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (T, N))
    assert_as_stock(network().to(memory_format=torch.channels_last), x)


def test_norms_in_evaluation():
    net = network()
    for part in net:
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    assert_as_stock(net)


class Looks(nn.Module):
    """A layer that nobody knows: it keeps what it sees, and reads it past the operators."""

    def __init__(self):
        super().__init__()
        self.seen, self.copies = [], []

    def forward(self, x):
        self.seen.append(x)
        self.copies.append(torch.from_numpy(x.detach().numpy().copy()))
        return x


def test_a_layer_that_nobody_knows_sees_what_it_would():
    """It has the bytes, and what it keeps of them is not written over."""
    looks = [Looks() for _ in range(3)]
    parts = list(network())
    net = stack(*parts[:1], looks[0], *parts[1:2], looks[1], *parts[2:3], looks[2], *parts[3:])
    net = assert_as_stock(net)
    for one in net:
        if isinstance(one, Looks):
            assert len(one.seen) == 3
            assert all(map(torch.equal, one.seen, one.copies))


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("of", ["inputs", "outputs"])
def test_what_a_hook_keeps_stays_as_it_is(at, of):
    stock, net = network(), srp.convert_to_reversible(network(), mode="minimal")
    kept = []
    for one in (stock, net):
        if of == "inputs":
            one[at].register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
        else:
            one[at].register_forward_hook(lambda _module, _inputs, out: kept.append(out))
    for _ in range(3):
        kept.clear()
        assert torch.equal(step(stock), step(net))
        assert torch.equal(*kept)


def test_spikes_have_their_bytes_again_where_a_layer_raises():
    net = srp.convert_to_reversible(network(), mode="minimal")
    for _ in range(2):
        step(net)
    net[3].weight = nn.Parameter(torch.rand(C, C + 1, 3, 3))
    functional.reset_net(net)
    with pytest.raises(RuntimeError, match="channels") as error:
        net(X)
    frame = error.tb
    while frame.tb_frame.f_code.co_qualname != "_run":
        frame = frame.tb_next
    spikes = frame.tb_frame.f_locals["input"]
    assert spikes.untyped_storage().nbytes() == ONE
    assert 0 < spikes.mean() < 1


def test_a_mode_of_somebody_elses_sees_values():
    """It is below the tape, and looks at what operators take."""

    class Sums(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            with torch.no_grad():
                for arg in args:
                    if (
                        isinstance(arg, torch.Tensor)
                        and arg.is_floating_point()
                        and arg.device.type == "cpu"
                    ):
                        sums.append(float(arg.detach().sum()))
            return func(*args, **(kwargs or {}))

    net = srp.convert_to_reversible(network(), mode="minimal")
    for _ in range(2):
        step(net)
    functional.reset_net(net)
    sums = []
    with Sums():
        net(X)
    assert len(sums) > 9


def test_what_autograd_saves_by_other_hooks_stays_as_it_is():
    """They hold the tensors themselves, and a neuron's input is saved when it has run."""

    class Saves(nn.Sequential):
        def forward(self, x):
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
                return super().forward(x)

    parts = [*network()]
    assert_as_stock(nn.Sequential(Saves(nn.Sequential(*parts[:6])), *parts[6:]))


def test_without_gradients_nothing_is_handed_on(monkeypatch):
    net = srp.convert_to_reversible(network(), mode="minimal")
    for _ in range(2):
        step(net)
    monkeypatch.setattr(between.Between, "_leave_bits", None)
    functional.reset_net(net)
    with torch.no_grad():
        net(X)


def test_a_part_without_gradients_between_two_with():
    class Frozen(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            with torch.no_grad():
                return self.part(x)

    parts = list(network(4))
    stock = nn.Sequential(*parts[:3], Frozen(nn.Sequential(*parts[3:9])), *parts[9:])
    net = srp.convert_to_reversible(copy.deepcopy(stock), mode="minimal")
    for _ in range(3):
        assert torch.equal(step(stock), step(net))
        for one, other in zip(stock[-3:].parameters(), net[-3:].parameters(), strict=True):
            torch.testing.assert_close(
                one.grad, other.grad, rtol=1e-5, atol=1e-5 * float(one.grad.abs().max())
            )


def test_checks_and_reports_say_what_they_would():
    net = srp.convert_to_reversible(network(), mode="minimal")
    for _ in range(2):
        step(net)
    assert srp.verify(net, X).ok
    with srp.reversible(net, check=True):
        functional.reset_net(net)
        net(X).sum().backward()


def test_copies_pickles_and_the_way_back():
    net = srp.convert_to_reversible(network(), mode="minimal")
    for one in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        step(one)
        assert torch.equal(step(one), step(network()))
    assert type(srp.restore(net)) is nn.Sequential
    assert not [name for module in net.modules() for name in vars(module) if name.startswith("_srp")]


def test_spikes_in_bits_are_unpacked_for_whoever_asks():
    """The same tensor, and a view that was made while it had no bytes."""
    spikes = (torch.rand(T, N, C, SIDE, SIDE) > 0.7).float()
    expected = spikes.clone()
    with tape.recording("minimal") as recorded:
        tape.mark_spikes(spikes)
        handed = tape.between()
        handed._leave_bits(spikes, tape.handle_of(spikes))
        assert not spikes.untyped_storage().nbytes() and handed.are_in_bits(spikes)
        flat = spikes.flatten(0, 1)
        assert handed.holds_bits
        assert torch.equal(spikes * 1, expected)
        assert torch.equal(flat, expected.flatten(0, 1)) and not handed.holds_bits
        assert recorded.handle_of(flat).treatment == "replayed"
        assert torch.equal(tape.peek(recorded.handle_of(flat)), expected.flatten(0, 1))


class Block(nn.Module):
    """A residual block as people write it, in several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv1, self.bn1, self.sn1 = (
            convolution(),
            layer.BatchNorm2d(C),
            neuron.LIFNode(detach_reset=True),
        )
        self.conv2, self.bn2, self.sn2 = (
            convolution(),
            layer.BatchNorm2d(C),
            neuron.LIFNode(detach_reset=True),
        )
        self.pool = layer.MaxPool2d(2)
        self.kept = []

    def forward(self, x):
        return getattr(self, self.way)(x)

    def one_variable(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.sn1(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.sn2(out)
        return out + x

    def pooled(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.sn1(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.sn2(out)
        out = self.pool(out)
        return out + self.pool(x)

    def nested(self, x):
        return x + self.sn2(self.bn2(self.conv2(self.sn1(self.bn1(self.conv1(x))))))

    def before_activation(self, x):
        out = self.conv1(self.sn1(x))
        out = self.bn1(out)
        out = self.conv2(self.sn2(out))
        return self.bn2(out) + x

    def each_its_own(self, x):
        a = self.conv1(x)
        b = self.bn1(a)
        c = self.sn1(b)
        d = self.sn2(self.bn2(self.conv2(c)))
        return a.mean() + b.mean() + c + d

    def used_again(self, x):
        out = self.bn1(self.conv1(x))
        spikes = self.sn1(out)
        out = self.bn2(self.conv2(spikes))
        return self.sn2(out) + spikes * out.sigmoid()

    def kept_for_later(self, x):
        out = self.conv1(x)
        out = self.bn1(out)
        self.kept.append(out.detach())
        out = self.sn1(out)
        self.kept.append(out.detach().numpy())
        out = self.conv2(out)
        out = self.sn2(self.bn2(out))
        return out + sum(map(torch.as_tensor, self.kept[-2:]))

    def in_a_loop(self, x):
        out = x
        for part in (self.conv1, self.bn1, self.sn1, self.conv2, self.bn2, self.sn2, self.pool):
            out = part(out)
        return out

    def with_a_handler(self, x):
        out = self.conv1(x)
        try:
            out = self.bn1(out)
            out = self.sn1(out)
            out = self.conv2(torch.cat([out, out], 2))
        except RuntimeError:
            out = self.conv2(out)
        return self.sn2(out)

    def in_parallel(self, x):
        one = self.bn1(self.conv1(x))
        two = self.bn2(self.conv2(x))
        two = self.sn2(one + two)
        one = self.sn1(one)
        return torch.cat([one, two], 2)


WAYS = [
    name for name, value in vars(Block).items() if callable(value) and name not in ("__init__", "forward")
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outer", [nn.Sequential, None])
def test_forwards_of_ones_own(way, outer):
    """The model itself, whose input the caller holds, or a part of it, whose input nobody does."""
    torch.manual_seed(0)
    if outer is None:
        net = Block(way)
        functional.set_step_mode(net, "m")
        return assert_as_stock(net, torch.rand(T, N, C, SIDE, SIDE), tolerance=1e-4)
    net = stack(convolution(2), layer.BatchNorm2d(C), neuron.LIFNode(), Block(way), layer.AvgPool2d(2))
    return assert_as_stock(net, tolerance=1e-4)


def test_a_block_of_ones_own_has_its_input_and_one_tensor_more():
    """Where it wrote each result beside what that was computed from, it had its input and two."""
    x, peaks = torch.rand(T, 4 * N, 2, SIDE, SIDE), {}
    for mode in ("memory", "minimal"):
        net = stack(convolution(2), neuron.LIFNode(), Block("pooled"), layer.Flatten())
        net.append(layer.Linear(C * SIDE * SIDE // 4, 2, step_mode="m"))
        srp.convert_to_reversible(net, mode=mode)
        for _ in range(3):  # of which the first ones are compared with slices, and learn from calls
            functional.reset_net(net)
            recorded = allocations.start()
            out = net(x)
            alive = itertools.accumulate(event.size for event in allocations.stop(recorded))
            peaks[mode] = max(alive) / (4 * ONE)
            out.sum().backward()
    assert peaks["memory"] > 4 and 2 < peaks["minimal"] < 3


MENU = {
    "conv": lambda c: (convolution(c, C), C),
    "circular": lambda c: (convolution(c, C, padding_mode="circular"), C),
    "bias": lambda c: (convolution(c, C, bias=True), C),
    "strided": lambda c: (layer.Conv2d(c, 2 * C, 2, stride=2), 2 * C),
    "groups": lambda c: (convolution(c, c, groups=c), c),
    "norm": lambda c: (layer.BatchNorm2d(c), c),
    "plain norm": lambda c: (layer.BatchNorm2d(c, affine=False, track_running_stats=False), c),
    "counting norm": lambda c: (layer.BatchNorm2d(c, momentum=None), c),
    "lif": lambda c: (neuron.LIFNode(), c),
    "if": lambda c: (neuron.IFNode(v_reset=None), c),
    "plif": lambda c: (neuron.ParametricLIFNode(detach_reset=True), c),
    "stored": lambda c: (neuron.LIFNode(store_v_seq=True), c),
    "average": lambda c: (layer.AvgPool2d(2, ceil_mode=True), c),
    "maximum": lambda c: (layer.MaxPool2d(2, ceil_mode=True), c),
    "relu": lambda c: (nn.Sequential(layer.BatchNorm2d(c), nn.ReLU(inplace=True)), c),
    "dropout": lambda c: (nn.Dropout(0.0), c),
    "identity": lambda c: (nn.Identity(), c),
    "inner": lambda c: (nn.Sequential(convolution(c, C), layer.BatchNorm2d(C), neuron.LIFNode()), C),
}


@pytest.mark.parametrize("seed", range(24))
def test_stacks_at_random(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    parts, channels = [], 2
    for _ in range(draw.randint(3, 9)):
        part, channels = MENU[draw.choice([*MENU])](channels)
        parts.append(part)
    parts += [layer.Flatten(), layer.Linear(1, 1)][: draw.randint(0, 1)]
    stock = stack(convolution(2, 2), *parts)
    if not draw.randint(0, 3):
        stock.double()
    shape = (draw.choice([1, 3, 4]), draw.choice([1, 2, 7, 8]), 2, 17, 17)
    x = torch.rand(shape, dtype=next(stock.parameters()).dtype)
    assert_as_stock(stock, x, tolerance=1e-4)


class Chain(nn.Module):
    """A chain of reversible blocks between a stem and a head, called one after the other."""

    def __init__(self, raises=False):
        super().__init__()
        torch.manual_seed(0)

        def branch():
            conv = layer.Conv2d(C // 2, C // 2, 3, padding=1, bias=False)
            return nn.Sequential(neuron.LIFNode(), conv, layer.BatchNorm2d(C // 2))

        blocks = [srp.RevSBlock(branch(), branch()) for _ in range(2)]
        if raises:
            blocks[1].g.append(nn.Linear(SIDE + 1, 3))
        self.stem = nn.Sequential(convolution(2), layer.BatchNorm2d(C))
        self.chain, self.head = srp.RevSSequence(blocks, states="reset"), nn.Sequential(neuron.LIFNode())
        functional.set_step_mode(self, "m")

    def forward(self, x):
        x = self.stem(x)
        x = self.chain(x)
        return self.head(x)


def gone_of(monkeypatch):
    """Storages that a layer let go of, with the bytes that they were left with."""
    gone, let_go = [], between.Between.let_go

    def noting(self, value):
        let_go(self, value)
        gone.append((value.untyped_storage(), value.untyped_storage().nbytes()))

    monkeypatch.setattr(between.Between, "let_go", noting)
    return gone


def test_a_chain_lets_go_of_its_input(monkeypatch):
    gone = gone_of(monkeypatch)
    net, plain = (srp.convert_to_reversible(Chain(), mode=mode) for mode in ("minimal", "memory"))
    for _ in range(3):
        assert torch.equal(step(net), step(plain))
        for one, other in zip(net.parameters(), plain.parameters(), strict=True):
            scale = float(other.grad.abs().max())
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4 * scale)
    assert [nbytes for _, nbytes in gone[1:]] == [0, 0]  # of the first forward counts were learned


def test_a_chain_whose_input_others_hold_lets_it_be(monkeypatch):
    gone, kept = gone_of(monkeypatch), []
    net = srp.convert_to_reversible(Chain(), mode="minimal")
    net.stem.register_forward_hook(lambda _module, _inputs, out: kept.append((out, out.detach().clone())))
    for _ in range(3):
        step(net)
    assert [nbytes for _, nbytes in gone] == [ONE] * 3
    assert all(torch.equal(*both) for both in kept)


def test_a_chain_that_raises_leaves_memory_where_its_input_was(monkeypatch):
    gone, net = gone_of(monkeypatch), srp.convert_to_reversible(Chain(raises=True), mode="minimal")
    for _ in range(3):
        functional.reset_net(net)
        with pytest.raises(RuntimeError):
            net(X)
    assert gone[-1][1] == 0 and gone[-1][0].nbytes() == ONE


def test_rules_of_somebody_elses_get_spikes_with_their_bytes():
    """A grid's products run convolutions by a rule of their own."""
    net, seen = srp.convert_to_reversible(network(), mode="minimal"), []
    for _ in range(2):
        step(net)

    def rule(_tape, func, args, kwargs):
        seen.append(args[0].untyped_storage().nbytes())
        return func(*args, **kwargs)

    functional.reset_net(net)
    with srp.reversible(net), tape.overriding({torch.ops.aten.convolution.default: rule}):
        net(X)
    assert len(seen) == 3 and all(seen)
