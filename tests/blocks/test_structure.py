"""Residual blocks found by the graph of their forward: as their authors write them, and look-alikes."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from benchmarks.published import FAMILIES
from snn_reversible_plugin.blocks.structure import sums_of
from snn_reversible_plugin.blocks.wrapped import run_plainly, wrapped_chains
from snn_reversible_plugin.modules.registry import StaysStock

CHANNELS = 4


def node():
    return neuron.IFNode(step_mode="m", detach_reset=True)


def conv():
    return layer.SeqToANNContainer(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.sn1, self.conv2, self.sn2 = conv(), node(), conv(), node()
        self.downsample, self.connect, self.shortcut = None, "ADD", nn.Sequential()
        self.scale = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.5))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("offset", torch.ones(CHANNELS, 1, 1))
        self.calls = 0

    def membrane(self, x):
        return self.conv2(self.sn2(self.conv1(self.sn1(x))))


class SEW(Parts):
    def forward(self, x):
        identity = x
        out = self.sn1(self.conv1(x))
        out = self.sn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        if self.connect == "ADD":
            out += identity
        elif self.connect == "IAND":
            out = identity * (1.0 - out)
        return out


class MS(Parts):
    def forward(self, x):
        return self.membrane(x) + self.shortcut(x)


class PreAct(Parts):
    def forward(self, x, hook=None):
        T, B, C, H, W = x.shape
        out = self.membrane(x.reshape(T, B, C, H, W))
        if hook is not None:
            hook["out"] = out
        return torch.add(x, out)


class Cloned(Parts):
    def forward(self, x):
        before = x.clone()
        return self.membrane(x).add_(before)


class Halves(Parts):
    def forward(self, x):
        T, B, _, H, W = x.shape
        x = x + self.conv1(self.sn1(x)) * self.scale
        return x + self.conv2(self.sn2(x)).reshape(T, B, -1, H, W)


class Inner(Parts):
    """Adds its shortcut inside parts of its own."""

    class Half(nn.Module):
        def __init__(self, sn, conv):
            super().__init__()
            self.sn, self.conv = sn, conv

        def forward(self, x):
            identity = x
            return self.conv(self.sn(x)) + identity

    def __init__(self):
        super().__init__()
        del self.conv1, self.conv2, self.sn1, self.sn2, self.scale
        self.attn, self.mlp = self.Half(node(), conv()), self.Half(node(), conv())

    def forward(self, x):
        return self.mlp(self.attn(x))


FOUND = {
    SEW: "sn2(conv2(sn1(conv1(x)))) + x",
    MS: "conv2(sn2(conv1(sn1(x)))) + x",
    PreAct: "x + conv2(sn2(conv1(sn1(x.reshape(",
    Cloned: "conv2(sn2(conv1(sn1(x)))).add_(x)",
    Halves: "x + conv1(sn1(x)) * scale + conv2(sn2(",
    Inner: "mlp_conv(mlp_sn(",
}


def randomized(block):
    """Not as it is made: norms at work."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 2.0)
    return block


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_block_is_the_sums_that_were_found(kind, training):
    block = randomized(kind())
    found = sums_of(block)
    assert found is not None and not found.fires_after
    assert found.expression.startswith(FOUND[kind]) or kind is Inner
    stock, twin = copy.deepcopy((block, found))
    stock.train(training)
    twin = [copy.deepcopy(branch).train(training) for branch in found.branches]
    x = torch.randn(3, 2, CHANNELS, 5, 5) * 2
    expected = stock(x.clone())
    for branch in twin:
        x = x + branch(x)
    assert torch.equal(expected, x)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_chains_of_them_train_as_a_plain_run(kind):
    model = nn.Sequential(
        layer.Conv2d(3, CHANNELS, 3, padding=1, step_mode="m"), *(randomized(kind()) for _ in range(4))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = srp.wrap_residual_blocks(model, dry_run=True)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert len(plan.wrapped) == 4 and all("x" in block.why for block in plan.blocks)
    srp.wrap_residual_blocks(model)
    assert list(model.state_dict()) == list(before)
    plain = copy.deepcopy(model)
    x = torch.randn(3, 2, 3, 5, 5) * 2
    outcomes = []
    for net, around in ((model, None), (plain, run_plainly(plain))):
        functional.reset_net(net)
        if around is None:
            out = net(x)
        else:
            with around:
                out = net(x)
        out.square().mean().backward()
        outcomes.append([out, *(p.grad for p in net.parameters()), *net.buffers()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    srp.unwrap_residual_blocks(model)
    assert type(model[1]) is kind and not wrapped_chains(model)


class FiresAfter(Parts):
    def forward(self, x):
        return self.sn2(self.conv2(self.sn1(self.conv1(x))) + x)


def test_a_neuron_behind_the_sum():
    block = FiresAfter()
    found = sums_of(block)
    assert found is not None and found.fires_after
    twin, other = copy.deepcopy(block), copy.deepcopy(block)
    x = torch.randn(3, 2, CHANNELS, 5, 5)
    assert torch.equal(found.branches[0](x), twin.sn2(twin.conv2(twin.sn1(twin.conv1(x)))))
    report = srp.wrap_residual_blocks(nn.Sequential(block, other), dry_run=True)
    assert all("fires before the addition" in one.why for one in report.blocks)


class CallsAside(Parts):
    """A norm that is run for its statistics alone."""

    def forward(self, x):
        self.conv2(x)
        return x + self.conv1(self.sn1(x))


def test_a_part_that_runs_is_not_left_out():
    """One that never runs, as the norms of published transformers, stays where it is in the module tree."""
    report = srp.wrap_residual_blocks(nn.Sequential(CallsAside(), CallsAside()), dry_run=True)
    assert not report.chains
    assert all(
        block.why.startswith("it does more than add its branch: conv2.0.weight") for block in report.blocks
    )


class Scaled(Parts):
    def forward(self, x):
        return self.conv1(x) + self.conv2(x)


class Parallel(Parts):
    """The second sum's branch is computed from the input, not from the first sum."""

    def forward(self, x):
        return x + self.conv1(self.sn1(x)) + self.conv2(self.sn2(x))


class InEvaluation(Parts):
    def forward(self, x):
        return x + (self.membrane(x) if self.training else self.conv1(x))


class Tuple(Parts):
    def forward(self, x):
        out = self.membrane(x)
        return out, x + out


class InAList(Parts):
    def forward(self, x):
        out = self.membrane(x)
        return [x + out, out]


class InPlace(Parts):
    """What it adds is not what the convolution gave."""

    def forward(self, x):
        out = self.membrane(x)
        out.mul_(0.5)
        return out + x


class IntoItsInput(Parts):
    def forward(self, x):
        return x + self.conv1(x.relu_())


class ReadsABuffer(Parts):
    def forward(self, x):
        return x + self.membrane(x) * self.offset


class Unknown(Parts):
    class Fire(nn.Module):
        def forward(self, x):
            return (x > 0).to(x.dtype)

    def __init__(self):
        super().__init__()
        self.fire = self.Fire()

    def forward(self, x):
        return self.fire(self.membrane(x) + x)


WHY = {
    Scaled: "its shortcut is not the identity",
    Parallel: "its shortcut is not the identity",
    InEvaluation: "it computes otherwise in evaluation than in training",
    Tuple: "it gives more than its sum",
    InAList: "it gives more than its sum",
    InPlace: "it writes in place into what may be used again",
    IntoItsInput: "its branch writes into what it is given",
    ReadsABuffer: "it reads offset, which is no parameter",
    Unknown: "its sum goes through fire, which is no neuron that the converter knows",
}


@pytest.mark.parametrize("kind", WHY, ids=lambda kind: kind.__name__)
def test_look_alikes_stay_stock_and_the_report_says_why(kind):
    with pytest.raises(StaysStock, match=WHY[kind]):
        sums_of(kind())
    report = srp.wrap_residual_blocks(nn.Sequential(kind(), kind()), dry_run=True)
    assert not report.chains and all(block.why == WHY[kind] for block in report.blocks)


def test_a_connect_function_that_multiplies():
    block = SEW()
    block.connect = "IAND"
    assert sums_of(block) is None


class Counts(Parts):
    def forward(self, x):
        self.calls += 1
        return x + self.membrane(x)


class Tracks(Parts):
    def forward(self, x):
        self.seen.add_(1)
        return x + self.membrane(x)


class Resets(Parts):
    def forward(self, x):
        functional.reset_net(self.sn1)
        return x + self.membrane(x)


class Keeps(Parts):
    def forward(self, x):
        self.last = self.membrane(x)
        return x + self.last


class HalfWithoutGradient(Parts):
    def forward(self, x):
        with torch.no_grad():
            gate = self.conv2(x)
        return x + self.conv1(x) * gate


class HalfInAutocast(Parts):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = self.membrane(x)
        return x + out


class Collects(Parts):
    def __init__(self):
        super().__init__()
        self.rates = []

    def forward(self, x):
        out = self.membrane(x)
        self.rates.append(out)
        return x + out


NO_GRAPH = [Collects, Counts, Tracks, Resets, Keeps, HalfWithoutGradient, HalfInAutocast]


@pytest.mark.parametrize("kind", NO_GRAPH, ids=lambda kind: kind.__name__)
def test_a_forward_that_does_more_than_compute_is_not_traced(kind):
    block = kind()
    block.sn1.v = 0.25
    with torch.random.fork_rng():
        assert sums_of(block) is None
    assert block.sn1.v == 0.25 and block.calls == 0 and not block.seen and not hasattr(block, "last")


def test_a_graph_that_a_sample_contradicts(monkeypatch):
    from snn_reversible_plugin.blocks import residual

    def wrong(block):
        found = sums_of(block)
        return None if found is None else found._replace(branches=[nn.Identity()])

    monkeypatch.setattr(residual, "sums_of", wrong)
    report = srp.wrap_residual_blocks(nn.Sequential(randomized(MS()), randomized(MS())), dry_run=True)
    assert not report.chains
    assert report.blocks[0].why.startswith("on a sample it is not conv2(sn2(conv1(sn1(x)))) + x")


class Broadcast(Parts):
    def forward(self, x):
        return x + self.conv1(x.mean((-1, -2), keepdim=True))


def test_a_branch_that_is_broadcast():
    report = srp.wrap_residual_blocks(nn.Sequential(Broadcast(), Broadcast()), dry_run=True)
    assert not report.chains and "one shape" in report.blocks[0].why
    assert "x + conv1(x.mean((-1, -2), keepdim=True))" in report.blocks[0].why


class PaddedNorm(nn.Module):
    """Pads with what a zero is after the norm, read off its running statistics."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        out = nn.functional.pad(self.bn(x), [1] * 4)
        zero = -self.bn.running_mean / torch.sqrt(self.bn.running_var + self.bn.eps)
        out[..., :1, :] = out[..., -1:, :] = zero.view(-1, 1, 1)
        return out


@pytest.mark.parametrize("calls", [1, 3])
def test_a_branch_that_reads_running_statistics(calls):
    def branch():
        return nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1), PaddedNorm(), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 3)
        )

    outcomes = []
    for reversible in (True, False):
        torch.manual_seed(0)
        chain = srp.RevSSequence([srp.RevSBlock(branch(), branch(), dim=1) for _ in range(3)])
        chain.reversible = reversible
        x = torch.randn(calls, 2, 2 * CHANNELS, 5, 5)
        sum(chain(step).square().mean() for step in x).backward()
        outcomes.append([*(p.grad for p in chain.parameters()), *chain.buffers()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


CHAINS = {
    "SEW-ResNet": 1, "MS-ResNet": 1, "Att-MS-ResNet": 1, "Spikformer": 2, "Spikingformer": 2, "QKFormer": 3,
    "Spike-driven Transformer V2": 3, "Spike-driven Transformer V3": 3, "StereoSpike": 1,
}  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.filterwarnings("ignore:.*has no spiking neuron that the converter knows")
def test_published_networks(name):
    family = FAMILIES[name]
    try:
        model = family.network()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    report = srp.wrap_residual_blocks(model)
    assert sum(map(len, report.chains)) == CHAINS[name]
    plain, x, outcomes = copy.deepcopy(model), family.batch(), []
    for net in (model, plain):
        torch.manual_seed(1)
        if net is plain:
            with run_plainly(net):
                loss = family.loss(net, x)
        else:
            loss = family.loss(net, x)
        loss.backward()
        outcomes.append([loss, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
