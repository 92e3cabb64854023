"""The tape against stock autograd: every trap that a replaying tape can fall into has a test here."""

import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import BaseTorchDispatchMode

from snn_reversible_plugin import tape
from snn_reversible_plugin.reports.measure import AllocationCounter
from snn_reversible_plugin.tape import handles
from snn_reversible_plugin.tape import origins as entries
from snn_reversible_plugin.tape.handles import Kept
from snn_reversible_plugin.tape.packed import Packed
from snn_reversible_plugin.tape.replayed import Replayed


class Saved:
    """An observer that remembers the handles that autograd was given."""

    def __init__(self):
        self.handles = []

    def computed(self, where, operator, out, refused):
        pass

    def packed(self, where, tensor, handle):
        self.handles.append((tuple(tensor.shape), tensor.dtype, handle))

    def of(self, kind):
        return [entry for entry in self.handles if isinstance(entry[2], kind)]


@contextmanager
def runs_counted(*names):
    """How often the operators with these names run inside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts = dict.fromkeys(names, 0)

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.partition("::")[2]
            if name in counts:
                counts[name] += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        yield counts


def gradients(function, leaves, *, mode=None, observer=None, check=False):
    for leaf in leaves:
        leaf.grad = None
    if mode is None:
        output = function()
    else:
        with tape.recording(mode, observer=observer, check=check):
            output = function()
    output.sum().backward()
    return output.detach(), [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def assert_same(function, leaves, *, mode="memory", seed=0):
    """Output and gradients equal stock's bit for bit; returns what was saved."""
    torch.manual_seed(seed)
    expected, expected_grads = gradients(function, leaves)
    torch.manual_seed(seed)
    saved = Saved()
    actual, actual_grads = gradients(function, leaves, mode=mode, observer=saved)
    torch.manual_seed(seed)
    checked, checked_grads = gradients(function, leaves, mode=mode, check=True)
    for output, grads in ((actual, actual_grads), (checked, checked_grads)):
        assert torch.equal(expected, output)
        for a, b in zip(expected_grads, grads, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    return saved


class Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad / (1 + x * x)


@pytest.fixture
def net():
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(2, 8, 3, padding=1),
            "bn1": nn.BatchNorm2d(8),
            "conv2": nn.Conv2d(8, 8, 3, padding=1),
            "bn2": nn.BatchNorm2d(8),
            "head": nn.Linear(8 * 16, 5),
        }
    )


@pytest.fixture
def x():
    return torch.randn(6, 2, 16, 16)


def leaves_of(net):
    return list(net.parameters())


def plain(net, x):
    s = Heaviside.apply(net["bn1"](net["conv1"](x)))
    s = Heaviside.apply(net["bn2"](net["conv2"](F.avg_pool2d(s, 2))))
    return net["head"](F.avg_pool2d(s, 2).flatten(1))


@pytest.mark.parametrize("mode", ["memory", "speed"])
def test_a_network_equals_stock(net, x, mode):
    saved = assert_same(lambda: plain(net, x), leaves_of(net), mode=mode)
    convs = [entry for entry in saved.of(Kept) if entry[0] == (6, 8, 16, 16)]
    # "memory" holds no conv output, "speed" holds each (batch norm saves it).
    assert len(convs) == (0 if mode == "memory" else 1)


def test_spikes_of_a_plain_autograd_function_are_packed(net, x):
    saved = Saved()
    with tape.recording(observer=saved):
        s = Heaviside.apply(net["conv1"](x))
        out = net["conv2"](s)
    *_, (shape, _, handle), _ = saved.handles  # the second convolution saves its input, its weight
    (bits,) = leaves_of_recipe(handle)
    assert shape == s.shape and isinstance(bits, Packed) and bits.bits.numel() == s.numel() // 8
    out.sum().backward()


def leaves_of_recipe(handle):
    if isinstance(handle, Replayed):
        for operand in handle.operands():
            yield from leaves_of_recipe(operand)
    else:
        yield handle


