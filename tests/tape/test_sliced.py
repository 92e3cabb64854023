"""Mode "minimal": slices of the batch against autograd unsliced."""

import copy
from contextlib import nullcontext
from itertools import accumulate

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.neurons.integrate_fire.in_slices import sequence_vjp_in_slices
from snn_reversible_plugin.neurons.integrate_fire.reference import Neuron, OutputGradients, Rule, Wanted
from snn_reversible_plugin.neurons.surrogates import Surrogate
from snn_reversible_plugin.ops import allocations
from snn_reversible_plugin.reports.measure import AllocationCounter, count_step
from snn_reversible_plugin.tape.handles import Kept
from snn_reversible_plugin.tape.replayed import Replayed
from snn_reversible_plugin.tape.sliced import alone, cut, gradients, later, noted, stand_in

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer, surrogate  # noqa: E402


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Slices of a few rows, whatever the layer's size."""
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 9)
    monkeypatch.setattr(cut, "_proved", {})


@pytest.fixture
def sliced(monkeypatch):
    """The operators that ran on slices, and on how many in all."""
    ran = []

    def counting(func, by_slices):
        def counted(*args, **how):
            result = by_slices(*args, **how)
            ran.append(func)
            return result

        return counted

    for func, by_slices in gradients.BY_SLICES.items():
        monkeypatch.setitem(gradients.BY_SLICES, func, counting(func, by_slices))
    return ran


def gradients_of(module, x, mode):
    """Of a layer behind spikes, with those of its input."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    with tape.recording(mode) if mode else torch.enable_grad():
        spikes = x + (x > 0).to(x.dtype) - x.detach()
        result = module(spikes)
        weights = torch.linspace(-1, 1, result.numel(), dtype=x.dtype).cos().view_as(result)
        loss = (result * weights).sum()
    loss.backward()
    return [x.grad, *(parameter.grad for parameter in module.parameters())]


class Attention(nn.Module):
    """Products of products of one input, head by head."""

    def forward(self, x):
        heads = x.flatten(2).unflatten(1, (2, -1))
        return (heads @ heads.transpose(-1, -2)) @ heads


class Residual(nn.Module):
    """A product of two values that are rebuilt."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return self.one(x) * self.other(x)


class Repeated(nn.Module):
    """An image for each time step."""

    def __init__(self, dims=4):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.unsqueeze(0).repeat(3, *[1] * self.dims)


class Turned(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2) + 0.1


class PutTogether(nn.Module):
    """Two products side by side, or one behind the other."""

    def __init__(self, dim):
        super().__init__()
        self.one, self.other, self.dim = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), dim

    def forward(self, x):
        return torch.cat((self.one(x), self.other(x)), self.dim)


class Expanded(nn.Module):
    def forward(self, x):
        return x.expand(3, *x.shape)


