"""The contracts of conversion: what it changes, what it must not, and what it refuses."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import snn_reversible_plugin as srp
from against_stock import assert_trains_like_stock, reset, step
from snn_reversible_plugin import tape
from snn_reversible_plugin.convert import settings_of

neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import functional, layer, surrogate  # noqa: E402


class Net(nn.Module):
    """Functional operations between the modules, a shared neuron, one used twice a step."""

    def __init__(self):
        super().__init__()
        self.conv1 = layer.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn1 = layer.BatchNorm2d(8)
        self.lif1 = neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.conv2 = layer.Conv2d(16, 8, 3, padding=1)
        self.shared = neuron.IFNode(v_reset=None)
        self.also_shared = self.shared
        self.plif = neuron.ParametricLIFNode(decay_input=False, detach_reset=True)
        self.dropout = layer.Dropout(0.3)
        self.fc = layer.Linear(8 * 16, 5)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        s = self.lif1(self.bn1(self.conv1(x)))
        s = functional.seq_to_ann_forward(s, lambda y: F.max_pool2d(y, 2))
        out = self.conv2(torch.cat([s, s[:, :, ::2].repeat(1, 1, 2, 1, 1)], 2))
        out += s
        a = self.shared(out)
        b = self.also_shared(a * 2 - 0.5)
        b = self.dropout(F.avg_pool2d(b.flatten(0, 1), 2).view(*b.shape[:3], 4, 4))
        return self.fc(self.plif(b).flatten(2)).mean(0)


@pytest.fixture
def x():
    return torch.rand(4, 3, 2, 16, 16) * 2


@pytest.fixture
def net():
    return srp.convert_to_reversible(Net())


@pytest.mark.parametrize("mode", ["memory", "speed"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_trains_like_stock(x, mode, autocast):
    assert_trains_like_stock(Net, (x,), mode=mode, autocast=autocast)


def test_gradient_accumulation(x):
    torch.manual_seed(0)
    stock = Net()
    net = srp.convert_to_reversible(copy.deepcopy(stock))
    for model in (stock, net):
        for number in range(3):
            reset(model)
            torch.manual_seed(number)
            model(x).square().sum().backward()
    for a, b in zip(stock.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_states_carried_over_and_detached(x):
    torch.manual_seed(0)
    stock = Net().eval()
    net = srp.convert_to_reversible(copy.deepcopy(stock))
    for model in (stock, net):
        reset(model)
        loss = sum(model(part).square().sum() for part in x.split(2))  # gradient through the state
        functional.detach_net(model)
        (loss + model(x[:1]).sum()).backward()
    for a, b in zip(stock.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(stock.lif1.v, net.lif1.v)


def test_frozen_parameters_and_input_gradients(x):
    torch.manual_seed(0)
    stock = Net()
    for parameter in (stock.conv1.weight, stock.bn1.weight, stock.conv2.bias, stock.plif.w):
        parameter.requires_grad_(False)
    net = srp.convert_to_reversible(copy.deepcopy(stock))
    found = []
    for model in (stock, net):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        model(leaf).square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_identity_is_kept():
    net = Net()
    modules, parameters = list(net.modules()), list(net.parameters())
    keys = list(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters())
    calls = []
    net.lif1.register_forward_hook(lambda *_: calls.append("hook"))
    assert srp.convert_to_reversible(net) is net
    assert all(a is b for a, b in zip(modules, net.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert list(net.state_dict()) == keys
    assert isinstance(net, Net) and isinstance(net.lif1, neuron.LIFNode)
    step(net, (torch.rand(2, 1, 2, 16, 16) * 4,), optimizer)
    assert calls == ["hook"]


def test_forward_keeps_its_signature(net):
    assert inspect.signature(net.forward) == inspect.signature(Net().forward)


def test_forward_called_directly_is_recorded(net, x):
    seen = []
    net.lif1.register_forward_hook(lambda *_: seen.append(tape.current()))
    net.forward(x)
    net(x)
    assert None not in seen and tape.current() is None


def test_idempotent_and_restore(x):
    net = Net()
    types = [type(module) for module in net.modules()]
    attributes = [set(module.__dict__) for module in net.modules()]
    once = [type(m) for m in srp.convert_to_reversible(net).modules()]
    assert once != types
    assert [type(m) for m in srp.convert_to_reversible(net, mode="speed").modules()] == once
    assert srp.restore(net) is net
    assert [type(module) for module in net.modules()] == types
    assert [set(module.__dict__) for module in net.modules()] == attributes
    assert srp.restore(net) is net


def test_reversible_neurons_that_the_user_chose_stay_on_restore():
    from snn_reversible_plugin.spikingjelly import RevLIFNode

    model = nn.Sequential(RevLIFNode(), neuron.LIFNode())
    srp.restore(srp.convert_to_reversible(model))
    assert [type(module) for module in model] == [RevLIFNode, neuron.LIFNode]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_converted(net, x, copier):
    if copier == "deepcopy":
        twin = copy.deepcopy(net)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    results = []
    for model in (net, twin):
        torch.manual_seed(2)
        results.append(step(model, (x,)))
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)
    assert type(srp.restore(twin)) is Net


def test_state_dict_crosses_over(net):
    Net().load_state_dict(net.state_dict())
    net.load_state_dict(Net().state_dict())


def test_slices_of_a_sequential():
    model = srp.convert_to_reversible(nn.Sequential(layer.Linear(4, 4), neuron.LIFNode(), nn.ReLU()))
    model[:2](torch.rand(3, 4)).sum().backward()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("skip", ["lif1", neuron.LIFNode, ("lif1", "conv2"), [nn.Conv2d]])
def test_skip(x, skip):
    net = assert_trains_like_stock(Net, (x,), skip=skip)
    skips_neuron = skip not in ([nn.Conv2d],)
    srp.restore(net)
    srp.convert_to_reversible(net, skip=skip)
    report = srp.memory_report(net, x)
    row = next(row for row in report.modules if row.name == "lif1")
    assert ("named in skip" in row.neuron) == skips_neuron


def test_skipped_module_keeps_its_tensors(x):
    def held(**settings):
        model = srp.convert_to_reversible(Net(), **settings)
        return srp.memory_report(model, x).converted.held

    assert held(skip=("lif1", "bn1")) > held()


def test_stock_context(net, x):
    types = [type(module) for module in net.modules()]
    with srp.stock(net):
        assert type(net) is Net and type(net.lif1) is neuron.LIFNode
        assert net(x).grad_fn is not None
    assert [type(module) for module in net.modules()] == types
    with pytest.raises(ZeroDivisionError), srp.stock(net):
        1 / 0  # noqa: B018
    assert [type(module) for module in net.modules()] == types
    assert type(srp.restore(net).lif1) is neuron.LIFNode


def test_tools_that_look_up_exact_classes_run_inside_stock(net):
    """As exporters do: a function a class, found by the class itself."""
    exporters = {neuron.LIFNode: "LIF", neuron.IFNode: "IF", neuron.ParametricLIFNode: "PLIF"}
    assert not any(type(module) in exporters for module in net.modules())
    with srp.stock(net):
        found = [exporters[type(module)] for module in net.modules() if type(module) in exporters]
    assert found == ["LIF", "IF", "PLIF"]


def test_reversible_context_records_a_loop_that_calls_submodules(x):
    def run(net, record):
        reset(net)
        torch.manual_seed(3)
        with srp.reversible(net, check=True) if record else torch.enable_grad():
            s = net.lif1(net.bn1(net.conv1(x)))
            loss = net.conv2(torch.cat([s, s], 2)).square().sum()
        assert tape.current() is None
        return torch.autograd.grad(loss, [net.conv1.weight, net.conv2.weight])

    torch.manual_seed(0)
    stock = Net()
    expected = run(stock, False)
    reset(stock)
    for net in (copy.deepcopy(stock), srp.convert_to_reversible(copy.deepcopy(stock))):
        for a, b in zip(expected, run(net, True), strict=True):
            assert torch.equal(a, b)


def test_an_exception_in_forward_leaves_no_mode_and_no_hook(net, x):
    handle = net.plif.register_forward_pre_hook(lambda *_: 1 / 0)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    with pytest.raises(ZeroDivisionError):
        net(x)
    with pytest.raises(ZeroDivisionError), srp.reversible(net, check=True):
        net(x)
    assert tape.current() is None
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    handle.remove()
    reset(net)
    net(x).sum().backward()


def test_inference_runs_stock(net, x):
    net.eval()
    with torch.no_grad():
        assert net(x).grad_fn is None


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_and_infinity_in_the_input_are_stocks(wrong):
    x = torch.rand(2, 2, 2, 16, 16) * 2
    x[0, 1, 0, 3, 4] = wrong
    torch.manual_seed(0)
    stock = Net()
    net = srp.convert_to_reversible(copy.deepcopy(stock))
    found = []
    for model in (stock, net):
        reset(model)
        torch.manual_seed(1)
        found.append(step(model, (x,)))
    assert torch.equal(found[0][2][0].isnan(), found[1][2][0].isnan())
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def test_a_parameter_changed_between_forward_and_backward(net, x):
    loss = net(x).sum()
    with torch.no_grad():
        net.conv2.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_a_buffer_that_each_call_of_a_loop_writes_to(arithmetic):
    """A call relies on it by reference, and the next one writes to it before there is a backward."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(neuron.IFNode(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))

    found = []
    for convert in (False, True):
        net = srp.convert_to_reversible(make(), arithmetic=arithmetic) if convert else make()
        x_seq = torch.rand(6, 3, 8, generator=torch.Generator().manual_seed(1))
        sum(net(x).square().sum() for x in x_seq).backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers()])
    for stock, ours in zip(*found, strict=True):
        assert torch.equal(stock, ours)