def test_memory_is_a_fraction(net):
    x = torch.randn(16, 2, 32, 32)
    net["head"] = nn.Linear(8 * 64, 5)

    def held(mode):
        with AllocationCounter() as counter:
            if mode is None:
                out = plain(net, x)
            else:
                with tape.recording(mode):
                    out = plain(net, x)
            live = counter.live
        del out
        return live

    assert held("memory") < held("speed") / 3 < held(None) / 5


def test_in_place_operations(net, x):
    """`out += identity` after a recorded operation, on a value that a later layer saves."""

    def forward():
        identity = Heaviside.apply(net["conv1"](x))
        out = net["bn2"](net["conv2"](identity))
        out += identity
        out.mul_(0.5)
        s = Heaviside.apply(out)
        return net["conv2"](s * out)

    saved = assert_same(forward, leaves_of(net))
    assert not [entry for entry in saved.of(Kept) if entry[0] == (6, 8, 16, 16)]


def test_in_place_through_a_view(net, x):
    def forward():
        out = net["bn1"](net["conv1"](x))
        out[:, ::2] += 1.0
        out.view(-1)[3] = 0.25
        return net["conv2"](out.clone() * out)

    assert_same(forward, leaves_of(net))


def test_a_view_of_spikes_that_were_written_in_place():
    """A new view has its base's version, which need not be zero."""
    weight = torch.randn(64, 64, requires_grad=True)
    saved = Saved()
    with tape.recording(observer=saved):
        with tape.paused():
            s = torch.empty(2, 64, 64)
            s.copy_(torch.rand(2, 64, 64) > 0.5)
        tape.mark_spikes(s)
        loss = (s.flatten(0, 1) @ weight).sum() + (s[0] @ weight).sum()
    assert s._version > 0 and not saved.of(Kept)
    loss.backward()
    assert torch.equal(weight.grad, s.flatten(0, 1).sum(0)[:, None].expand(64, 64) + s[0].sum(0)[:, None])


@pytest.mark.parametrize("how", ["data in place", "data replaced", "data of a view"])
def test_changes_behind_the_version_counter(net, x, how):
    """What is saved after the change has the new value, what was saved before the old one."""

    def forward():
        out = net["bn1"](net["conv1"](x))
        before = out.sigmoid()
        if how == "data in place":
            out.data.mul_(2)
        elif how == "data replaced":
            out.data = out.data * 2
        else:
            out.data[0].mul_(2)
        return net["conv2"](out * out) * before

    saved = Saved()
    torch.manual_seed(0)
    expected = gradients(forward, [net["conv2"].weight])
    torch.manual_seed(0)
    actual = gradients(forward, [net["conv2"].weight], mode="memory", observer=saved)
    assert torch.equal(expected[0], actual[0]) and torch.equal(expected[1][0], actual[1][0])


def test_sparse_operands():
    weight = torch.randn(32, 8, requires_grad=True)
    dense = torch.rand(16, 32)

    def forward():
        sparse = (dense * (dense > 0.7)).to_sparse()
        return (torch.sparse.mm(sparse, weight) * 2).sigmoid()

    assert_same(forward, [weight])


def test_vmap_inside_a_recording(net, x):
    def forward():
        s = Heaviside.apply(net["conv1"](x))
        return torch.vmap(lambda y: net["head"](y.flatten()[:128]).sigmoid())(s)

    assert_same(forward, leaves_of(net))


def test_reparametrized_weights(x):
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3))
    assert_same(lambda: Heaviside.apply(conv(x)) * conv(x), list(conv.parameters()))


def test_in_place_on_what_a_recipe_holds(net, x):
    """Stock autograd saves nothing of `a + 1`, so it does not mind that `a` changes afterwards."""
    noise = torch.randn(6, 8, 16, 16)

    def forward():
        a = noise * 1.0 + torch.rand_like(noise)  # random: no recipe, held by reference
        b = a + 1
        y = net["conv1"](x) * b
        a.zero_()
        return y * (b * 2)

    assert_same(forward, leaves_of(net))