LAYERS = {
    "convolution": lambda: nn.Conv2d(8, 6, 3),
    "strides, dilation, no bias": lambda: nn.Conv2d(8, 6, 3, stride=2, dilation=2, padding=2, bias=False),
    "groups": lambda: nn.Conv2d(8, 16, 3, groups=4, padding=1),
    "depthwise": lambda: nn.Conv2d(8, 8, 5, groups=8, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 6, 3)),
    "three dimensions": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv3d(2, 3, 3, padding=1)),
    "max pooling": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 2, 1)),
    "average pooling": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 6, 1)),
    "adaptive pooling": lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(3)),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
    "batch norm without momentum": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, momentum=None)
    ),
    "batch norm without weights": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False)
    ),
    "batch norm without statistics": lambda: nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)
    ),
    "batch norm in evaluation": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).eval(),
    "linear": lambda: nn.Sequential(nn.Flatten(0, 1), nn.Flatten(), nn.Linear(81, 20)),
    "linear of many dimensions": lambda: nn.Linear(9, 7, bias=False),
    "attention": Attention,
    "product": Residual,
    "put together": lambda: nn.Sequential(PutTogether(1), nn.Conv2d(16, 6, 3)),
    "put together from behind": lambda: nn.Sequential(PutTogether(-3), nn.Conv2d(16, 6, 3)),
    "samples put together": lambda: nn.Sequential(PutTogether(0), nn.Conv2d(8, 6, 3)),
    "repeated": lambda: nn.Sequential(nn.Conv2d(8, 6, 3), Repeated(), nn.Flatten(0, 1), nn.Conv2d(6, 4, 3)),
    "expanded": lambda: nn.Sequential(nn.Conv2d(8, 6, 3), Expanded(), nn.Flatten(0, 1), nn.Conv2d(6, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("batch", [1, 5, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_an_operator_in_slices_has_autograds_gradients(name, batch, sliced):
    torch.manual_seed(0)
    module = LAYERS[name]().double()
    x = torch.randn(batch, 8, 9, 9, dtype=torch.float64)
    expected, actual = gradients_of(module, x, None), gradients_of(module, x, "minimal")
    assert bool(sliced) == (batch > 1 or name == "linear of many dimensions")
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_is_repeated_stands_for_nobody_else(monkeypatch):
    """Its rows are others than those of what it is made of, behind a norm that has room for that."""
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 11)
    monkeypatch.setattr(cut.Room, "has", lambda *_: True)
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv1d(6, 16, 3, padding=1), nn.BatchNorm1d(16), Turned(), Repeated(3))
    net = srp.convert_to_reversible(nn.Sequential(stem, neuron.LIFNode(step_mode="m")), mode="minimal")
    for _ in range(2):
        functional.reset_net(net)
        net(torch.rand(6, 6, 40)).square().sum().backward()


@pytest.mark.parametrize("repeat", [Repeated, Expanded])
@pytest.mark.parametrize("batch", [1, 2, 7, 8])
def test_neurons_rebuild_what_is_repeated_in_slices(repeat, batch, monkeypatch):
    """Each of their slices has all time steps of some samples, which one convolution's rows give."""
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 11)
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), repeat())
    stock = nn.Sequential(stem, neuron.LIFNode(step_mode="m", detach_reset=True))
    net, x = srp.convert_to_reversible(copy.deepcopy(stock), mode="minimal"), torch.randn(batch, 2, 12, 12)
    ways, parts = [], cut.Cut.parts

    def noting(self, way=None, **how):
        ways.append(way)
        return parts(self, way, **how)

    monkeypatch.setattr(cut.Cut, "parts", noting)
    for _ in range(2):
        for one in (stock, net):
            functional.reset_net(one)
            one.zero_grad()
            out = one(x)
            (out * torch.linspace(-1, 1, out.numel()).cos().view_as(out)).sum().backward()
        for one, other in zip(stock.parameters(), net.parameters(), strict=True):
            scale = float(one.grad.abs().max())
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-4 * scale)
    assert batch < 7 or repeat is Expanded or (3, batch) in ways  # which overlaps, and stands in little


class Scores(nn.Module):
    """Attention of one head."""

    def forward(self, x):
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


SQUARE = nn.Unflatten(2, (4, 4))
BEHIND_A_LINEAR_LAYER = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "batch norm in evaluation": lambda: nn.BatchNorm1d(8).eval(),
    "one dimension": lambda: nn.Conv1d(8, 6, 3),
    "batch norm of images": lambda: nn.Sequential(SQUARE, nn.BatchNorm2d(8)),
    "two dimensions": lambda: nn.Sequential(SQUARE, nn.Conv2d(8, 6, 3)),
    "max pooling": lambda: nn.Sequential(SQUARE, nn.MaxPool2d(2)),
    "average pooling": lambda: nn.Sequential(SQUARE, nn.AvgPool2d(2)),
    "adaptive pooling": lambda: nn.Sequential(SQUARE, nn.AdaptiveAvgPool2d(3)),
    "attention": Scores,
    "gate": lambda: nn.GLU(),
    "linear": lambda: nn.Linear(16, 5),
}


