"""Several threads, each with a tape: what one does is no business of the others."""

import gc
import sys
import threading

import pytest
import snntorch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin import tape
from snn_reversible_plugin.tape import origins


def test_a_write_outlives_another_threads_start():
    """A tape that another thread starts in between: a write through an alias is not forgotten."""
    x, weight = torch.rand(4, 3), torch.rand(3, 3, requires_grad=True)
    expected = None
    for taped in (False, True):
        weight.grad = None
        with tape.recording() if taped else torch.enable_grad():
            hidden = (x > 0.5).float() @ torch.ones(3, 3)
            hidden.data.mul_(2)

            def other():
                with tape.recording():
                    pass

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            loss = (hidden @ weight).square().sum()
        loss.backward()
        if expected is None:
            expected = weight.grad
    assert torch.equal(weight.grad, expected)


def test_a_write_is_remembered_in_the_next_recording():
    weight = torch.rand(3, 3, requires_grad=True)
    spikes = (torch.rand(4, 3) > 0.5).float()
    with tape.recording():
        hidden = spikes @ torch.ones(3, 3)
        hidden.data.add_(1)
    with tape.recording():
        loss = (hidden @ weight).sum()
    loss.backward()
    assert torch.equal(weight.grad, hidden.t() @ torch.ones(4, 3))


def test_the_table_does_not_grow(monkeypatch):
    monkeypatch.setattr(origins, "_many", 0)
    alive = torch.zeros(3)
    with tape.recording():
        alive.add_(1)
        for number in range(50):
            torch.zeros(number + 1).add_(1)
    monkeypatch.setattr(origins, "_many", 0)
    origins.tidy()
    assert all(entry() is not None for entry in origins._entries.values())
    storages = {entry().untyped_storage()._cdata for entry in origins._entries.values()}
    assert set(origins._writes) <= storages


def test_garbage_may_be_collected_while_the_table_is_swept(monkeypatch):
    """Whose finalizers, or the threads that take over meanwhile, enter more."""
    alive = [torch.ones(1) for _ in range(9000)]
    entered = []

    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            entered.append(torch.ones(1))
            origins.enter(entered[-1], None)

    for one in alive:
        origins.enter(one, None)
    monkeypatch.setattr(origins, "_many", 0)
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1000, *before[1:])
    try:
        for _ in range(20):
            Garbage()
        origins.tidy()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert len(entered) == 20


@pytest.mark.usefixtures("_threads_take_turns_often")
def test_several_threads_may_sweep_the_table_at_once(monkeypatch):
    errors = []

    def sweep():
        try:
            for _ in range(20):
                for one in [torch.ones(1) for _ in range(1000)]:
                    origins.enter(one, None)
                origins._many = 0
                origins.tidy()
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(origins, "_many", 0)
    threads = [threading.Thread(target=sweep) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def of_spikingjelly():
    return nn.Sequential(
        nn.Linear(6, 16), neuron.LIFNode(step_mode="m"), nn.Linear(16, 8),
        neuron.ParametricLIFNode(step_mode="m", v_reset=None), nn.Linear(8, 2),
    )  # fmt: skip


class OfSnnTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(6, 16), snntorch.Leaky(beta=0.9, learn_beta=True)
        self.out, self.syn = nn.Linear(16, 4), snntorch.Synaptic(alpha=0.8, beta=0.7)

    def forward(self, x_seq):
        mem, syn, out, total = self.lif.init_leaky(), *self.syn.init_synaptic(), 0
        for x in x_seq:
            spikes, mem = self.lif(self.fc(x), mem)
            spikes, syn, out = self.syn(self.out(spikes), syn, out)
            total = total + spikes + out
        return total


def trained(make, seed, steps, settings):
    """All gradients of some steps of training."""
    with LOCK:  # random numbers are the process's own
        torch.manual_seed(seed)
        net, x_seq = make(), torch.rand(5, 3, 6) * 2
    if settings is not None:
        srp.convert_to_reversible(net, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    gradients = []
    for _ in range(steps):
        functional.reset_net(net)
        optimizer.zero_grad()
        net(x_seq).square().sum().backward()
        gradients += [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        functional.reset_net(net)
        with torch.no_grad():
            gradients.append(net(x_seq))
    return gradients


LOCK = threading.Lock()


@pytest.fixture
def _threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("_threads_take_turns_often")
@pytest.mark.parametrize("make", [of_spikingjelly, OfSnnTorch])
@pytest.mark.parametrize("arithmetic", ["stock", "auto"])
def test_two_models_train_and_one_is_evaluated_at_once(make, arithmetic):
    settings, steps = {"arithmetic": arithmetic}, 12
    alone = [trained(make, seed, steps, None if arithmetic == "stock" else settings) for seed in (1, 2)]
    found, errors, done = {}, [], threading.Event()
    evaluated = srp.convert_to_reversible(make(), **settings)
    x_seq = torch.rand(5, 3, 6)
    with torch.no_grad():
        functional.reset_net(evaluated)
        expected = evaluated(x_seq)

    def train(seed):
        try:
            found[seed] = trained(make, seed, steps, settings)
        except BaseException as error:
            errors.append(error)

    def evaluate():
        try:
            while not done.is_set():
                functional.reset_net(evaluated)
                with torch.no_grad():
                    assert torch.equal(evaluated(x_seq), expected)
                # A forward with a gradient, and no backward.
                functional.reset_net(evaluated)
                assert torch.equal(evaluated(x_seq), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    beside = threading.Thread(target=evaluate)
    for thread in (*threads, beside):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    beside.join()
    assert not errors, errors
    for seed, expected_gradients in zip((1, 2), alone, strict=True):
        for a, b in zip(found[seed], expected_gradients, strict=True):
            assert torch.equal(a, b)
