"""A gradient is overwritten in mode "minimal" where nobody else holds it, and nowhere else."""

import pytest
import torch
from torch import nn

import snn_reversible_plugin as srp
from own_neurons import lif
from snn_reversible_plugin.tape.sliced import alone, cut

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer  # noqa: E402


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setitem(cut.STEP, "cpu", 1 << 9)


@pytest.fixture
def overwritten(monkeypatch):
    """The ways by which gradients came that were overwritten, and all that were asked for."""
    asked = []

    def noting(way, found, is_alone=alone.is_alone):
        asked.append((way, is_alone(way, found)))
        return asked[-1][1]

    monkeypatch.setattr(alone, "is_alone", noting)
    monkeypatch.setattr("snn_reversible_plugin.tape.is_alone", noting)
    return asked


class Net(nn.Module):
    """Two layers; ``seen`` are what is between, in the order of the forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        parts = [layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4), neuron.LIFNode()]
        parts += [layer.Conv2d(4, 4, 3, padding=1, bias=False), layer.BatchNorm2d(4), neuron.LIFNode()]
        self.parts = nn.ModuleList(parts)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        self.seen = []
        for part in self.parts:
            x = part(x)
            self.seen.append(x)
        return x


class Own(nn.Module):
    """A user's neuron."""

    def forward(self, x_seq):
        return lif(x_seq)


