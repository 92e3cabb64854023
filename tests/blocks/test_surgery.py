"""Surgery on the frameworks' own networks: the same parameters in reversible chains, and back."""

import copy
import io
import json
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import snn_reversible_plugin as srp
from against_stock import make_fire, reset
from snn_reversible_plugin.blocks.wrapped import Wrapped, wrapped_chains
from snn_reversible_plugin.reports.measure import count_step
from tests.spikingjelly.test_zoo import FIVE, IF, LIF, SMALL, ZOO, multi_step
from two_processes import together

snntorch = pytest.importorskip("snntorch")
from spikingjelly.activation_based import functional, neuron  # noqa: E402
from spikingjelly.activation_based.model import (  # noqa: E402
    masnn,
    maxformer,
    ms_resnet,
    sew_resnet,
    spikformer,
    spiking_resnet,
)

MORE = {
    "sew_resnet34 LIF": (lambda: sew_resnet.sew_resnet34(**FIVE, cnf="ADD", **LIF), (2, 1, 3, 32, 32)),
    "spiking_resnet34 LIF": (lambda: spiking_resnet.spiking_resnet34(**FIVE, **LIF), (2, 1, 3, 32, 32)),
    "ms_resnet34": (lambda: ms_resnet.ms_resnet34(**FIVE), (2, 1, 3, 32, 32)),
    "AttMSResNet": (
        lambda: masnn.AttMSResNet(
            T=2, layers=(3, 3, 3), base_channels=8, in_channels=3, reduction_c=4, **FIVE
        ),
        SMALL,
    ),
    "maxformer, square": (
        lambda: maxformer.MaxFormer(
            T=2, **FIVE, embed_dims=96, depths=(2, 1, 1), mlp_ratio=1.0, cifar=True
        ),
        SMALL,
    ),
}
MODELS = ZOO | MORE
TRAINED = [
    "sew_resnet18 ADD LIF",
    "sew_resnet50 ADD IF",
    "spiking_resnet50 IF",
    "spiking_resnet34 LIF",
    "ms_resnet34",
    "max_resnet18",
    "AttMSResNet",
    "spikformer",
    "maxformer",
    "maxformer, square",
    "qkformer",
]
CONVERTED = ("sew_resnet18 ADD LIF", "max_resnet18", "AttMSResNet", "spikformer", "maxformer, square")


def make(name):
    return multi_step(MODELS[name][0])()


def sew(blocks=(4, 1, 1, 1), cnf="ADD", kind=sew_resnet.BasicBlock):
    """A narrow network of the zoo's own class."""
    return multi_step(lambda: sew_resnet.SEWResNet(kind, blocks, num_classes=5, cnf=cnf, **LIF))()


def plainly(model):
    """A copy whose chains run without being reversed."""
    twin = copy.deepcopy(model)
    for wrapped in wrapped_chains(twin):
        wrapped.chain.reversible = False
    return twin