@pytest.mark.parametrize("batch", [1, 5, 8])
@pytest.mark.parametrize("name", BEHIND_A_LINEAR_LAYER)
def test_rows_of_a_linear_layer_are_no_samples(name, batch):
    """One of [N, C, L] has N * C rows, and what takes channels can't be given a few of these."""
    torch.manual_seed(0)
    after = BEHIND_A_LINEAR_LAYER[name]()
    module = nn.Sequential(nn.Flatten(2), nn.Linear(81, 16), after).double()
    x = torch.randn(batch, 8, 9, 9, dtype=torch.float64)
    for one, other in zip(gradients_of(module, x, None), gradients_of(module, x, "minimal"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def network(bias=True):
    torch.manual_seed(1)
    net = nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1, bias=bias),
        layer.BatchNorm2d(16),
        neuron.LIFNode(v_threshold=0.3, detach_reset=True, surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2),
        layer.Conv2d(16, 16, 3, padding=1, bias=False),
        layer.BatchNorm2d(16),
        neuron.ParametricLIFNode(v_threshold=0.3),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(16 * 16, 10),
    )
    functional.set_step_mode(net, "m")
    return net


def train(net, x, backwards=1):
    functional.reset_net(net)
    net.zero_grad()
    y = net(x)
    for at in range(backwards):
        y.square().mean().backward(retain_graph=at + 1 < backwards)
    return y.detach(), [parameter.grad for parameter in net.parameters()]


def assert_close(expected, actual, rtol=1e-4):
    largest = max(float(one.abs().max()) for one in expected)
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * largest)


@pytest.mark.parametrize("shape", [(4, 5, 2, 16, 16), (1, 6, 2, 16, 16), (6, 1, 2, 16, 16)], ids=str)
@pytest.mark.parametrize("backwards", [1, 2])
def test_a_network_trains_with_stocks_outputs_and_gradients_equal_to_rounding(shape, backwards, sliced):
    x = torch.rand(shape)
    expected = train(network(), x, backwards)
    actual = train(srp.convert_to_reversible(network(), mode="minimal"), x, backwards)
    assert torch.equal(expected[0], actual[0])
    assert_close(expected[1], actual[1])
    assert len({*sliced}) >= 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype, sliced):
    x = torch.rand(4, 5, 2, 16, 16)
    found = []
    for net in (network(bias=False), srp.convert_to_reversible(network(bias=False), mode="minimal")):
        with torch.autocast("cpu", dtype):
            found.append(train(net, x))
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], rtol=0.02)
    assert sliced


def test_a_product_with_other_bits_in_slices_runs_as_a_whole(monkeypatch, sliced):
    compared = cut._compared

    def never_equal(one, tensor, parts):
        return compared(one, tensor, parts) and False

    monkeypatch.setattr(cut, "_compared", never_equal)
    x = torch.rand(4, 5, 2, 16, 16)
    around = []
    original = cut.Cut._around_a_product
    monkeypatch.setattr(cut.Cut, "_around_a_product", lambda one: around.append(one) or original(one))
    expected = train(network(), x)
    actual = train(srp.convert_to_reversible(network(), mode="minimal"), x)
    assert len(around) == 2  # a neuron each
    assert_close(expected[1], actual[1])


