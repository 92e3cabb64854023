"""SLTT: its gradient is autograd's with the path through time cut, and its memory does not grow with T."""

import copy
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.training import sltt_backward
from two_processes import together

snntorch = pytest.importorskip("snntorch")
neuron = pytest.importorskip("spikingjelly.activation_based.neuron")
from spikingjelly.activation_based import base, functional, layer, surrogate  # noqa: E402
from spikingjelly.activation_based.model import sew_resnet, spiking_vgg  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
N = 3
LABEL = torch.tensor([0, 3, 1])


def jelly(*neurons, bias=True):
    """Convolution, batch norm, a hidden layer: [N, 2, 6, 6] to [N, 4]."""
    first, second = neurons or (neuron.LIFNode(), neuron.LIFNode(detach_reset=True))
    return nn.Sequential(
        layer.Conv2d(2, 5, 3, padding=1, bias=bias),
        layer.BatchNorm2d(5),
        first,
        layer.MaxPool2d(2),
        layer.Flatten(),
        layer.Linear(45, 12),
        second,
        layer.Linear(12, 4),
    )


def jelly_multi_step():
    model = jelly()
    functional.set_step_mode(model, "m")
    return model


def torch_like(first, second):
    """The same for snnTorch, whose layers are torch's."""
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        first,
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(45, 12),
        second,
        nn.Linear(12, 4),
    )


def leaky():
    learned = snntorch.Leaky(beta=0.8, learn_beta=True, learn_threshold=True, init_hidden=True)
    return torch_like(snntorch.Leaky(beta=0.9, init_hidden=True, reset_mechanism="zero"), learned)


def recurrent():
    return torch_like(
        snntorch.Synaptic(alpha=0.7, beta=0.8, init_hidden=True),
        snntorch.RLeaky(beta=0.8, linear_features=12, init_hidden=True),
    )


