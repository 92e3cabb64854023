"""Residual streams on the grid: undone in the backward, with the gradient of the same sums kept."""

import pytest
import torch
from torch import nn

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.model import (
    masnn,
    maxformer,
    ms_resnet,
    qkformer,
    sew_resnet,
    spikformer,
)

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.blocks.streams import Stream
from snn_reversible_plugin.modules.swap import NAME, swap, swapped_class
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.origins import look_up

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def straight_through(z):
    """Rounded to multiples of 2^-16 with the gradient of the identity."""
    return z + ((z * 65536).round() / 65536 - z).detach()


class Branch(nn.Sequential):
    def __init__(self, channels):
        super().__init__(
            neuron.LIFNode(v_reset=None),
            layer.Conv2d(channels, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
        )


class Block(nn.Module):
    """A user's residual block; ``how`` is the way it adds."""

    def __init__(self, channels, how):
        super().__init__()
        self.branch, self.how = Branch(channels), how

    def residual_branches(self):
        return self.branch

    def forward(self, x):
        out = self.branch(x)
        if self.how == "branch += x":
            out += x
        elif self.how == "x += branch":
            x = x.clone() if not x.grad_fn else x
            x += out
            out = x
        elif self.how == "x + branch":
            out = x + out
        else:
            out = out + x
        return out


class Reference(nn.Module):
    """The same blocks with the grid written out."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        x = straight_through(x.float())
        for block in self.blocks:
            branch = block.branch(x).float()
            x = x + (branch + ((branch * 65536).round() / 65536 - branch).detach())
        return x


class Net(nn.Module):
    def __init__(self, how, blocks=4, channels=3, head=True):
        super().__init__()
        self.stem = nn.Sequential(layer.Conv2d(2, channels, 3, padding=1), layer.BatchNorm2d(channels))
        self.blocks = nn.Sequential(*(Block(channels, how) for _ in range(blocks)))
        self.head = nn.Sequential(neuron.IFNode(), layer.Conv2d(channels, 4, 1)) if head else nn.Identity()
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def build(how, device, **sizes):
    torch.manual_seed(0)
    return Net(how, **sizes).to(device)


def batch(device, *shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (3, 2, 2, 5, 7))).mul_(2).to(device).requires_grad_()


def gradients(model, x, loss=lambda out: out.square().sum()):
    functional.reset_net(model)
    out = model(x)
    inputs = [x, *model.parameters()]
    grads = torch.autograd.grad(loss(out), inputs, allow_unused=True)
    return [out.detach(), *grads, *(b.clone() for b in model.buffers())]


def equal(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("how", ["branch + x", "x + branch", "branch += x", "x += branch"])
@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize("shape", [(3, 2, 2, 5, 7), (1, 1, 2, 4, 4), (2, 0, 2, 4, 4)])
def test_gradients_are_those_of_the_grid_written_out(how, mode, shape, device):
    reference = build(how, device)
    reference.blocks = Reference(reference.blocks)
    model = srp.convert_to_reversible(build(how, device), mode=mode, arithmetic="grid")
    # Written into a bfloat16 branch, the sum is off the grid, as it would be without a conversion.
    for dtype in (None, *([torch.bfloat16] if how != "branch += x" else [])):
        with torch.autocast(device, dtype, enabled=dtype is not None):
            expected = gradients(reference, batch(device, *shape))
            found = gradients(model, batch(device, *shape))
        equal(expected, found)


def zoo(name, device):
    torch.manual_seed(0)
    settings = {"T": 2, "num_classes": 5, "stem_kernel_size": 3, "stem_stride": 1, "layers": (3, 2, 1)}
    if name == "ms":
        return ms_resnet.MSResNet(base_channels=4, **settings).to(device)
    return masnn.AttMSResNet(base_channels=16, **settings).to(device)


def grid_forward(self, x):
    """`_MSBlock.forward` of SpikingJelly with the grid written out."""
    identity = straight_through(x) if self.downsample is None else self.downsample(x)
    x = identity if self.downsample is None else x
    out = self.bn1(self.conv1(self.spike1(x)))
    out = self.bn2(self.conv2(self.spike2(out)))
    out = self.attention(out) if hasattr(self, "attention") else out
    return identity + (out if self.downsample is not None else straight_through(out))


@pytest.mark.parametrize("name", ["ms", "attention"])
def test_the_zoo_on_the_grid(name, device, monkeypatch):
    model, reference = zoo(name, device), zoo(name, device)
    for module in model.modules():
        if hasattr(module, "bn2"):
            nn.init.constant_(module.bn2.weight, 0.7)
    reference.load_state_dict(model.state_dict())
    srp.convert_to_reversible(model, arithmetic="grid")
    x = batch(device, 2, 2, 3, 8, 8)
    torch.manual_seed(2)  # the attention has dropout
    found = gradients(model, x)
    for block in {type(m) for m in reference.modules() if hasattr(m, "spike2")}:
        monkeypatch.setattr(block, "forward", grid_forward)
    torch.manual_seed(2)
    equal(gradients(reference, x), found)


def test_a_block_whose_sum_is_of_spikes_needs_no_grid(device):
    def make():
        torch.manual_seed(0)
        model = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=neuron.IFNode, num_classes=3).to(device)
        functional.set_step_mode(model, "m")
        return model

    x = batch(device, 2, 1, 3, 16, 16)
    equal(gradients(make(), x), gradients(srp.convert_to_reversible(make()), x))
    with pytest.raises(ValueError, match="no neuron of the model can run on the grid"):
        srp.convert_to_reversible(make(), arithmetic="grid")


class Stepped(nn.Module):
    """A network with a neuron after it that is stepped, so that something of it can run on the grid."""

    def __init__(self, model):
        super().__init__()
        self.model, self.neuron = model, neuron.LIFNode(v_threshold=0.1)

    def forward(self, x):
        return self.neuron(self.model(x))


def test_sums_of_spikes_inside_attention_and_mlp_stay_as_they_are(device):
    """Spikformer's branches end in neurons: rounded to the grid, each of their sums would be held."""

    def outcome(arithmetic):
        torch.manual_seed(0)
        sizes = {"embed_dims": 32, "num_heads": 2, "depths": 3, "num_classes": 4}
        former = spikformer.Spikformer(T=2, img_size_h=16, img_size_w=16, patch_size=4, **sizes)
        model = Stepped(former)
        srp.convert_to_reversible(model.to(device), arithmetic=arithmetic)
        x = batch(device, 2, 3, 16, 16).detach()

        def step():
            functional.reset_net(model)
            return model(x).square().sum()

        step().backward()
        return count_step(step)[0], [p.grad for p in model.parameters()]

    by_default, expected = outcome("auto")
    held, found = outcome("grid")
    assert held == by_default
    equal(expected, found)


def test_which_blocks_of_transformers_carry_a_membrane(device):
    from snn_reversible_plugin.blocks.streams_on_grid import carries_a_membrane

    sizes = {"T": 2, "num_classes": 4, "embed_dims": 32, "depths": (1, 1, 1)}
    spikes = qkformer.QKFormer(num_heads=(1, 1, 1), **sizes).to(device)
    assert not any(map(carries_a_membrane, spikes.modules()))
    for cifar in (False, True):  # the attention ends in spikes or not, the MLP after it never does
        floats = maxformer.MaxFormer(cifar=cifar, **sizes).to(device)
        assert all(carries_a_membrane(block) for stage in ("stage1", "stage2", "stage3")
                   for block in getattr(floats, stage))  # fmt: skip


@pytest.mark.slow
def test_held_memory_does_not_grow_by_a_stream_a_block(device):
    def held(blocks, arithmetic):
        model = build("branch + x", device, blocks=blocks, channels=4)
        srp.convert_to_reversible(model, arithmetic=arithmetic)
        x = batch(device, 4, 4, 2, 16, 16).detach()

        def step():
            functional.reset_net(model)
            return model(x).sum()

        step().backward()
        return count_step(step)[0]

    stream = 4 * 4 * 4 * 16 * 16 * 4
    by_block = (held(14, "grid") - held(4, "grid")) / 10
    assert by_block < 0.1 * stream  # spikes, a bit an element, and no copy
    assert held(30, "grid") < held(30, "stock") - 3 * stream  # there one stream in a few blocks is kept


def test_evaluation_is_the_same_function(device):
    model = srp.convert_to_reversible(build("branch += x", device), arithmetic="grid").eval()
    x = batch(device)
    trained = model(x)
    functional.reset_net(model)
    with torch.no_grad():
        evaluated = model(x)
    assert torch.equal(trained, evaluated)
    functional.reset_net(model)
    with srp.stock(model), torch.no_grad():
        assert not torch.equal(model.blocks(model.stem(x)), evaluated)


def test_a_second_backward_and_a_partial_one(device):
    def outcome(model):
        x = batch(device)
        functional.reset_net(model)
        hidden = model.stem(x)
        first = model.blocks[:2](hidden) if isinstance(model.blocks, nn.Sequential) else None
        if first is None:
            first = Reference(model.blocks.blocks[:2])(hidden)
            out = model.head(Reference(model.blocks.blocks[2:])(first))
        else:
            out = model.head(model.blocks[2:](first))
        parts = [*torch.autograd.grad(out.sum(), first, retain_graph=True)]
        parts += torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        parts += torch.autograd.grad(out.sum(), [x, *model.parameters()])
        return parts

    reference = build("branch + x", device)
    reference.blocks = Reference(reference.blocks)
    expected = outcome(reference)
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    with srp.reversible(model):
        equal(expected, outcome(model))


def test_membranes_read_before_the_backward(device):
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    twin = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    loss = model(batch(device)).sum()
    early = [m.v.clone() for m in model.modules() if isinstance(m, neuron.BaseNode)]
    loss.backward()
    twin(batch(device)).sum().backward()
    late = [m.v for m in twin.modules() if isinstance(m, neuron.BaseNode)]
    equal(early, late)
    equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


class Reads(nn.Module):
    """A branch that is made of its input without a spike between."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(layer.BatchNorm2d(3), nn.Tanh(), neuron.IFNode(), layer.Conv2d(3, 3, 1))
        self.direct = nn.Parameter(torch.tensor(0.3))

    def residual_branches(self):
        return None

    def forward(self, x):
        return x + x * self.direct + self.branch(x)


def test_a_branch_that_leads_back_to_the_stream_keeps_it(device):
    from snn_reversible_plugin.blocks.streams_on_grid import OnGrid

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(layer.Conv2d(2, 3, 1), Reads(), Reads(), layer.Conv2d(3, 2, 1)).to(device)
        functional.set_step_mode(model, "m")
        return model

    def on_grid(model):
        for block in (model[1], model[2]):
            swap(block, swapped_class(OnGrid, Reads))
            NAME.set(block, "a block")
        return model

    expected = gradients(on_grid(make()), batch(device))
    equal(expected, gradients(on_grid(srp.convert_to_reversible(make())), batch(device)))


def test_a_stream_that_leaves_the_grid_is_named(device):
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    with torch.no_grad():
        model.blocks[2].branch[2].weight.fill_(1000.0)
    loss = model(batch(device)).sum()
    with pytest.raises(OverflowError, match=r"blocks\.\d reaches .* below 256"):
        loss.backward()


def test_an_exception_in_a_block_leaves_nothing_behind(device):
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    with srp.reversible(model):
        with pytest.raises(RuntimeError):
            model.blocks(torch.randn(2, 1, 9, 4, 4, device=device))
        assert not tape.current()._rules
    assert tape.current() is None
    equal(
        gradients(model, batch(device)),
        gradients(srp.convert_to_reversible(build("branch + x", device), arithmetic="grid"), batch(device)),
    )


def test_only_what_is_a_sum_is_touched_and_restore_undoes_it(device):
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    x = batch(device)
    with srp.reversible(model):
        hidden = model.stem(x)
        assert not isinstance(look_up(hidden), Stream)
        assert isinstance(look_up(model.blocks(hidden)), Stream)
        assert not isinstance(look_up(hidden + hidden), Stream)
    restored = srp.restore(srp.convert_to_reversible(build("branch + x", device), arithmetic="grid"))
    equal(gradients(build("branch + x", device), x), gradients(restored, x))
    srp.restore(model)
    assert all(type(block) is Block and NAME.of(block) is None for block in model.blocks)


def test_check_mode_compares_what_is_undone(device):
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    with srp.reversible(model, check=True):
        loss = model(batch(device)).sum()
    loss.backward()


def test_the_report_says_which_arithmetic_holds(device):
    model = srp.convert_to_reversible(build("branch + x", device), arithmetic="grid")
    text = str(srp.memory_report(model, batch(device).detach()).to_dict())
    assert "residual sums undone in the backward, grid arithmetic" in text