class WritesParts(nn.Module):
    """Fills a tensor step by step, and multiplies with a number that it learns."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x_seq):
        out = torch.zeros_like(x_seq)
        for t, x in enumerate(x_seq):
            out[t] = x * 2
        return (out * self.gain.exp()).square()


def test_what_is_no_operator_or_a_single_number_is_rebuilt_whole():
    x = torch.rand(4, 5, 2, 16, 16)
    found = []
    for mode in (None, "minimal"):
        net = network(bias=False)
        net.insert(3, WritesParts())
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        found.append(train(net, x))
    assert torch.equal(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1])


def test_it_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(alone, "_alone", {})  # as in a process that tried nothing yet
    net, x = srp.convert_to_reversible(network(), mode="minimal"), torch.rand(4, 5, 2, 16, 16)
    before = torch.get_rng_state()
    train(net, x)
    assert torch.equal(torch.get_rng_state(), before) and alone._alone


def test_hooks_see_whole_gradients():
    x, found = torch.rand(4, 5, 2, 16, 16), []
    for net in (network(), srp.convert_to_reversible(network(), mode="minimal")):
        seen = []
        handles = [
            module.register_full_backward_hook(lambda _m, gi, go, seen=seen: seen.extend((*gi, *go)))
            for module in (net[1], net[4])
        ]
        train(net, x)
        for handle in handles:
            handle.remove()
        found.append([one for one in seen if one is not None])
    assert len(found[0]) == len(found[1])
    assert_close(*found)


def test_the_peak_is_lower_than_in_mode_memory(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 16)
    x = torch.rand(4, 16, 2, 32, 32)
    peaks = {}
    for mode in ("memory", "minimal"):
        net = network()
        net[9] = layer.Linear(16 * 64, 10, step_mode="m")
        srp.convert_to_reversible(net, mode=mode)
        for _ in range(2):
            peaks[mode] = count_step(lambda net=net: forward(net, x))[1]
    assert peaks["minimal"] < 0.7 * peaks["memory"]


def test_a_convolution_of_a_small_input_is_cut_for_its_gradients_sake():
    net = nn.Sequential(nn.Conv2d(2, 64, 3, padding=1), nn.BatchNorm2d(64))
    x, gradient = torch.rand(16, 2, 16, 16), torch.rand(16, 64, 16, 16)
    for _ in range(2):
        with tape.recording("minimal"):
            out = net(x)
        with AllocationCounter() as counter:
            out.backward(gradient)
    assert counter.peak < 1.4 * gradient.nbytes


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(256, 256, 3, padding=1), lambda: nn.Linear(512, 4096)])
def test_no_slices_where_a_sum_of_weights_is_more_than_they_spare(make, sliced):
    peaks, module = {}, make()
    x = torch.rand((4, 256, 2, 2) if isinstance(module, nn.Conv2d) else (8, 512)).round()
    for mode in ("memory", "minimal"):
        for _ in range(2):
            with tape.recording(mode):
                loss = module(x * 1.5).square().mean()
            with AllocationCounter() as counter:
                loss.backward()
            module.zero_grad()
        peaks[mode] = counter.peak
    assert peaks["minimal"] <= peaks["memory"]
    assert bool(sliced) == isinstance(module, nn.Conv2d)  # which goes by channels


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(24, 40, 3, padding=1),
        lambda: nn.Conv2d(24, 9, 3, stride=2, bias=False),
        lambda: nn.Conv2d(25, 33, 3, padding=1).to(memory_format=torch.channels_last),
    ],
)
def test_weights_that_are_larger_than_their_layer_go_by_channels(make, learns, sliced, monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 8)
    torch.manual_seed(0)
    module = make().double().requires_grad_(learns)
    x = torch.randn(4, module.in_channels, 3, 3, dtype=torch.float64)
    if module.weight.is_contiguous(memory_format=torch.channels_last) and not module.weight.is_contiguous():
        x = x.to(memory_format=torch.channels_last)
    ran, backward = [], gradients._convolution_by_channels

    def noting(*how):
        ran.append(how)
        return backward(*how)

    monkeypatch.setattr(gradients, "_convolution_by_channels", noting)
    expected, actual = (gradients_of(module, x, mode) for mode in (None, "minimal"))
    assert bool(ran) == learns
    for one, other in zip(expected, actual, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_weights_that_are_not_small_beside_their_input_go_by_channels_too(learns, sliced, monkeypatch):
    """The input's gradient goes by samples as ever."""
    torch.manual_seed(0)
    module = nn.Conv2d(24, 40, 3, padding=1).double()
    module.bias.requires_grad_(learns[1])
    x = torch.randn(8, 24, 6, 6, dtype=torch.float64)
    g_x = x.nbytes * 40 // 24
    assert x.nbytes < 2 * module.weight.nbytes < 2 * (x.nbytes + g_x)
    ran, by_channels = [], gradients._weights_by_channels

    def noting(*how):
        ran.append(how)
        return by_channels(*how)

    monkeypatch.setattr(gradients, "_weights_by_channels", noting)
    module.weight.requires_grad_(learns[0])
    expected, actual = (gradients_of(module, x, mode) for mode in (None, "minimal"))
    assert bool(ran) == learns[0]
    for one, other in zip(expected, actual, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_waits_has_its_input_to_itself():
    """What stands in the tape's cache is somebody else's soon, who writes over it."""

    class Standing:
        def whole(self):
            return x

    backward = torch.ops.aten.convolution_backward.default
    x, grad, weight = torch.randn(4, 16, 3, 3), torch.randn(4, 16, 3, 3), torch.randn(16, 16, 3, 3)
    how = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    expected = backward(grad, x, weight, *how)[1]
    with later.waiting({weight.data_ptr()}) as found:
        _, now, _ = gradients._convolution_by_channels(backward, grad, Standing(), weight, *how)
    x.zero_()
    assert now is None
    torch.testing.assert_close(found[weight.data_ptr()](), expected)


def test_a_kernel_lays_out_some_channels_weights_anew():
    """The gradient of the weights stands, and an eighth of what the kernel made of them beside it."""
    module, x = nn.Conv2d(512, 512, 3, padding=1, bias=False), torch.rand(4, 512, 2, 2).round()

    def loss():
        return module(x * 1.5).square().mean()

    net, peaks = srp.convert_to_reversible(nn.Sequential(nn.Identity(), module), mode="minimal"), {}
    for mode in (None, "minimal"):
        for _ in range(2):
            with tape.recording(mode) if mode else nullcontext():
                out = loss()
            recorded = allocations.start()
            out.backward()
            peaks[mode] = max(accumulate(event.size for event in allocations.stop(recorded)))
            net.zero_grad()
    weights = module.weight.nbytes
    assert 2 * weights < peaks[None]
    assert peaks["minimal"] < 1.25 * weights + (peaks[None] - weights) / 8


def test_a_whole_that_is_no_slices_is_nobody_elses():
    """A view of what waits for somebody else: a neuron writes its gradient over what it is given."""
    aten, x = torch.ops.aten, torch.rand(4, 8)
    waits = Replayed(aten.mul.Tensor, (Kept(x), 2.0), {})
    waits.cache = x * 2
    view = Replayed(aten.view.default, (waits, [2, 2, 8]), {})
    one = cut.Cut(view, waits.cache.view(2, 2, 8), (1, 2), None)
    whole = one.whole()
    assert torch.equal(whole.flatten(0, 1), waits.cache)
    assert whole.untyped_storage().data_ptr() != waits.cache.untyped_storage().data_ptr()


def test_a_sequence_of_one_sample_is_not_its_neurons_to_write_over():
    """All of it is one slice, and that slice may be a view of what waits for somebody else."""
    aten, x = torch.ops.aten, torch.rand(64, 8)
    waits = Replayed(aten.mul.Tensor, (Kept(x), 2.0), {})
    waits.cache = x * 2
    noted.note(waits, noted.Noted(x.size()))
    view = Replayed(aten.view.default, (waits, [64, 1, 8]), {})
    noted.note(view, noted.Noted(torch.Size([64, 1, 8])))
    one = cut.Cut(view, waits.cache.view(64, 1, 8), (64, 1), None)
    one.exact = {*one.ways}
    rule, grad = Rule(2.0, True, 1.0, 0.0, True), Surrogate(lambda grad, u: grad / (1 + u.abs()))
    grads = OutputGradients(torch.rand(64, 1, 8), None, None)
    sequence_vjp_in_slices(one, 0.0, grads, Neuron(rule, grad), Wanted(x=True, v=False, q=False))
    assert torch.equal(waits.cache, x * 2)


@pytest.mark.slow
def test_slices_of_a_small_network_are_small_too(monkeypatch):
    """Its largest tensor has half a megabyte: a slice is a share of that."""
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 20)
    x, peaks = torch.rand(4, 16, 2, 16, 16), {}
    for mode in ("memory", "minimal"):
        net = network()
        net[9] = layer.Linear(16 * 16, 10, step_mode="m")
        srp.convert_to_reversible(net, mode=mode)
        for _ in range(2):
            peaks[mode] = count_step(lambda net=net: forward(net, x))[1]
    assert peaks["minimal"] < 0.8 * peaks["memory"]