class OwnNeuron(nn.Module):
    """A user's own stateful module: its trace and its history are attributes like any other."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.7))
        self.trace = 0.0
        self.history = [0.0, 0.0]

    def forward(self, x):
        self.trace = self.decay * self.trace + x
        self.history[0], self.history[1] = self.history[1], self.trace
        return self.trace.sigmoid() + 0.1 * self.history[0]


def own():
    first = nn.Sequential(layer.Flatten(), layer.Linear(72, 12), OwnNeuron())
    return nn.Sequential(*first, neuron.LIFNode(), layer.Linear(12, 4))


MAKERS = {
    "LIF": jelly,
    "IF and soft reset": lambda: jelly(neuron.IFNode(), neuron.LIFNode(v_reset=None)),
    "ParametricLIF": lambda: jelly(neuron.ParametricLIFNode(), neuron.ParametricLIFNode(v_reset=None)),
    "two memories": lambda: jelly(neuron.CUBALIFNode(), neuron.IzhikevichNode()),
    "multi-step": jelly_multi_step,
    "Leaky": leaky,
    "recurrent": recurrent,
    "own module": own,
}


def data(steps, shape=(2, 6, 6), seed=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, N, *shape, generator=generator, dtype=dtype) * 2


def make(name, dtype=torch.float32, convert=False):
    torch.manual_seed(1)
    model = (MAKERS[name] if isinstance(name, str) else name)().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.7)
        elif isinstance(module, nn.Linear):
            module.weight.data.mul_(3)  # so that every neuron fires now and then
    if convert:
        srp.convert_to_reversible(model, arithmetic="stock")
    return model


def loss_fn(output):
    """Of one step [N, 4], or of a sequence of one step [1, N, 4]."""
    return nn.functional.cross_entropy(output if output.dim() == 2 else output.mean(0), LABEL)


def detach_by_hand(model):
    """Each framework's state by its own name, apart from the package's way to find them."""
    for module in model.modules():
        if isinstance(module, base.MemoryModule):
            for name, value in module._memories.items():
                if isinstance(value, torch.Tensor):
                    setattr(module, name, value.detach())
        elif isinstance(module, snntorch.SpikingNeuron):
            for name in ("mem", "syn", "spk"):
                if hasattr(module, name):
                    setattr(module, name, getattr(module, name).detach())
        elif isinstance(module, OwnNeuron):
            module.trace = module.trace.detach()
            module.history = [v.detach() if isinstance(v, torch.Tensor) else v for v in module.history]


def cut_outputs(model, x_seq, multi_step=False):
    """The outputs of all steps in one graph, whose paths through time are cut."""
    outputs = []
    for x in x_seq:
        outputs.append(model(x[None] if multi_step else x))
        detach_by_hand(model)
    return outputs


def is_multi_step(model):
    return any(getattr(module, "step_mode", "s") == "m" for module in model.modules())


def gradients_step_by_step(model, terms):
    """Gradients of terms (tensor, gradient of it) of one graph, added up in the order of time."""
    parameters = list(model.parameters())
    total = [None] * len(parameters)
    for tensor, gradient in terms:
        found = torch.autograd.grad(tensor, parameters, gradient, retain_graph=True, allow_unused=True)
        total = [b if a is None else a if b is None else a + b for a, b in zip(total, found, strict=True)]
    return total


def assert_gradients(model, expected, equal=torch.equal):
    found = [p.grad for p in model.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in expected)
    for (name, _), a, b in zip(model.named_parameters(), expected, found, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or equal(a, b), name


def assert_same_buffers(a, b):
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.one_in(4)
@pytest.mark.parametrize("convert", [False, True], ids=["stock", "converted"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("steps", [1, 7])
def test_the_gradient_is_autograds_with_the_path_through_time_cut(name, convert, steps):
    x_seq = data(steps)
    reference, model = make(name), make(name, convert=convert)
    outputs = cut_outputs(reference, x_seq, is_multi_step(reference))
    losses = [loss_fn(output) for output in outputs]
    expected = gradients_step_by_step(reference, [(loss / steps, None) for loss in losses])

    loss, output = sltt_backward(model, x_seq, loss_fn)
    assert_gradients(model, expected)
    assert_same_buffers(reference, model)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output, torch.stack(outputs).mean(0), rtol=1e-5, atol=1e-6)
    assert not loss.requires_grad and not output.requires_grad


@pytest.mark.parametrize("name", MAKERS)
def test_two_steps_equal_one_backward_over_both_bit_for_bit(name):
    """Gradients of two steps are added in either order, so the whole graph may go backward at once."""
    x_seq = data(2)
    reference, model = make(name), make(name)
    losses = [loss_fn(output) for output in cut_outputs(reference, x_seq, is_multi_step(reference))]
    (losses[0] / 2 + losses[1] / 2).backward()
    sltt_backward(model, x_seq, loss_fn)
    assert_gradients(model, [p.grad for p in reference.parameters()])


@pytest.mark.parametrize("name", MAKERS)
def test_many_steps_agree_with_one_backward_over_all(name):
    """One backward adds the steps' gradients from last to first: equal up to rounding."""
    # snnTorch's spikes are float32 whatever the network is.
    dtype, rtol = (torch.float32, 1e-4) if name in ("Leaky", "recurrent") else (torch.float64, 1e-10)
    x_seq = data(9, dtype=dtype)
    reference, model = make(name, dtype), make(name, dtype)
    outputs = cut_outputs(reference, x_seq, is_multi_step(reference))
    torch.stack([loss_fn(output) for output in outputs]).mean().backward()
    sltt_backward(model, x_seq, loss_fn)
    assert_gradients(
        model,
        [p.grad for p in reference.parameters()],
        lambda a, b: torch.allclose(a, b, rtol=rtol, atol=rtol * b.abs().max().item()),
    )


def test_the_paths_through_time_matter():
    """The reference is not what back-propagation through time gives."""
    x_seq = data(7)
    stock, model = make("LIF"), make("LIF")
    torch.stack([loss_fn(stock(x)) for x in x_seq]).mean().backward()
    sltt_backward(model, x_seq, loss_fn)
    assert not torch.allclose(stock[0].weight.grad, model[0].weight.grad, rtol=0.05)