def test_in_place_on_spikes_that_a_recipe_holds(net, x):
    def forward():
        s = (net["conv1"](x).detach() > 0).float()
        pooled = F.avg_pool2d(s, 2)
        s.zero_()
        return net["conv2"](pooled)

    assert_same(forward, leaves_of(net))


def test_writing_into_a_buffer(net, x):
    def forward():
        out = torch.zeros(6, 8, 16, 16)
        for n in range(6):
            out[n] = net["conv1"](x[n : n + 1])[0]
        return net["conv2"](out)

    assert_same(forward, leaves_of(net))


def test_rebuilt_once(net, x):
    """The neuron's backward replays conv and batch norm; batch norm's backward wants the conv's output
    a moment later and must find it there."""
    with tape.recording():
        loss = plain(net, x).sum()
    with runs_counted("convolution") as counts:
        loss.backward()
    assert counts["convolution"] == 2  # two convolutions, each once


def test_slices_of_one_tensor_rebuild_it_once(net):
    x = torch.randn(5, 6, 2, 16, 16)

    def forward():
        current = net["bn1"](net["conv1"](x.flatten(0, 1))).view(5, 6, 8, 16, 16)
        v, total = 0.0, 0.0
        for t in range(5):
            v = v * 0.5 + current[t]
            total = total + Heaviside.apply(v) * current[t]
        return total

    assert_same(forward, leaves_of(net))
    with tape.recording():
        loss = forward().sum()
    with runs_counted("convolution") as counts:
        loss.backward()
    assert counts["convolution"] == 1


class Residual(nn.Module):
    """Adds a branch of spikes to a stream in floating point."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.norm(self.conv((x > 0).to(x)))


def test_in_mode_minimal_no_layer_below_a_stream_waits_for_its_turn():
    torch.manual_seed(0)
    x, peaks = torch.randn(4, 4, 32, 32), {}
    for depth in (2, 4):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *(Residual() for _ in range(depth)))
        with runs_counted("convolution") as counts, AllocationCounter() as counter:
            with tape.recording("minimal"):
                loss = model(x).square().sum()
            loss.backward()
        peaks[depth] = counter.peak
        # Forward, the whole stream once for the loss, and each batch norm's input once more but the first.
        assert counts["convolution"] <= 3 * depth + 2
    stock = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, ours in zip(model.parameters(), stock, strict=True):
        assert torch.equal(parameter.grad, ours)
    assert peaks[4] - peaks[2] < x.nbytes / 2  # a block more is no tensor more that waits


class Spiking(nn.Module):
    """Adds a branch that ends in spikes to a stream of spikes, as SEW-ResNet's do."""

    def __init__(self, inplace):
        super().__init__()
        self.conv, self.inplace = nn.Conv2d(16, 16, 3, padding=1), inplace  # no kernel pads as many

    def forward(self, x):
        spikes = Heaviside.apply(self.conv(x.flatten(0, 1))).view_as(x)
        return spikes.add_(x) if self.inplace else x + spikes


@pytest.mark.parametrize("inplace", [False, True])
def test_of_a_stream_of_spikes_few_sums_stand_at_a_time(inplace):
    torch.manual_seed(0)
    x, peaks = (torch.rand(2, 2, 16, 32, 32) > 0.5).float(), {}
    for depth in (4, 12):
        model = nn.Sequential(*(Spiking(inplace) for _ in range(depth)))
        with AllocationCounter() as counter:
            with tape.recording("memory"):
                loss = model(x).square().sum()
            loss.backward()
        peaks[depth] = counter.peak
    ours = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, one in zip(model.parameters(), ours, strict=True):
        assert torch.equal(parameter.grad, one)
    assert peaks[12] - peaks[4] < 3.5 * x.nbytes  # of 8 sums more every fourth, and bits


def test_nothing_rebuilt_stays_alive(net, x):
    with AllocationCounter() as counter:
        with tape.recording():
            loss = plain(net, x).sum()
        held = counter.live
        loss.backward(retain_graph=True)
        gradients = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
        assert counter.live <= held + gradients