def forward(net, x):
    functional.reset_net(net)
    return net(x).square().mean()


def test_only_what_is_large_beside_the_largest_is_cut(monkeypatch):
    x = torch.rand(4, 5, 2, 16, 16)
    cuts = []
    unpack = stand_in._is_taken
    monkeypatch.setattr(stand_in, "_is_taken", lambda one: cuts.append((one, unpack(one))) or cuts[-1][1])
    train(srp.convert_to_reversible(network(), mode="minimal"), x)
    largest = max(one.nbytes for one, _ in cuts)
    assert {taken for one, taken in cuts if cut.SMALL * one.nbytes <= largest} <= {False}
    assert any(taken for _, taken in cuts)


@pytest.mark.parametrize("learns", [True, False])
def test_large_weights_make_a_small_layer_a_large_one(learns, monkeypatch):
    """What a kernel lays out of them may be more than all that goes through any layer."""
    ran, by_channels = [], gradients._weights_by_channels

    def noting(*how):
        ran.append(how)
        return by_channels(*how)

    monkeypatch.setattr(gradients, "_weights_by_channels", noting)
    deep = nn.Conv2d(256, 64, 3, padding=1, bias=False).requires_grad_(learns)
    net = nn.Sequential(
        nn.Conv2d(2, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(16), nn.Conv2d(64, 256, 1), deep
    )
    x = torch.rand(64, 2, 32, 32)
    entering = x[:, :1, :4, :4].numel() // 4 * 256 * 4
    assert cut.SMALL * entering < x.numel() // 2 * 64 * 4 < cut.SMALL * deep.weight.nbytes
    with tape.recording("minimal"):
        loss = net(x).square().mean()
    loss.backward()
    assert (
        any(weight is deep.weight or weight.shape == deep.weight.shape for _, _, _, weight, *_ in ran)
        == learns
    )


def test_verify_names_it_and_finds_a_slice_that_is_wrong(monkeypatch):
    net, x = srp.convert_to_reversible(network(), mode="minimal"), torch.rand(4, 5, 2, 16, 16)
    found = srp.verify(net, x, repeats=1)
    assert found.ok and found.sliced and found.outputs_equal and not found.flipped_spikes
    assert srp.verify(srp.convert_to_reversible(net, mode="memory"), x, repeats=1).sliced is None
    func = torch.ops.aten.convolution_backward.default
    right = gradients.BY_SLICES[func]

    def wrong(*args, **how):
        g_x, g_weight, g_bias = right(*args, **how)
        return g_x, g_weight * 1.01, g_bias

    monkeypatch.setitem(gradients.BY_SLICES, func, wrong)
    found = srp.verify(srp.convert_to_reversible(net, mode="minimal"), x, repeats=1)
    assert not found.ok and not found.sliced


@pytest.mark.slow
def test_a_report_says_what_goes_by_slices():
    net = srp.convert_to_reversible(network(), mode="minimal")
    rows = {row.name: row for row in srp.memory_report(net, torch.rand(4, 5, 2, 16, 16)).modules}
    assert rows["1"].treatment["replayed in slices"] == 1
    assert "sliced" in rows["2"].neuron


@pytest.mark.parametrize("stepping", [False, True])
def test_a_membrane_can_be_read_after_the_backward(stepping):
    x, found = torch.rand(4, 5, 2, 16, 16), []
    for mode in (None, "minimal"):
        net = network(bias=False)
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        handle = srp.step_in_backward(optimizer) if mode and stepping else None
        forward(net, x).backward()
        found.append([net[2].v, net[6].v])
        if handle is not None:
            handle.remove()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stepping", [False, True])
def test_a_membrane_that_went_unread_is_kept_for_nobody_where_weights_change(stepping):
    """Its reading raises after a backward that steps; it is stock's before, and where no weight moves."""
    x = torch.rand(4, 5, 2, 16, 16)
    stock, net = network(bias=False), srp.convert_to_reversible(network(bias=False), mode="minimal")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    if stepping:
        srp.step_in_backward(optimizer)
    for one in (stock, net):
        forward(one, x).backward()  # nobody reads what this one leaves
    optimizer.step()
    for one in (stock, net):
        forward(one, x).backward()
    for at in (2, 6):
        if stepping:
            with pytest.raises(RuntimeError, match="was not kept: the one before was reset unread"):
                _ = net[at].v
        else:
            assert torch.equal(stock[at].v, net[at].v)
    optimizer.step()
    losses = [forward(one, x) for one in (stock, net)]
    assert torch.equal(stock[2].v, net[2].v)  # before the backward
    for loss in losses:
        loss.backward()
    assert torch.equal(stock[2].v, net[2].v)  # which was asked for, and is kept from here on


def test_a_compiled_network_has_no_such_mode():
    with pytest.raises(ValueError, match="mode must be one of"):
        srp.compile(network(), mode="minimal")


def test_a_loop_longer_than_the_stack_is_deep_trains():
    torch.manual_seed(0)
    weight = torch.randn(64, requires_grad=True)
    found = []
    for mode in ("minimal", None):
        v, total = torch.zeros(64, 64), 0.0
        with nullcontext() if mode is None else tape.recording(mode):
            for _ in range(250):
                v = v * 0.9 + weight
                total = total + (v * v).mean()
        found.append(torch.autograd.grad(total, weight)[0])
    torch.testing.assert_close(*found)


def test_values_that_are_used_twice_again_and_again_are_looked_at_once():
    """As many ways lead to the first as there are subsets of the uses, which nobody lives to go through."""
    torch.manual_seed(0)
    start = torch.randn(64, 8, 8)
    found = []
    for mode in ("minimal", None):
        v = x = start.clone().requires_grad_()
        with nullcontext() if mode is None else tape.recording(mode):
            for _ in range(24):
                v = v * 0.5 + v.sin()
            loss = (v * v).sum()
        found.append(torch.autograd.grad(loss, x)[0])
    torch.testing.assert_close(*found)


def test_recipes_of_other_operations_have_proofs_of_their_own():
    aten, x = torch.ops.aten, Kept(torch.rand(8, 8))

    def signature(factors, one_and_the_same=False):
        products = [Replayed(aten.mul.Tensor, (x, factor), {}) for factor in factors]
        both = [products[0], products[0 if one_and_the_same else 1]]
        return cut._signature(Replayed(aten.cat.default, (both, 0), {}))

    assert signature((2.0, 2.0)) == signature((2.0, 2.0))
    assert signature((2.0, 2.0)) != signature((2.0, 3.0))
    assert signature((2.0, 2.0)) != signature((2.0, 2.0), one_and_the_same=True)