@pytest.mark.parametrize("name", ["LIF", "multi-step", "recurrent"])
@pytest.mark.parametrize("k", [None, 3])
def test_the_loss_of_the_mean_output(name, k):
    steps = 6
    x_seq = data(steps)
    reference, model = make(name), make(name)
    outputs = cut_outputs(reference, x_seq, is_multi_step(reference))
    total = outputs[0].detach().clone()
    for output in outputs[1:]:
        total += output.detach()
    mean = (total / steps).requires_grad_()
    loss_of_mean = loss_fn(mean)
    loss_of_mean.backward()
    chosen = range(steps)
    if k is not None:
        chosen = torch.randperm(steps, generator=torch.Generator().manual_seed(4))[:k].sort().values
    expected = gradients_step_by_step(reference, [(outputs[t], mean.grad / steps) for t in chosen])

    generator = torch.Generator().manual_seed(4)
    loss, output = sltt_backward(model, x_seq, loss_fn, k, loss_on="mean", generator=generator)
    assert_gradients(model, expected)
    assert_same_buffers(reference, model)  # moved once, by two passes
    assert torch.equal(loss, loss_of_mean.detach()) and torch.equal(output, mean.detach())


def test_the_loss_of_the_mean_output_with_dropout():
    """The second pass draws the random numbers of the first."""

    def make_model():
        return nn.Sequential(layer.Flatten(), layer.Linear(72, 4), nn.Dropout(0.5), neuron.LIFNode())

    drawn = []
    model = make(make_model)
    model[2].register_forward_hook(lambda _m, _x, output: drawn.append(output.detach().clone()))
    sltt_backward(model, data(5), loss_fn, loss_on="mean")
    first, second = drawn[:5], drawn[5:]
    assert len(second) == 5 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(out.flatten().tolist()) for out in first}) > 1