def test_double_backward_is_refused(net, x):
    loss = net(x).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, list(net.parameters()), create_graph=True)


@pytest.mark.parametrize("how", ["torch.compile", "compile in place", "a part"])
def test_compiling_after_the_conversion(x, how):
    """A compiled region runs the stock network; what is around it stays on the tape."""

    def make():
        model = nn.Sequential(
            nn.Sequential(layer.Conv2d(2, 4, 3), neuron.LIFNode()), layer.Conv2d(4, 4, 3), neuron.IFNode()
        )
        functional.set_step_mode(model, "m")
        return model

    torch.manual_seed(0)
    stock = make()
    net = srp.convert_to_reversible(copy.deepcopy(stock))
    called = net
    if how == "torch.compile":
        called = torch.compile(net, backend="eager")
    else:
        (net if how == "compile in place" else net[0]).compile(backend="eager")
    stock(x).square().sum().backward()
    called(x).square().sum().backward()
    for a, b in zip(stock.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
@pytest.mark.parametrize("how", ["in place", "torch.compile"])
def test_compiling_a_neuron_after_the_conversion(arithmetic, how):
    """Under a tape it runs as it is written, and nothing of the package's own is compiled."""
    torch._dynamo.reset()  # what it gave up on in another test, it would not try here
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    def make():
        torch.manual_seed(0)
        return srp.convert_to_reversible(
            nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2)), arithmetic=arithmetic
        )

    found = []
    for is_compiled in (False, True):
        net = make()
        if is_compiled and how == "in place":
            net[1].compile(backend=backend)
        elif is_compiled:
            net[1] = torch.compile(net[1], backend=backend)
        if not found:  # what is tested once a process is not what is tested here
            net(torch.rand(3, 4))
            reset(net)
        x_seq = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(1)) * 3
        sum(net(x).square().sum() for x in x_seq).backward()
        found.append([p.grad for p in net.parameters()])
    for plain, compiled in zip(*found, strict=True):
        assert torch.equal(plain, compiled)
    assert not graphs
    rows = srp.memory_report(net, torch.rand(3, 4)).modules
    assert any("compiled" in row.neuron for row in rows)
    with torch.no_grad():
        net(torch.rand(3, 4))
    assert graphs