class Stream(nn.Module):
    """Neurons of two kinds that read a sum, which is rebuilt as a whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.fires = nn.ModuleList(
            [neuron.ParametricLIFNode(step_mode="m"), Own(), neuron.IFNode(step_mode="m")]
        )
        convs = [layer.Conv2d(4, 4, 3, padding=1, bias=False, step_mode="m") for _ in self.fires]
        self.convs = nn.ModuleList(convs)

    def forward(self, x):
        self.seen = []
        for fires, conv in zip(self.fires, self.convs, strict=True):
            spikes = fires(x)
            x = x + conv(spikes)
            self.seen += [spikes, x]
        return x


NETS = [Net, Stream]
X = 3, 6, 4, 8, 8
HELD = range(5)  # all of what is seen but the output


def by_hook(net, loss):
    found = [None] * 5

    def keep(at):
        def hook(grad):
            found[at] = grad

        return hook

    for at in HELD:
        net.seen[at].register_hook(keep(at))
    loss.backward()
    return found


def by_view_in_a_hook(net, loss):
    found = [None] * 5

    def keep(at):
        def hook(grad):
            found[at] = grad.flatten()

        return hook

    for at in HELD:
        net.seen[at].register_hook(keep(at))
    loss.backward()
    return found


def by_retain_grad(net, loss):
    for at in HELD:
        net.seen[at].retain_grad()
    loss.backward()
    return [net.seen[at].grad for at in HELD]


def by_capture(net, loss):
    return torch.autograd.grad(loss, net.seen[:5])


def by_node_hook(net, loss):
    found = []
    for at in HELD:
        net.seen[at].grad_fn.register_hook(lambda _inputs, outputs: found.append(outputs[0]))
    loss.backward()
    return found


@pytest.mark.parametrize("make", NETS)
@pytest.mark.parametrize("held", [by_hook, by_view_in_a_hook, by_retain_grad, by_capture, by_node_hook])
def test_a_gradient_that_somebody_holds_is_left_alone(held, make):
    found = []
    x = torch.rand(X).requires_grad_()
    for net in (make(), srp.convert_to_reversible(make(), mode="minimal")):
        loss = net(x).square().mean()
        found.append(held(net, loss))
    for one, other in zip(*found, strict=True):
        scale = float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("make", NETS)
def test_a_gradient_that_several_get_is_left_alone(make):
    found = []
    x = torch.rand(X).requires_grad_()
    for mode in (None, "minimal"):
        net, beside = make(), torch.zeros(X, requires_grad=True)
        more = torch.zeros(X, requires_grad=True)
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        # A sum's gradient goes to all of its terms, and that of what is put together is cut.
        y = torch.cat([net(x) + beside, more]) * torch.linspace(0, 1, 8)
        y.square().mean().backward()
        found.append([beside.grad, more.grad, *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


@pytest.mark.filterwarnings("ignore:.*no spiking neuron that the converter knows")
@pytest.mark.parametrize("make", [*NETS, lambda: Stream().fires[0], lambda: Stream().fires[1]])
def test_a_gradient_that_was_handed_in_is_left_alone(make):
    net, grad = srp.convert_to_reversible(make(), mode="minimal"), torch.rand(X)
    before = grad.clone()
    net(torch.rand(X).requires_grad_()).backward(grad)
    assert torch.equal(before, grad)


class Constant(torch.autograd.Function):
    """Gives one and the same tensor as its gradient, or a view of it."""

    kept = torch.rand(X)
    reshapes = False

    @staticmethod
    def forward(ctx, x):
        return x.flatten(0, 1) if Constant.reshapes else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return Constant.kept.view_as(Constant.kept) if Constant.reshapes else Constant.kept


@pytest.mark.parametrize("reshapes", [False, True])
@pytest.mark.parametrize("behind", ["neuron", "norm"])
def test_a_gradient_that_a_function_keeps_for_itself_is_left_alone(monkeypatch, reshapes, behind):
    net, before = Net(), Constant.kept.clone()
    monkeypatch.setattr(Constant, "reshapes", reshapes)
    if behind == "norm":
        del net.parts[5]
    srp.convert_to_reversible(net, mode="minimal")
    Constant.apply(net(torch.rand(X))).sum().backward()
    assert torch.equal(before, Constant.kept)


@pytest.mark.parametrize("samples", [0, 1, 2, 6])
@pytest.mark.parametrize("channels_last", [False, True])
def test_those_of_neurons_whose_input_stands_are_overwritten(overwritten, samples, channels_last):
    found = []
    for mode in (None, "minimal"):
        torch.manual_seed(2)
        net, x = Stream(), torch.rand(X[0], samples, *X[2:])
        if channels_last:
            x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        x.requires_grad_()
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        net(x).square().mean().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    ways = [way.__name__ for way, spare in overwritten if spare and isinstance(way, type)]
    assert ways == ["MultiStep", "_Sequence", "MultiStep"] or samples < 2 or channels_last
    for one, other in zip(*found, strict=True):
        scale = float(one.abs().max()) if one.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * scale)


def test_one_that_nobody_holds_is_overwritten(overwritten):
    net = srp.convert_to_reversible(Net(), mode="minimal")
    net(torch.rand(X).requires_grad_()).square().mean().backward()
    ways = {getattr(way, "__name__", str(way)) for way, spare in overwritten if spare}
    assert len(ways) == 3, overwritten
    assert (
        sum(spare for _, spare in overwritten) == 5
    )  # the first convolution's input stands, and is no cut


class Shared(nn.Module):
    """A current that is rebuilt as a whole for one and then read by two neurons."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(1)
        self.fires = neuron.LIFNode(step_mode="m")
        self.conv = layer.Conv2d(4, 4, 3, padding=1, step_mode="m")
        self.one, self.other = make(), make()

    def forward(self, x):
        current = self.conv(self.fires(x))
        spikes = self.one(current) + 2 * self.other(current)
        return spikes + nn.functional.softplus(current)


@pytest.mark.parametrize("samples", [1, 2, 6])
@pytest.mark.parametrize("make", [lambda: neuron.IFNode(step_mode="m"), Own])
def test_a_current_that_stands_for_others_is_left_alone(make, samples):
    found = []
    for mode in (None, "minimal"):
        torch.manual_seed(2)
        net, x = Shared(make), 2 * torch.rand(X[0], samples, *X[2:]).requires_grad_()
        if mode:
            srp.convert_to_reversible(net, mode=mode)
        net(x).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))