def train(model, x, steps=2, autocast=None):
    """Everything that training steps leave behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for number in range(steps):
        optimizer.zero_grad()
        reset(model)
        torch.manual_seed(number)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = model(leaf)
        out.float().square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        found += [out.detach(), leaf.grad, *grads]
        optimizer.step()
    return [*found, *(value.clone() for value in model.state_dict().values())]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def against_plain(model, x, **settings):
    plain = srp.restore(plainly(model))
    assert_same(train(model, x, **settings), train(plain, x, **settings))


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    ("name", "converted"),
    [*((name, False) for name in TRAINED), *((name, True) for name in TRAINED if name in CONVERTED)],
)
def test_gradients_are_those_of_the_plain_run(name, converted):
    model, x = make(name), torch.rand(MODELS[name][1]) * 2
    assert srp.wrap_residual_blocks(model).wrapped
    for wrapped in wrapped_chains(model):
        wrapped.chain.check = True
    plain = plainly(model)
    if converted:
        srp.convert_to_reversible(model)
    steps = 2 if name in CONVERTED else 1
    assert_same(train(model, x, steps), train(plain, x, steps))
    assert all(wrapped.chain.last_rebuild.flipped_bits == 0 for wrapped in wrapped_chains(model))
    branches = [b for wrapped in wrapped_chains(model) for b in wrapped.branches()]
    gradients = [p.grad.abs().sum() for branch in branches for p in branch.parameters()]
    assert sum(g > 0 for g in gradients) > 0.9 * len(gradients)


def snapped(z):
    return (z * 65536).round() / 65536


def chained(x, branches):
    """The wrapped function, written out: two streams from one, branches in turn, the mean of both."""
    streams = [snapped(x), snapped(x)]
    for turn, branch in enumerate(branches):
        streams[turn % 2] = streams[turn % 2] + snapped(branch(streams[1 - turn % 2]))
    return (streams[0] + streams[1]) / 2


def basic(b, x):
    return b.sn2(b.bn2(b.conv2(b.sn1(b.bn1(b.conv1(x))))))


def bottleneck(b, x):
    return b.sn3(b.bn3(b.conv3(b.sn2(b.bn2(b.conv2(b.sn1(b.bn1(b.conv1(x)))))))))


def membrane(b, x):
    return b.bn2(b.conv2(b.spike2(b.bn1(b.conv1(b.spike1(x))))))


def tokens(b, x):
    yield lambda y: b.attn(y.flatten(3)).view_as(y)
    yield lambda y: b.mlp(y.flatten(3)).view_as(y)


@pytest.mark.parametrize("kind", ["sew", "sew bottleneck", "spiking", "spiking bottleneck", "ms", "former"])
def test_forward_by_hand(kind):
    c = 8
    forward = membrane if kind == "ms" else bottleneck if "bottleneck" in kind else basic
    if kind == "ms":
        blocks = [ms_resnet._MSBlock(c, c, 1, None) for _ in range(4)]
    elif kind == "former":
        blocks = [spikformer.SpikformerBlock(c, 2) for _ in range(3)]
    else:
        module = sew_resnet if "sew" in kind else spiking_resnet
        of = module.Bottleneck if "bottleneck" in kind else module.BasicBlock
        more = {"cnf": "ADD"} if "sew" in kind else {}
        blocks = [of(c, c // of.expansion, spiking_neuron=neuron.LIFNode, **more) for _ in range(4)]
    model = make_fire(nn.Sequential(*blocks))
    functional.set_step_mode(model, "m")
    x = torch.randn(3, 2, c, 5, 5)
    if kind == "former":
        branches = [branch for block in model for branch in tokens(block, x)]
    else:
        branches = [lambda y, b=b: forward(b, y) for b in model]
    expected = chained(x, branches)
    reset(model)
    stock = copy.deepcopy(model)
    assert srp.wrap_residual_blocks(model).wrapped == tuple("0123"[: len(blocks)])
    assert torch.equal(model(x), expected)
    assert not torch.equal(stock(x), expected)


def test_a_block_alone_and_one_left_over_compute_what_they_did():
    model = sew((3, 2, 1, 1))
    x = torch.randn(2, 1, 64, 6, 6).relu().round()
    left, before = model.layer1[2], copy.deepcopy(model.layer1[2])
    report = srp.wrap_residual_blocks(model)
    assert report.chains == ((("layer1.0", "layer1.1"),),)
    assert type(left) is sew_resnet.BasicBlock and torch.equal(left(x), before(x))
    reasons = {block.name: block.why for block in report.blocks if block.outcome == "stock"}
    assert reasons["layer1.2"].startswith("left over") and reasons["layer2.1"].startswith("alone")
    assert "shape" in reasons["layer2.0"]


def attributes(model):
    return [(id(module), type(module), set(module.__dict__)) for module in model.modules()]


def test_a_dry_run_touches_nothing_and_tells_what_happens():
    model = make("sew_resnet50 ADD IF")
    before = attributes(model)
    plan = srp.wrap_residual_blocks(model, dry_run=True)
    assert attributes(model) == before and plan.dry_run
    done = srp.wrap_residual_blocks(model)
    assert (done.blocks, done.chains) == (plan.blocks, plan.chains)
    assert plan.wrapped[:2] == ("layer1.1", "layer1.2")
    assert len(plan.blocks) == 16 and len(plan.wrapped) == 10


def test_the_report_as_data_and_as_a_table(capsys):
    report = srp.wrap_residual_blocks(sew((2, 1, 1, 2), kind=sew_resnet.Bottleneck), dry_run=True)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["blocks"][0] == {
        "name": "layer1.0",
        "type": "Bottleneck",
        "outcome": "stock",
        "why": "its shortcut is not the identity: it changes the shape",
    }
    assert "Fine-tune" in data["meaning"] and data["bits"] == 16
    report.print()
    assert "Nothing to wrap" in capsys.readouterr().out
    srp.wrap_residual_blocks(make("spiking_resnet50 IF"), dry_run=True).print()
    printed = " ".join(capsys.readouterr().out.split())
    assert "a plan" in printed and "fires before the addition" in printed and "Fine-tune" in printed
    with pytest.raises(AttributeError):
        report.bits = 3


def test_parameters_keys_and_weights_stay():
    model = sew()
    stock = copy.deepcopy(model)
    names, parameters = list(model.state_dict()), list(model.parameters())
    modules = list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    srp.wrap_residual_blocks(model)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    branch = wrapped_chains(model)[0].branches()[1]
    assert branch[0] is model.layer1[1].conv1
    before = model.layer1[1].conv1.weight.detach().clone()
    model(torch.rand(2, 2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.layer1[1].conv1.weight, before)
    stock.load_state_dict(model.state_dict())
    fresh = sew()
    srp.wrap_residual_blocks(fresh)
    fresh.load_state_dict(stock.state_dict())
    x = torch.rand(2, 2, 3, 32, 32)
    for twin in (model, fresh):
        reset(twin.eval())
    assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize("converted", [False, True])
def test_unwrapping_gives_the_stock_network(converted):
    model, x = sew(), torch.rand(2, 2, 3, 32, 32)
    twin = copy.deepcopy(model)
    before = attributes(model)
    srp.wrap_residual_blocks(model)
    if converted:
        srp.convert_to_reversible(model, skip=("layer1.1",))
        assert srp.restore(model) is model
        assert isinstance(model.layer1[0], Wrapped)  # what the user wrapped, restore keeps
        srp.convert_to_reversible(model, skip=("layer1.1",))
    assert srp.unwrap_residual_blocks(model) is model
    srp.restore(model)
    assert attributes(model) == before
    assert_same(train(model, x), train(twin, x))
    assert srp.unwrap_residual_blocks(model) is model


def test_wrapping_twice_is_wrapping_once():
    model = sew()
    first = srp.wrap_residual_blocks(model)
    chain = wrapped_chains(model)
    second = srp.wrap_residual_blocks(model)
    assert wrapped_chains(model) == chain and second.chains == first.chains
    assert second.wrapped == first.wrapped
    assert {block.why for block in second.blocks if block.outcome == "wrapped"} == {"already"}


@pytest.mark.slow
def test_held_memory_falls_and_does_not_grow_with_depth():
    def held(depth, wrap, states="carry"):
        blocks = [ms_resnet._MSBlock(16, 16, 1, None) for _ in range(depth)]
        model = make_fire(nn.Sequential(*blocks))
        if wrap:
            srp.wrap_residual_blocks(model, states=states)
        x = torch.randn(4, 4, 16, 16, 16, requires_grad=True)

        def loss():
            reset(model)
            return model(x).sum()

        return count_step(loss)[0]

    state = 4 * 16 * 16 * 16 * 4 * 2  # each block's two neurons leave their last membrane
    assert held(8, True) < held(8, False) / 8
    assert held(16, True) - held(8, True) <= 8 * state * 1.02
    assert held(16, False) - held(8, False) > 8 * 10 * state
    assert held(16, True, "reset") <= held(8, True, "reset") * 1.02


def test_states_that_are_reset():
    model, x = sew(), torch.rand(2, 2, 3, 32, 32)
    srp.wrap_residual_blocks(model, states="reset")
    carrying = sew()
    carrying.load_state_dict(model.state_dict())
    srp.wrap_residual_blocks(carrying)
    assert_same(train(model, x), train(carrying, x))
    assert model.layer1[2].sn1.v == 0.0 and carrying.layer1[2].sn1.v.shape


class Body(nn.Module):
    """A user's block, called once a time step, that says what its branch is."""

    def __init__(self, width=6):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.lif = snntorch.Leaky(beta=0.8, init_hidden=True, learn_beta=True, threshold=0.3)

    def forward(self, x):
        return x + self.lif(self.fc(x))