class Step(torch.autograd.Function):
    """A spike function as users write it."""

    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).float()

    @staticmethod
    def backward(ctx, grad):
        (v,) = ctx.saved_tensors
        return grad * (1 - v.abs()).clamp(min=0)


class OwnNeuron(nn.Module):
    """A neuron that no framework knows."""

    def forward(self, x_seq):
        v, spikes = 0.0, []
        for x in x_seq:
            v = v * 0.5 + x
            spikes.append(Step.apply(v - 1.0))
            v = v * (1 - spikes[-1])
        return torch.stack(spikes)


def test_neurons_of_ones_own_are_recorded_with_one_warning():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 16), OwnNeuron(), nn.Linear(16, 16), OwnNeuron(), nn.Linear(16, 2)
        )

    x_seq = torch.rand(6, 4, 8)
    stock = make()
    stock(x_seq).square().sum().backward()
    told = r"no spiking neuron that the converter knows .*Its own \(OwnNeuron\) are recorded as they are"
    with pytest.warns(UserWarning, match=told):
        net = srp.convert_to_reversible(make())
    net(x_seq).square().sum().backward()
    for a, b in zip(stock.parameters(), net.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert srp.verify(net, x_seq, repeats=1).ok
    report = srp.memory_report(net, x_seq)
    assert report.converted.held < report.stock.held / 2


def test_a_scripted_part_is_recorded_as_it_is():
    """The third step counts: until then TorchScript itself optimizes its graph, and rounds otherwise."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        part = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()))
        net = nn.Sequential(neuron.LIFNode(step_mode="m"), part, neuron.LIFNode(step_mode="m"))
        if converted:
            srp.convert_to_reversible(net, arithmetic="stock")
        x = torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
        for _ in range(3):
            net.zero_grad()
            x.grad = None
            net[0].reset()
            net[2].reset()
            net(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters())])
    for stock, ours in zip(*found, strict=True):
        assert torch.equal(stock, ours)


class TestRefusals:
    def test_no_module(self):
        with pytest.raises(TypeError, match=r"expected an nn\.Module, not dict"):
            srp.convert_to_reversible({})

    @pytest.mark.parametrize("name", ["mode", "arithmetic"])
    def test_unknown_settings(self, name):
        with pytest.raises(ValueError, match=rf"{name} must be one of .* not 'turbo'"):
            srp.convert_to_reversible(Net(), **{name: "turbo"})

    def test_a_model_of_neurons_that_all_stay_stock_is_not_refused(self):
        snntorch = pytest.importorskip("snntorch")
        model = srp.convert_to_reversible(nn.Sequential(snntorch.LeakyParallel(4, 4)))
        assert list(settings_of(model).stays_stock) == ["0"]

    def test_skip_of_nothing(self):
        with pytest.raises(ValueError, match="no module of that name"):
            srp.convert_to_reversible(Net(), skip=("lif7",))
        with pytest.raises(TypeError, match="module names and types, not 3"):
            srp.convert_to_reversible(Net(), skip=(3,))

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_scripted_and_compiled(self):
        with pytest.raises(TypeError, match="scripted"):
            srp.convert_to_reversible(torch.jit.script(nn.Linear(2, 2)))
        model = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode())
        with pytest.raises(TypeError, match=r"without torch\.compile, or use srp\.compile\."):
            srp.convert_to_reversible(torch.compile(model))
        with pytest.raises(TypeError, match=r"without torch\.compile\.$"):  # it is no batch's size
            srp.largest_batch(srp.compile(model), lambda size: torch.rand(size, 2))
        model.compile()
        with pytest.raises(TypeError, match="compiled"):
            srp.convert_to_reversible(model)

    def test_an_unknown_neuron_stays_stock_and_is_reported(self, x):
        class Odd(neuron.BaseNode):
            def forward(self, x_seq):
                return self.surrogate_function(x_seq - self.v_threshold)

        model = nn.Sequential(layer.Conv2d(2, 2, 3, step_mode="m"), Odd(), neuron.LIFNode(step_mode="m"))
        srp.convert_to_reversible(model)
        row = next(row for row in srp.memory_report(model, x).modules if row.name == "1")
        assert row.neuron.startswith("stays stock")


def test_register_reversible_takes_a_third_party_neuron(x):
    class Mine(nn.Module):
        def forward(self, y):
            return (y > 0).to(y) * y

    @srp.register_reversible(Mine)
    class RevMine(Mine):
        pass

    model = srp.convert_to_reversible(nn.Sequential(layer.Conv2d(2, 4, 3, step_mode="m"), Mine()))
    assert type(model[1]) is RevMine
    assert type(srp.restore(model)[1]) is Mine
    with pytest.raises(TypeError, match="must subclass"):
        srp.register_reversible(Mine)(nn.Linear)
    with pytest.raises(TypeError, match=r"nn\.Module class"):
        srp.register_reversible(3)


def test_verify_and_report_leave_the_model_as_it_was(net, x):
    net(x).sum().backward()
    functional.detach_net(net)
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad for p in net.parameters()]
    v = net.lif1.v.clone()
    state = torch.get_rng_state()
    verification = srp.verify(net, x)
    report = srp.memory_report(net, x)
    assert verification.ok and verification.flipped_spikes == 0 and verification.spikes > 0
    assert report.converted.held < report.stock.held
    assert verification.stock.held == report.stock.held
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(a is p.grad for a, p in zip(grads, net.parameters(), strict=True))
    assert torch.equal(net.lif1.v, v)
    assert torch.equal(state, torch.get_rng_state())
    assert report.to_dict()["modules"][0]["name"] and verification.to_dict()["ok"] is True


def test_verify_after_training_without_a_reset(net, x):
    net(x).sum().backward()  # the states carry a graph now
    with torch.no_grad():
        assert srp.verify(net, x, repeats=1).ok
    assert net.lif1.v.grad_fn is not None


def test_verify_finds_a_replay_that_differs():
    class Impure(nn.Module):
        """Reads something that changes behind torch's back."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Buffer(torch.ones(1, 8, 1, 1))

        def forward(self, y):
            out = y * self.gain
            self.gain.numpy()[:] += 1.0
            return out.sigmoid() * out

    model = nn.Sequential(nn.Conv2d(2, 8, 3), Impure(), neuron.LIFNode())
    verification = srp.verify(srp.convert_to_reversible(model), torch.rand(3, 2, 16, 16))
    assert not verification.ok
    assert "1: a tensor of shape (1, 8, 1, 1)" in verification.replay_error
    assert "written to past its version counter" in verification.replay_error


@pytest.mark.slow
def test_report_prints_and_plots(net, x, capsys):
    report = srp.memory_report(net, x)
    report.print()
    srp.verify(net, x).print()
    printed = capsys.readouterr().out
    assert "lif1" in printed and "bit-identical" in printed
    figure = report.plot()
    assert len(figure.axes) == 2  # the step, and bytes by module


@pytest.mark.slow
def test_converting_for_a_report_only(x):
    model = Net()
    assert srp.memory_report(model, x).converted.held > 0
    assert type(model) is Net
    assert srp.verify(model, x).ok and type(model) is Net


def test_an_output_without_gradient():
    model = srp.convert_to_reversible(nn.Sequential(neuron.LIFNode()))
    with pytest.raises(ValueError, match="no output of the model has a gradient"):
        srp.memory_report(model, torch.rand(2, 2))