@pytest.mark.parametrize("name", ["LIF", "multi-step", "Leaky", "recurrent"])
def test_k_steps_drawn_at_random(name):
    """The chosen steps' share of the gradient, and states and statistics of all steps."""
    x_seq = data(8)
    reference, model = make(name), make(name)
    losses = [loss_fn(output) for output in cut_outputs(reference, x_seq, is_multi_step(reference))]
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(11))[:3].sort().values
    expected = gradients_step_by_step(reference, [(losses[t] / 8, None) for t in chosen])
    result = sltt_backward(model, x_seq, loss_fn, 3, generator=torch.Generator().manual_seed(11))
    assert_gradients(model, expected)
    assert_same_buffers(reference, model)
    torch.testing.assert_close(result.loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_the_k_steps_differ_from_call_to_call():
    model, x_seq = make(own), data(50)
    drawn = []
    for _ in range(2):
        graphs = []
        loss = lambda y: (graphs.append(torch.is_grad_enabled()), loss_fn(y))[1]  # noqa: E731, B023
        sltt_backward(model, x_seq, loss, 5)
        assert sum(graphs) == 5
        drawn.append(graphs)
    assert drawn[0] != drawn[1]


def test_k_of_all_steps_is_sltt():
    everything, without_k = make("LIF"), make("LIF")
    sltt_backward(everything, data(6), loss_fn, 6)
    sltt_backward(without_k, data(6), loss_fn)
    assert_gradients(everything, [p.grad for p in without_k.parameters()])


@pytest.mark.parametrize("name", ["LIF", "multi-step", "Leaky", "recurrent", "own module"])
def test_states_and_statistics_are_those_of_a_plain_forward(name):
    plain, model = make(name), make(name)
    x_seq = data(6)
    with torch.no_grad():
        outputs = [plain(x[None] if is_multi_step(plain) else x) for x in x_seq]
    for part in (x_seq[:4], x_seq[4:]):  # a sequence may go on in the next call
        sltt_backward(model, part, loss_fn, k=1)
    assert_same_buffers(plain, model)
    for a, b in zip(plain.modules(), model.modules(), strict=True):
        for name, value in getattr(a, "_memories", {}).items():
            assert torch.equal(value, b._memories[name])
    nexts = [net(x_seq[:1] if is_multi_step(net) else x_seq[0]) for net in (plain, model)]
    assert torch.equal(*nexts) and not torch.equal(nexts[0], outputs[0])


class Explicit(nn.Module):
    """As snnTorch's tutorials carry states: by hand."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(72, 12), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(12, 4), snntorch.RLeaky(beta=0.8, linear_features=4)

    def forward(self, x, mem1, second):
        spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), second["spk"], second["mem"])
        return (spk2, mem2), mem1, {"spk": spk2, "mem": mem2}


@pytest.mark.parametrize("convert", [False, True], ids=["stock", "converted"])
def test_states_that_the_model_takes_and_returns(convert):
    def first(model):
        spk, mem = model.lif2.reset_mem()
        return model.lif1.reset_mem(), {"spk": spk, "mem": mem}

    reference, model = make(Explicit), make(Explicit, convert=convert)
    x_seq = data(5)
    states, losses = first(reference), []
    for x in x_seq:
        (_, mem), *states = reference(x, *states)
        losses.append(loss_fn(mem))
        states = [states[0].detach(), {name: v.detach() for name, v in states[1].items()}]
    expected = gradients_step_by_step(reference, [(loss / 5, None) for loss in losses])
    result = sltt_backward(model, x_seq, lambda output: loss_fn(output[1]), states=first(model))
    assert_gradients(model, expected)
    assert torch.equal(result.states[0], states[0])
    assert torch.equal(result.states[1]["mem"], states[1]["mem"])
    assert result.output[0].shape == (N, 4)


def test_an_initial_state_is_learned():
    """A leaf among the first states is a parameter, not a path through time."""
    model, v0 = make(Explicit), torch.full((N, 12), 0.3, requires_grad=True)
    spk, mem = model.lif2.reset_mem()
    sltt_backward(model, data(3), lambda output: loss_fn(output[1]), states=(v0, {"spk": spk, "mem": mem}))
    assert v0.grad.abs().sum() > 0


def test_a_loop_of_the_users_own_over_a_sequence_of_one_step():
    """A forward that loops over x_seq and keeps its states in the neurons, as some scripts have it."""

    def layers():
        return nn.Sequential(
            nn.Linear(9, 12),
            snntorch.Leaky(beta=0.9, init_hidden=True),
            nn.Linear(12, 4),
            snntorch.RLeaky(beta=0.8, linear_features=4, init_hidden=True),
        )

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layers()

        def forward(self, x_seq):
            return torch.stack([self.net(x) for x in x_seq]).mean(0)

    looped, plain = make(Loop), make(layers)
    sltt_backward(looped, data(4, (9,)), loss_fn, step_mode="m")
    sltt_backward(plain, data(4, (9,)), loss_fn)
    assert_gradients(looped, [p.grad for p in plain.parameters()])
    with pytest.raises(ValueError, match=r"net\.1 ran more than once .* step_mode='m'"):
        sltt_backward(make(Loop), data(4, (9,)), loss_fn)


def test_the_gradient_is_that_of_spikingjellys_slttlifnode():
    """SpikingJelly has a neuron for it, that detaches itself, in a loop written by hand."""
    x_seq = data(6)
    model = make(lambda: jelly(neuron.LIFNode(decay_input=False), neuron.LIFNode(v_reset=None)))
    peer = make(lambda: jelly(neuron.SLTTLIFNode(decay_input=False), neuron.SLTTLIFNode(v_reset=None)))
    for x in x_seq:
        (loss_fn(peer(x)) / 6).backward()
    sltt_backward(model, x_seq, loss_fn)
    assert_gradients(model, [p.grad for p in peer.parameters()])


@pytest.mark.one_in(8)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("convert", [False, True], ids=["stock", "converted"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LIF", {}),
        ("multi-step", {}),
        ("Leaky", {}),
        ("recurrent", {}),
        ("LIF", {"k": 2}),
        ("recurrent", {"k": 2}),
        ("LIF", {"loss_on": "mean"}),
    ],
)
def test_memory_does_not_grow_with_the_number_of_steps(name, arguments, convert, device):
    peaks = []
    steps = 200  # an output of each step, the least that could be kept, would be 9,600 bytes
    for length in (10, steps):
        model = make(name, convert=convert).to(device)
        x_seq = data(1).to(device).expand(length, N, 2, 6, 6)
        label = LABEL.to(device)
        loss = lambda y: nn.functional.cross_entropy(y.reshape(N, 4), label)  # noqa: E731, B023
        sltt_backward(model, x_seq[:2], loss)  # states, and gradients to add to
        with AllocationCounter() as counter:
            sltt_backward(model, x_seq, loss, **arguments)
        peaks.append(counter.peak)
    slack = 8 * steps if "k" in arguments else 0  # the order of the steps, an integer each
    if convert:
        slack += 4 * N * 5 * 36  # one current that could not be overwritten by its gradient
    assert peaks[0] > 0 and abs(peaks[1] - peaks[0]) <= slack


def test_packing_and_replay_save_within_a_step():
    peaks = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = spiking_vgg.spiking_vgg11_bn(
            spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), num_classes=10
        )
        model.classifier = nn.Linear(512 * 49, 10)
        if convert:
            srp.convert_to_reversible(model, arithmetic="stock")
        with AllocationCounter() as counter:
            sltt_backward(model, torch.rand(2, 8, 3, 32, 32), lambda y: y.square().mean(), 1)
        peaks.append(counter.peak_beyond([p.grad for p in model.parameters()]))
        del model
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.slow
def test_a_residual_network_of_the_zoo():
    def make_model():
        return sew_resnet.sew_resnet18(
            spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), cnf="ADD", num_classes=4
        )

    x_seq = data(3, (3, 32, 32))
    reference, model = make(make_model), make(make_model, convert=True)
    losses = [loss_fn(output) for output in cut_outputs(reference, x_seq)]
    expected = gradients_step_by_step(reference, [(loss / 3, None) for loss in losses])
    sltt_backward(model, x_seq, loss_fn)
    assert_gradients(model, expected)


@pytest.mark.parametrize("name", ["LIF", "Leaky"])
@pytest.mark.parametrize("k", [None, 4])
def test_autocast(name, k):
    """Each step casts the parameters for itself: what a step without a graph casts, it takes along."""
    x_seq = data(6)
    reference, model = make(name), make(name)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        outputs = cut_outputs(reference, x_seq)
        losses = [loss_fn(output) for output in outputs]
    chosen = range(6)
    if k is not None:
        chosen = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:k].sort().values
    expected = gradients_step_by_step(reference, [(losses[t] / 6, None) for t in chosen])
    with torch.autocast("cpu", torch.bfloat16):
        result = sltt_backward(model, x_seq, loss_fn, k, generator=torch.Generator().manual_seed(0))
        later = loss_fn(model(x_seq[0]))
    assert_gradients(model, expected)
    assert outputs[0].dtype is torch.bfloat16 and result.output.dtype is torch.float32
    model.zero_grad()
    later.backward()
    assert model[0].weight.grad.abs().sum() > 0, "a cast without a graph was left in the cache"


@pytest.mark.parametrize("loss_on", ["step", "mean"])
def test_gradient_scaling(loss_on):
    scaled, plain = make("LIF"), make("LIF")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for model, arguments in ((scaled, {"scaler": scaler}), (plain, {})):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        result = sltt_backward(model, data(4), loss_fn, loss_on=loss_on, **arguments)
        if arguments:
            assert torch.equal(scaled[0].weight.grad, 1024 * plain_gradient(loss_on))
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    assert result.loss < 10  # not scaled
    for a, b in zip(scaled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def plain_gradient(loss_on):
    model = make("LIF")
    sltt_backward(model, data(4), loss_fn, loss_on=loss_on)
    return model[0].weight.grad


def test_gradients_are_accumulated():
    twice, parts = make("two memories"), []
    for seed in (0, 1):
        alone = make("two memories")
        sltt_backward(alone, data(1, seed=seed), loss_fn)
        parts.append([p.grad for p in alone.parameters()])
        functional.reset_net(twice)
        sltt_backward(twice, data(1, seed=seed), loss_fn)
    assert_gradients(twice, [a + b for a, b in zip(*parts, strict=True)])


def test_a_target_for_each_step():
    x_seq, target = data(5), torch.randint(0, 4, (5, N))
    reference, model = make("LIF"), make("LIF")
    losses = [
        nn.functional.cross_entropy(output, label)
        for output, label in zip(cut_outputs(reference, x_seq), target, strict=True)
    ]
    expected = gradients_step_by_step(reference, [(loss / 5, None) for loss in losses])
    sltt_backward(model, list(x_seq), nn.CrossEntropyLoss(), target_seq=target)
    assert_gradients(model, expected)


def test_steps_without_a_loss():
    """A loss at the last step only: steps whose loss has no graph are not back-propagated."""
    model = make("LIF")
    last = 3
    sltt_backward(
        model,
        data(4),
        lambda y, t: loss_fn(y) if t == last else torch.zeros(()),
        target_seq=range(4),
    )
    assert model[0].weight.grad.abs().sum() > 0


def test_what_was_computed_before_the_sequence_is_no_state():
    """A weight that is derived once keeps its graph: it is nobody's state."""

    class Derived(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.rand(12, 72) * 0.1)
            self.weight = None

        def forward(self, x):
            return x.flatten(1) @ self.weight.T

    model = make(lambda: nn.Sequential(Derived(), neuron.LIFNode(), layer.Linear(12, 4)))
    model[0].weight = model[0].raw.clone()  # its graph saves nothing that a first backward would free
    sltt_backward(model, data(3), loss_fn)
    assert model[0].raw.grad.abs().sum() > 0


def hooks_of(model):
    return [
        len(table)
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]


def states_of(model):
    kept = []
    for module in model.modules():
        for table in (module._buffers, module.__dict__, getattr(module, "_memories", {})):
            kept += [(key, value) for key, value in table.items() if not key.startswith("_")]
        kept += [("content", list(value)) for value in module.__dict__.values() if type(value) is list]
    return kept


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", ["LIF", "multi-step", "Leaky", "recurrent", "own module"])
@pytest.mark.parametrize("loss_on", ["step", "mean"])
@pytest.mark.parametrize("fails_at", [0, 1, 4])
@pytest.mark.parametrize("fresh", [True, False])
def test_an_exception_leaves_states_and_hooks(name, loss_on, fails_at, fresh):
    model = make(name)
    if not fresh:
        model(data(1) if is_multi_step(model) else data(1)[0])  # states with a graph
    hooks, states = hooks_of(model), states_of(model)
    step = 0

    def fail(_module, _inputs, output):
        nonlocal step
        step += 1
        if step > fails_at:
            raise KeyboardInterrupt

    hook = model[-1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        sltt_backward(model, data(6), loss_fn, loss_on=loss_on)
    hook.remove()
    assert torch.is_grad_enabled()
    assert hooks_of(model) == hooks
    found = states_of(model)
    assert [key for key, _ in found] == [key for key, _ in states]
    for (key, a), (_, b) in zip(states, found, strict=True):
        same = (
            len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
            if key == "content"
            else a is b
        )
        assert same, key


def test_hooks_are_gone_afterwards():
    model = make("LIF")
    hooks = hooks_of(model)
    sltt_backward(model, data(4), loss_fn)
    assert hooks_of(model) == hooks


class StartsAnew(nn.Module):
    """snnTorch's usual network, stepped from outside: it forgets its states at each call."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(72, 4), snntorch.Leaky(beta=0.9)

    def forward(self, x):
        mem = self.lif.init_leaky()
        return self.lif(self.fc(x.flatten(1)), mem)[0]


class ResetsItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = jelly()

    def forward(self, x):
        functional.reset_net(self.net)
        return self.net(x)


class RepeatsItself(nn.Module):
    """A forward that makes a sequence out of an image."""

    def __init__(self):
        super().__init__()
        self.net = jelly_multi_step()

    def forward(self, x):
        return self.net(x.repeat(4, 1, 1, 1, 1)).mean(0)


def psn(kind, **arguments):
    def make_model():
        model = jelly(kind(**arguments), neuron.LIFNode())
        functional.set_step_mode(model, "m")
        return model

    return make_model


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (StartsAnew, r"lif did not start from the state that the step before left.*states="),
        (ResetsItself, r"net\.2 did not start from the state"),
        (RepeatsItself, r"net\.\d got 4 time steps"),
        (psn(neuron.PSN, T=4, surrogate_function=surrogate.ATan()), r"2: a PSN computes a whole"),
        (
            psn(neuron.SlidingPSN, k=2, surrogate_function=surrogate.ATan()),
            r"2: a SlidingPSN in step mode 'm' carries no state",
        ),
        (lambda: torch_like(nn.Identity(), LeakyParallelOf12()), r"a RNN computes a whole"),
    ],
)
def test_a_model_that_can_not_be_stepped_is_refused(maker, message):
    model = make(maker)
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match=message):
        sltt_backward(model, data(4), loss_fn)
    assert hooks_of(model) == hooks


class LeakyParallelOf12(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = snntorch.LeakyParallel(input_size=12, hidden_size=12)

    def forward(self, x):
        return self.lif(x[None])[0]


def test_a_sliding_neuron_can_be_stepped_in_single_step_mode():
    model = make(
        lambda: jelly(neuron.SlidingPSN(k=2, surrogate_function=surrogate.ATan()), neuron.IFNode())
    )
    reference = make(
        lambda: jelly(neuron.SlidingPSN(k=2, surrogate_function=surrogate.ATan()), neuron.IFNode())
    )
    losses = []
    for x in data(5):
        losses.append(loss_fn(reference(x)))
        detach_by_hand(reference)
        reference[2].queue = [x.detach() for x in reference[2].queue]
    expected = gradients_step_by_step(reference, [(loss / 5, None) for loss in losses])
    sltt_backward(model, data(5), loss_fn)
    assert_gradients(model, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k is 0 of 4"),
        ({"k": 5}, ValueError, "k is 5 of 4"),
        ({"x_seq": data(4)[:0]}, ValueError, "no time steps"),
        ({"x_seq": data(4).requires_grad_() * 2}, ValueError, "graph behind it"),
        ({"loss_on": "sum"}, ValueError, "'step' or 'mean', not 'sum'"),
        ({"step_mode": "x"}, ValueError, "step_mode must be"),
        ({"target_seq": range(3)}, ValueError, "target_seq has 3 steps, x_seq 4"),
        ({"target_seq": range(4), "loss_on": "mean"}, ValueError, "needs loss_on='step'"),
        ({"states": torch.zeros(3)}, TypeError, "states must be a tuple"),
        ({"states": ()}, TypeError, r"has to return \(output, \*states\)"),
        ({"loss_fn": lambda y: y}, ValueError, r"returned a tensor of shape \(3, 4\)"),
        ({"loss_fn": lambda y: 0.0}, ValueError, "returned float"),
        ({"loss_fn": lambda y: y.detach().sum()}, ValueError, "has a gradient"),
        (
            {"loss_fn": lambda y: y.detach().sum(), "loss_on": "mean"},
            ValueError,
            "has a gradient",
        ),
        ({"model": loss_fn}, TypeError, "expected an nn.Module, not function"),
    ],
)
def test_arguments_are_refused(change, error, message):
    arguments = {"model": make("LIF"), "x_seq": data(4), "loss_fn": loss_fn} | change
    with pytest.raises(error, match=message):
        sltt_backward(**arguments)


def test_without_gradients_it_is_refused():
    with torch.no_grad(), pytest.raises(RuntimeError, match="outside of no_grad"):
        sltt_backward(make("LIF"), data(4), loss_fn)


@pytest.mark.slow
def test_training_with_it_learns():
    """The loss of one batch falls to a part of what it was, stock and converted alike."""
    finals = []
    for convert in (False, True):
        model, losses = make("LIF", convert=convert), []
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for number in range(60):
            functional.reset_net(model)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(number)
            losses.append(sltt_backward(model, data(6), loss_fn, 3, generator=generator).loss.item())
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0]
        finals.append(losses)
    assert finals[0] == finals[1]


def train_on_two(rank):
    exchanges = types.SimpleNamespace(count=0)

    def count(_state, bucket):
        exchanges.count += 1
        total = bucket.buffer() / 2
        return dist.all_reduce(total, async_op=True).get_future().then(lambda f: f.value()[0])

    model = make(own)
    alone = copy.deepcopy(model)
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(None, count)
    sltt_backward(ddp, data(5, seed=rank), loss_fn, 2, generator=torch.Generator().manual_seed(0))
    found = [p.grad.clone() for p in model.parameters()]
    expected = [torch.zeros_like(g) for g in found]
    for seed in (0, 1):
        single = copy.deepcopy(alone)
        sltt_backward(single, data(5, seed=seed), loss_fn, 2, generator=torch.Generator().manual_seed(0))
        expected = [e + p.grad / 2 for e, p in zip(expected, single.parameters(), strict=True)]
    same = all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))
    return same, exchanges.count


def test_two_processes_exchange_gradients_once(tmp_path):
    assert together(tmp_path, train_on_two) == [(True, 1), (True, 1)]