class Speaking(Body):
    def residual_branches(self):
        return nn.Sequential(self.fc, self.lif)


class Stepped(nn.Module):
    def __init__(self, block, depth=4):
        super().__init__()
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))

    def forward(self, x):
        return torch.stack([self.blocks(step) for step in x])


def reset_snntorch(model):
    for module in model.modules():
        if hasattr(module, "reset_mem"):
            module.reset_mem()


@pytest.mark.parametrize("how", ["method", "matcher"])
def test_snntorch_blocks_of_the_user(how):
    def matcher(module):
        return nn.Sequential(module.fc, module.lif) if isinstance(module, Body) else None

    model = Stepped(Speaking if how == "method" else Body)
    report = srp.wrap_residual_blocks(model, matcher=None if how == "method" else matcher)
    assert report.chains == ((("blocks.0", "blocks.1"), ("blocks.2", "blocks.3")),)
    x = torch.randn(5, 3, 6)
    against_plain(model, x)
    reset_snntorch(model)
    out = model(x)
    reset_snntorch(model)
    expected = [chained(s, [lambda y, b=b: b.lif(b.fc(y)) for b in model.blocks]) for s in x]
    assert torch.equal(out, torch.stack(expected))


def test_a_zoo_network_stepped_one_time_step_at_a_time():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_fire(sew_resnet.sew_resnet18(**FIVE, cnf="ADD", **IF))

        def forward(self, x):
            return torch.stack([self.net(step) for step in x])

    model = Loop()
    srp.wrap_residual_blocks(model)
    against_plain(model, torch.rand(3, 2, 3, 32, 32))