def test_batch_norm_updates_its_statistics_once(net, x):
    bn = net["bn1"]
    plain(net, x).sum().backward()
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    for module in (net["bn1"], net["bn2"]):
        module.reset_running_stats()
    with tape.recording():
        loss = plain(net, x).sum()
    loss.backward()
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_in_all_its_forms(net, x, momentum, affine, training, track):
    net["bn1"] = nn.BatchNorm2d(8, momentum=momentum, affine=affine, track_running_stats=track)
    net.train(training)
    assert_same(lambda: plain(net, x), leaves_of(net))


@pytest.mark.parametrize("ceil", [True, False])
def test_max_pooling_indices_are_replayed(net, x, ceil):
    def forward():
        s = Heaviside.apply(net["conv1"](x[..., :15]))
        return F.max_pool2d(s, 3, 2, 1, ceil_mode=ceil) * 3

    saved = assert_same(forward, leaves_of(net))
    indices = [handle for _, dtype, handle in saved.handles if dtype == torch.int64]
    assert len(indices) == 1 and isinstance(indices[0], Replayed)


@pytest.mark.parametrize("pool", ["max_pool1d", "adaptive_max_pool2d", "max_pool2d"])
def test_pools_that_return_indices(net, x, pool):
    def forward():
        s = Heaviside.apply(net["conv1"](x))
        if pool == "max_pool1d":
            return F.max_pool1d(s.flatten(2), 4)
        if pool == "adaptive_max_pool2d":
            return F.adaptive_max_pool2d(s, 5)
        value, index = F.max_pool2d(s, 2, return_indices=True)
        return F.max_unpool2d(value, index, 2)

    assert_same(forward, leaves_of(net))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(net, x, dtype):
    def forward():
        with torch.autocast("cpu", dtype=dtype):
            return plain(net, x).float()

    assert_same(forward, leaves_of(net))