def test_several_branches_of_one_block_and_a_list_of_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Body(), Body()

        def forward(self, x):
            return self.b(self.a(x))

        def residual_branches(self):
            return [nn.Sequential(body.fc, body.lif) for body in (self.a, self.b)]

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Speaking(), Two(), Speaking()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if x.isfinite().all() else x  # which no graph tells in advance
            return x

    model = Listed()
    plan = srp.wrap_residual_blocks(model, dry_run=True)
    assert not plan.wrapped and all("consecutive" in block.why for block in plan.blocks[:2])
    report = srp.wrap_residual_blocks(model, consecutive=["blocks"])
    assert report.chains == ((("blocks.0", "blocks.1: branch 0"), ("blocks.1: branch 1", "blocks.2")),)
    against_plain(model, torch.randn(3, 6))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = make("sew_resnet18 ADD LIF")
    srp.wrap_residual_blocks(model)
    x = torch.rand(2, 1, 3, 32, 32)  # one image: some CPUs have no fast products of these numbers
    against_plain(model, x, autocast=dtype)


def ddp_worker(rank):
    found = []
    for reversible in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(*(ms_resnet._MSBlock(6, 6, 1, None) for _ in range(4)))
        srp.wrap_residual_blocks(make_fire(model))
        model = model if reversible else plainly(model)
        twin = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(10 + rank)
        for _ in range(3):
            optimizer.zero_grad()
            reset(model)
            twin(torch.randn(3, 2, 6, 5, 5)).square().mean().backward()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    weights = nn.utils.parameters_to_vector(found[0])
    others = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(others, weights)
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return same and torch.equal(*others)


def test_two_processes(tmp_path):
    assert together(tmp_path, ddp_worker) == [True, True]


class TestRefusals:
    def why(self, model, name, **settings):
        before = attributes(model)
        report = srp.wrap_residual_blocks(model, dry_run=True, **settings)
        assert attributes(model) == before
        (found,) = (block for block in report.blocks if block.name == name)
        assert found.outcome == "stock" and name not in report.wrapped
        return found.why

    @pytest.mark.parametrize("cnf", ["AND", "IAND"])
    def test_connect_functions_that_multiply(self, cnf):
        assert repr(cnf) in self.why(sew(cnf=cnf), "layer1.0")

    def test_a_shape_that_changes(self):
        assert "changes the shape" in self.why(make("ms_resnet18"), "layer2.0")
        assert "changes the shape" in self.why(make("max_resnet18"), "layer2.0")

    def test_attention_that_holds_its_shortcut(self):
        assert "can't be run without" in self.why(make("spike-driven transformer"), "blocks.1")

    def test_modules_without_a_known_shortcut(self):
        assert "no known shortcut" in self.why(make("spikformer"), "patch_embed.stages.0")

    def test_hooks(self):
        model = sew()
        model.layer1[1].register_forward_hook(lambda *_: None)
        assert "the block has hooks" in self.why(model, "layer1.1")
        assert srp.wrap_residual_blocks(model).wrapped == ("layer1.2", "layer1.3")
        model = make("maxformer")
        model.stage2[0].mlp.register_forward_pre_hook(lambda *_: None)
        assert "mlp has hooks" in self.why(model, "stage2.0")

    def test_a_block_used_twice(self):
        model = sew()
        model.layer1[3] = model.layer1[0]
        assert "more than one place" in self.why(model, "layer1.0")
        assert srp.wrap_residual_blocks(model).wrapped == ("layer1.1", "layer1.2")

    @pytest.mark.parametrize("skip", ["layer1.0", "layer1.0.conv2", ["layer1.0.sn1"]])
    def test_skip(self, skip):
        model = sew()
        assert self.why(model, "layer1.0", skip=skip) == "named in skip"
        assert srp.wrap_residual_blocks(model, skip=skip).wrapped == ("layer1.1", "layer1.2")

    def test_a_type_in_skip(self):
        model = sew()
        assert srp.wrap_residual_blocks(model, skip=sew_resnet.BasicBlock).wrapped == ()
        with pytest.raises(ValueError, match="no module of that name"):
            srp.wrap_residual_blocks(model, skip="layer9")

    def test_a_forward_of_its_own(self):
        class Mine(sew_resnet.BasicBlock):
            def forward(self, x):
                return super().forward(x) * 2

        model = sew()
        model.layer1[0].forward = model.layer1[0].forward
        assert "forward was replaced" in self.why(model, "layer1.0")
        assert "no known shortcut" in self.why(sew(kind=Mine), "layer1.0")

    def test_a_block_that_does_more(self):
        class Scaled(Speaking):
            def __init__(self):
                super().__init__()
                self.gain = nn.Parameter(torch.ones(()))

        assert "gain would be left out" in self.why(nn.Sequential(Scaled(), Scaled()), "0")

    def test_blocks_that_nothing_runs_in_a_row(self):
        class Apart(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = Speaking(), Speaking()

        assert "runs in no nn.Sequential" in self.why(Apart(), "first")

    def test_a_sequence_with_something_between(self):
        model = nn.Sequential(Speaking(), nn.Identity(), Speaking())
        assert "alone" in self.why(model, "0")

    def test_a_model_without_residual_blocks(self):
        for name in ("spiking_vgg11 LIF", "MASNN"):
            model = make(name)
            assert srp.wrap_residual_blocks(model, dry_run=True).wrapped == ()
            with pytest.raises(ValueError, match="no residual block that is known"):
                srp.wrap_residual_blocks(model)

    def test_what_is_no_branch(self):
        model = nn.Sequential(Body(), Body())
        with pytest.raises(TypeError, match=r"0 \(Body\): a matcher or residual_branches gives a branch"):
            srp.wrap_residual_blocks(model, matcher=lambda module: 3 if isinstance(module, Body) else None)
        with pytest.raises(
            ValueError, match=r"0 \(Body\): the branch's parameter weight is not the block's"
        ):
            srp.wrap_residual_blocks(
                model, matcher=lambda module: nn.Linear(6, 6) if isinstance(module, Body) else None
            )
        with pytest.raises(ValueError, match="consecutive takes names"):
            srp.wrap_residual_blocks(model, consecutive=["0"])
        with pytest.raises(ValueError, match="bits must be"):
            srp.wrap_residual_blocks(model, bits=24)
        with pytest.raises(ValueError, match="states must be"):
            srp.wrap_residual_blocks(model, states="keep")
        with pytest.raises(TypeError, match=r"expected an nn\.Module"):
            srp.wrap_residual_blocks([])
        assert not wrapped_chains(model)


class TestRunning:
    """Wrapped blocks run one after another, each once, or say so."""

    @pytest.fixture
    def model(self):
        model = nn.Sequential(*(Speaking() for _ in range(4)))
        srp.wrap_residual_blocks(model)
        return model

    def test_out_of_order(self, model):
        x = torch.randn(2, 6)
        with pytest.raises(RuntimeError, match="from 0 to 3: block 2 was not called with the output"):
            model[2](model[0](x))
        with pytest.raises(RuntimeError, match="block 1 was not called"):
            model[1](x)
        with pytest.raises(RuntimeError, match="block 1 was not called"):
            model[1](model[0](x) + 1)
        model(x).sum().backward()

    def test_leaving_early(self, model):
        x = torch.randn(2, 6)
        with pytest.raises(RuntimeError, match="only 2 of 4 blocks were called"):
            model[:2](x).sum().backward()
        with pytest.warns(RuntimeWarning, match="only 2 of 4 blocks"):
            model(x)
        model(x).sum().backward()

    def test_a_module_replaced_since(self, model):
        model[1].lif = snntorch.Leaky(beta=0.5, init_hidden=True)
        with pytest.raises(RuntimeError, match="replaced, added or removed"):
            model(torch.randn(2, 6))
        srp.unwrap_residual_blocks(model)
        srp.wrap_residual_blocks(model)
        model(torch.randn(2, 6))

    def test_a_replica_as_data_parallel_makes_it(self, model):
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            model[0]._replicate_for_data_parallel()(torch.randn(2, 6))

    def test_an_exception_inside_a_branch_names_it(self, model):
        model[2].fc = torch.nn.utils.parametrizations.weight_norm(model[2].fc)
        with pytest.raises(RuntimeError, match="replaced, added or removed"):
            model(torch.randn(2, 6))

        class Shrinking(Speaking):
            def residual_branches(self):
                return nn.Sequential(self.fc, self.lif, nn.Flatten(0))

        wrong = nn.Sequential(Shrinking(), Shrinking())
        srp.wrap_residual_blocks(wrong)
        with pytest.raises(ValueError, match=r"block 0: f \(0\) returned a tensor of shape"):
            wrong(torch.randn(2, 6))

    def test_a_stream_that_leaves_the_grid(self, model):
        with pytest.raises(OverflowError, match=r"added to reaches|stream reaches"):
            model(torch.full((2, 6), 1000.0)).sum().backward()

    def test_inference(self, model):
        with torch.no_grad():
            assert model(torch.randn(2, 6)).grad_fn is None

    def test_compiled_later(self):
        model = nn.Sequential(*(Speaking() for _ in range(2)))
        x = torch.randn(2, 6)
        srp.wrap_residual_blocks(model)
        expected = model(x)
        reset_snntorch(model)
        assert torch.equal(torch.compile(model, backend="eager")(x), expected)


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.one_in(3)
def test_copies_stay_wrapped(copier, converted):
    model, x = sew(), torch.rand(2, 2, 3, 32, 32)
    if converted:
        srp.convert_to_reversible(model, blocks=True)
    else:
        srp.wrap_residual_blocks(model)
    model(x).sum().backward()
    functional.reset_net(model)
    model.zero_grad()
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    (ours,), (theirs,) = wrapped_chains(model), wrapped_chains(twin)
    assert theirs is not ours and theirs.blocks == tuple(twin.layer1)
    assert theirs.branches()[0][0] is twin.layer1[0].conv1
    assert_same(train(model, x), train(twin, x))
    assert type(srp.unwrap_residual_blocks(srp.restore(twin)).layer1[0]) is sew_resnet.BasicBlock


class TestConversion:
    def test_wraps_and_restore_undoes_it(self):
        model, x = sew(), torch.rand(2, 2, 3, 32, 32)
        twin, before = copy.deepcopy(model), attributes(model)
        keys = list(model.state_dict())
        assert srp.convert_to_reversible(model, blocks=True) is model
        assert isinstance(model.layer1[0], Wrapped) and list(model.state_dict()) == keys
        classes = [type(module) for module in model.modules()]
        srp.convert_to_reversible(model, blocks=True)
        assert [type(module) for module in model.modules()] == classes
        srp.convert_to_reversible(model)
        assert not wrapped_chains(model)
        srp.convert_to_reversible(model, blocks=True, mode="speed")
        srp.restore(model)
        assert attributes(model) == before
        assert_same(train(model, x), train(twin, x))

    def test_trains_as_the_wrapped_network_does(self):
        model, x = sew(), torch.rand(2, 2, 3, 32, 32)
        wrapped = copy.deepcopy(model)
        srp.convert_to_reversible(model, blocks=True)
        srp.wrap_residual_blocks(wrapped)
        assert_same(train(model, x), train(plainly(wrapped), x))

    def test_keeps_what_the_user_wrapped(self):
        model = nn.Sequential(Body(), Body())
        srp.wrap_residual_blocks(
            model, matcher=lambda m: nn.Sequential(m.fc, m.lif) if isinstance(m, Body) else None
        )
        srp.convert_to_reversible(model, blocks=True)
        srp.restore(model)
        assert len(wrapped_chains(model)) == 1

    def test_a_converted_network_can_be_wrapped(self):
        model, x = srp.convert_to_reversible(sew()), torch.rand(2, 2, 3, 32, 32)
        report = srp.wrap_residual_blocks(model)
        assert report.wrapped and report.blocks[0].type == "BasicBlock"
        against_plain(model, x)

    def test_verify_and_report_compare_with_the_plain_run(self):
        model, x = srp.convert_to_reversible(make("spikformer"), blocks=True), torch.rand(2, 3, 32, 32)
        verification = srp.verify(model, x, repeats=1)
        assert verification.ok and verification.spikes > 0
        report = srp.memory_report(model, x)
        assert report.converted.held < report.stock.held / 4
        with srp.stock(model):
            assert not wrapped_chains(model)[0].chain.reversible
            assert isinstance(model.blocks[0], Wrapped)
        assert wrapped_chains(model)[0].chain.reversible
        assert any(row.name == "blocks.0" for row in report.modules)

    def test_skip_holds_for_both(self):
        model = srp.convert_to_reversible(sew(), blocks=True, skip=("layer1.0.sn1",))
        (wrapped,) = wrapped_chains(model)
        assert wrapped.blocks == (model.layer1[1], model.layer1[2])

    def test_where_nothing_can_be_wrapped(self):
        model = make("ms_resnet18")
        with pytest.warns(UserWarning, match=r"no block can be wrapped \(layer1.0: .*shape"):
            srp.convert_to_reversible(model, blocks=True)
        vgg = make("spiking_vgg11 LIF")
        before = attributes(vgg)
        with pytest.raises(ValueError, match="no residual block"):
            srp.convert_to_reversible(vgg, blocks=True)
        assert attributes(vgg) == before
        with (
            pytest.warns(UserWarning, match="no spiking neuron"),
            pytest.raises(ValueError, match="no residual block"),
        ):
            srp.convert_to_reversible(nn.Sequential(nn.Linear(2, 2)), blocks=True)