def test_backward_inside_autocast(net, x):
    def forward(record):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if record:
                with tape.recording():
                    loss = plain(net, x).float().sum()
            else:
                loss = plain(net, x).float().sum()
            return torch.autograd.grad(loss, leaves_of(net))

    for a, b in zip(forward(False), forward(True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_no_random_number_in_the_backward(net, x, p):
    def forward():
        s = Heaviside.apply(net["conv1"](x))
        return net["conv2"](F.dropout(s, p)) + net["conv2"](F.dropout2d(s, p))

    saved = assert_same(forward, leaves_of(net))
    # The mask is a bit an element, not a float.
    assert not [entry for entry in saved.of(Kept) if entry[0] == (6, 8, 16, 16)]
    with tape.recording():
        loss = forward().sum()
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(state, torch.get_rng_state())


def test_tensors_that_cost_nothing(x):
    """Views of the input, parameters and their transposes are held by reference, not by copy."""
    weight = nn.Parameter(torch.randn(16 * 16, 4))
    with AllocationCounter() as counter:
        with tape.recording():
            out = x.view(12, 256)[::2] @ weight
            out = out + x[:, 0].reshape(6, 256) @ weight
        assert counter.live <= 2 * out.nbytes
    out.sum().backward()


def test_constants_cost_nothing():
    big = torch.rand(64, 1024, requires_grad=True)
    with AllocationCounter() as counter:
        with tape.recording():
            y = (big * torch.ones_like(big) * torch.full_like(big, 0.5)).sum()
        assert counter.live < 1000
    y.backward()
    assert torch.equal(big.grad, torch.full_like(big, 0.5))


def test_a_small_output_does_not_hold_its_large_input():
    random = torch.rand(64, 4096, requires_grad=True)
    with AllocationCounter() as counter:
        with tape.recording():
            large = random + torch.rand(64, 4096)
            small = large.mean(1)
            y = (small * small).sum()
        del large
        assert counter.live < 4096
    y.backward()


def test_several_consumers_of_one_spike_tensor(net, x):
    def forward():
        s = Heaviside.apply(net["conv1"](x))
        return net["conv2"](s) + s * net["conv2"](s) + F.avg_pool2d(s, 3, 1, 1)

    saved = assert_same(forward, leaves_of(net))
    bits = {
        id(leaf)
        for _, _, handle in saved.handles
        for leaf in leaves_of_recipe(handle)
        if isinstance(leaf, Packed)
    }
    assert len(bits) == 1


def test_retain_graph_and_several_backward_calls(net, x):
    expected = plain(net, x).sum()
    expected.backward(retain_graph=True)
    expected.backward()
    twice = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with tape.recording():
        loss = plain(net, x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    for a, p in zip(twice, net.parameters(), strict=True):
        assert torch.equal(a, p.grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_of_a_part_of_the_graph(net, x):
    x = x.requires_grad_()

    def grads(loss):
        first = torch.autograd.grad(loss, net["head"].weight, retain_graph=True)
        rest = torch.autograd.grad(loss, [x, net["conv1"].weight, net["bn2"].bias])
        return [*first, *rest]

    expected = grads(plain(net, x).sum())
    with tape.recording():
        loss = plain(net, x).sum()
    for a, b in zip(expected, grads(loss), strict=True):
        assert torch.equal(a, b)


def test_two_losses_from_one_forward(net, x):
    def losses():
        a = net["bn1"](net["conv1"](x))
        s = Heaviside.apply(a)
        return net["conv2"](s).sum(), (a * s).mean()

    for loss in losses():
        loss.backward(retain_graph=True)
    expected = [p.grad for p in leaves_of(net)]
    net.zero_grad()
    with tape.recording():
        taped = losses()
    for loss in reversed(taped):
        loss.backward(retain_graph=True)
    for a, p in zip(expected, leaves_of(net), strict=True):
        assert (a is None and p.grad is None) or torch.allclose(a, p.grad, rtol=1e-6, atol=1e-5)


def test_nested_recordings_are_one(net, x):
    with tape.recording("speed") as outer, tape.recording("memory") as inner:
        assert inner is outer is tape.current()
        loss = plain(net, x).sum()
    assert tape.current() is None
    loss.backward()


def test_an_exception_in_forward_leaves_nothing_behind(net, x):
    net["conv2"].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tape.recording():
        plain(net, x)
    assert tape.current() is None
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    assert _get_current_dispatch_mode_stack() == []
    kept = torch.ones(3, requires_grad=True).exp()
    assert kept.grad_fn._saved_result is not None  # no hook of ours answers


def test_an_exception_inside_paused(net):
    with tape.recording():
        with pytest.raises(ZeroDivisionError), tape.paused():
            1 / 0  # noqa: B018
        a = torch.rand(64, 64, requires_grad=True)
        assert isinstance(tape.pack(a * 2), Replayed)


def test_paused_below_another_mode():
    with tape.recording(), BaseTorchDispatchMode():
        with tape.paused():
            a = torch.rand(64, 64) * 2
        assert isinstance(tape.pack(a * 2), Replayed)
        assert isinstance(tape.pack(a), Kept)


def test_threads_have_tapes_of_their_own(net, x):
    expected = torch.autograd.grad(plain(net, x).sum(), leaves_of(net))
    results = {}
    barrier = threading.Barrier(2)

    def work(name, record):
        barrier.wait()
        if record:
            with tape.recording():
                loss = plain(net, x).sum()
        else:
            assert tape.current() is None
            loss = plain(net, x).sum()
        results[name] = torch.autograd.grad(loss, leaves_of(net))

    net.eval()  # running statistics are shared between the threads
    expected = torch.autograd.grad(plain(net, x).sum(), leaves_of(net))
    threads = [threading.Thread(target=work, args=(i, i == 0)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        for a, b in zip(expected, result, strict=True):
            assert torch.equal(a, b)


def test_backward_in_another_thread(net, x):
    expected = torch.autograd.grad(plain(net, x).sum(), leaves_of(net))
    with tape.recording():
        loss = plain(net, x).sum()
    got = []
    thread = threading.Thread(target=lambda: got.extend(torch.autograd.grad(loss, leaves_of(net))))
    thread.start()
    thread.join()
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_backward_inside_the_recording(net, x):
    expected = torch.autograd.grad(plain(net, x).sum(), leaves_of(net))
    with tape.recording():
        got = torch.autograd.grad(plain(net, x).sum(), leaves_of(net))
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_double_backward_is_refused(net, x):
    with tape.recording():
        loss = plain(net, x).sum()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, leaves_of(net), create_graph=True)


def test_a_parameter_changed_before_backward_is_refused(net, x):
    with tape.recording():
        loss = plain(net, x).sum()
    with torch.no_grad():
        net["conv2"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_check_mode_names_the_module_whose_replay_differs(x):
    weight = nn.Parameter(torch.randn(2, 2, 3, 3))
    outside = torch.randn(6, 2, 16, 16)

    def forward():
        hidden = F.conv2d(x, weight, padding=1) * outside
        return (hidden * hidden).sum()

    with tape.recording(check=True) as recorded:
        recorded.where = "the block"
        loss = forward()
    outside.data.mul_(2)  # .data has a version counter of its own: autograd can't see it either
    with pytest.raises(RuntimeError, match=r"the block: .* \(6, 2, 16, 16\) .*past its version counter"):
        loss.backward()


@pytest.mark.parametrize("context", ["no_grad", "inference"])
def test_no_tape_where_there_is_no_graph(net, x, context):
    with (
        torch.no_grad() if context == "no_grad" else torch.inference_mode(),
        tape.recording() as recorded,
    ):
        assert recorded is None
        plain(net, x)


def test_functorch_transforms_run_stock(net, x):
    def smooth(x):
        return net["conv2"](net["bn1"](net["conv1"](x)).sigmoid()).sum()

    def loss(x):
        with tape.recording() as recorded:
            assert recorded is None
            return smooth(x)

    net.eval()
    (expected,) = torch.autograd.grad(smooth(x.requires_grad_()), x)
    assert torch.equal(torch.func.grad(loss)(x.detach()), expected)


def test_checkpoint_inside_a_recording(net, x):
    from torch.utils.checkpoint import checkpoint

    def forward(taped):
        with tape.recording() if taped else torch.enable_grad():
            s = Heaviside.apply(net["conv1"](x))
            return checkpoint(lambda s: net["conv2"](s).relu() * 2, s, use_reentrant=False)

    expected = torch.autograd.grad(forward(False).sum(), [net["conv1"].weight, net["conv2"].weight])
    got = torch.autograd.grad(forward(True).sum(), [net["conv1"].weight, net["conv2"].weight])
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_around_a_recording_runs_nothing_again(net, x):
    from torch.utils.checkpoint import checkpoint

    def forward(x):
        with tape.recording():
            return net["conv2"](Heaviside.apply(net["bn1"](net["conv1"](x))))

    weights = [net["conv1"].weight, net["conv2"].weight]
    expected = torch.autograd.grad(forward(x).sum(), weights)
    counted = int(net["bn1"].num_batches_tracked)
    got = torch.autograd.grad(checkpoint(forward, x, use_reentrant=False).sum(), weights)
    assert net["bn1"].num_batches_tracked == counted + 1
    assert all(map(torch.equal, got, expected))


def test_no_tensor_outlives_its_graph(net, x):
    with tape.recording():
        hidden = net["bn1"](net["conv1"](x))
        watched = weakref.ref(hidden.sigmoid().untyped_storage())
        saves_its_own_output = hidden.sigmoid()
        storage = weakref.ref(saves_its_own_output.untyped_storage())
        loss = (Heaviside.apply(hidden) * saves_its_own_output).sum()
    loss.backward()
    del hidden, saves_its_own_output, loss
    assert storage() is None and watched() is None
    gc.collect()
    dead = [entry for entry in entries._entries.values() if entry() is None]
    assert not any(hasattr(entry, "handle") for entry in dead)


def test_saved_outputs_make_no_cycle():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.special.expm1(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, grad):
            return grad * (ctx.saved_tensors[0] + 1)

    leaf = torch.randn(64, 64, requires_grad=True)
    gc.disable()
    try:
        with tape.recording(), tape.suspended():
            y = Keeps.apply(leaf * torch.rand(64, 64))
            storage = weakref.ref(y.untyped_storage())
        del y
        assert storage() is None
    finally:
        gc.enable()


def test_suspended_keeps_everything(net, x):
    saved = Saved()
    with tape.recording(observer=saved), tape.suspended():
        loss = plain(net, x).sum()
    assert len(saved.of(Kept)) == len(saved.handles)
    expected = torch.autograd.grad(plain(net, x).sum(), leaves_of(net))
    for a, b in zip(expected, torch.autograd.grad(loss, leaves_of(net)), strict=True):
        assert torch.equal(a, b)


def test_a_long_chain_gets_anchors(x):
    """An ordinary float residual stream: rebuilding it must not run ever more convolutions."""
    blocks = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(8))

    def forward():
        stream = x
        for block in blocks:
            stream = stream + block(Heaviside.apply(stream))
        return stream

    assert_same(forward, list(blocks.parameters()))
    with tape.recording():
        loss = forward().sum()
    with runs_counted("convolution") as counts:
        loss.backward()
    assert counts["convolution"] <= len(blocks)


def test_owned_values_are_fresh_and_only_once():
    seen = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            seen.append((tape.owns(x), tape.owns(x)))
            return grad

    leaf = torch.randn(64, 64, requires_grad=True)
    with tape.recording():
        fresh = leaf * 2
        Node.apply(fresh).sum().backward()
        shared = leaf * 3
        (Node.apply(shared) + Node.apply(shared.view(-1)).view(64, 64)).sum().backward()
        Node.apply(leaf).sum().backward()
    assert seen[0] == (True, False)  # rebuilt for it alone; asking again is no
    assert seen[1] == (False, False)  # the other node still needs the value
    assert seen[2][1] is False
    assert seen[3] == (False, False)  # the leaf itself
    Node.apply(leaf * 2).sum().backward()
    assert seen[4] == (False, False)  # no tape


def test_marked_spikes_are_packed_and_opaque_states_kept():
    weight = torch.randn(64, 64, requires_grad=True)
    saved = Saved()
    with tape.recording(observer=saved):
        with tape.paused():
            s = (torch.rand(128, 64) > 0.7).float()
            v = torch.rand(128, 64)
        tape.mark_spikes(s)
        tape.mark_opaque(v)
        loss = (s @ weight * v).sum()
    assert [shape for shape, _, _ in saved.of(Packed)] == [(128, 64)]
    loss.backward()
    assert torch.equal(weight.grad, s.t() @ v)


def test_checksum_sees_order_and_sign():
    a = torch.tensor([1.0, 2.0, -0.0])
    assert torch.equal(handles.checksum(a), handles.checksum(a.clone()))
    for other in ([2.0, 1.0, -0.0], [1.0, 2.0, 0.0]):
        assert not torch.equal(handles.checksum(a), handles.checksum(torch.tensor(other)))


def test_unknown_mode():
    with pytest.raises(ValueError, match="'fast'"):
        tape.recording("fast")


def test_a_use_in_a_graph_that_is_gone_is_no_use():
    """A trace goes through steps that each have a backward: none waits for those before."""
    x = torch.rand(2, 64, 64)
    w = torch.ones(64, 8, requires_grad=True)
    waiting = []
    with tape.recording():
        trace = x[0].gt(0.5).float() * 0.5
        (trace @ w).sum().backward()
    with tape.recording():
        later = trace * 0.5 + x[1].gt(0.5).float()
        weights = w * 1.0
        weights.register_hook(lambda _: waiting.append(entries.look_up(trace).cache))
        loss = (later @ weights).sum()
    loss.backward(retain_graph=True)
    first = w.grad.clone()
    loss.backward()
    assert waiting == [None, None]
    assert torch.equal(w.grad - first, torch.ones_like(w) * later.sum(0).unsqueeze(1))
    assert entries.look_up(trace).uses == entries.look_up(later).uses == 0
