"""The states that a chain leaves in snnTorch's neurons: the plain run's, held once they are read."""

import copy
import itertools

import pytest
import snntorch
import torch
from torch import nn

import snn_reversible_plugin as srp
from reading_states import (
    carries_on,
    detach,
    detaches_before_backward,
    membranes,
    neurons,
    reads_before_backward,
    reset,
)
from snn_reversible_plugin.blocks import starts
from snn_reversible_plugin.modules.states import reset_states
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.final_membrane import _promises
from tests.blocks.test_chain import SNNTORCH, Loop, assert_same
from tests.blocks.test_promised_states import SCRIPTS, is_copied_and_pickled, promises, same
from two_processes import together


def sequence():
    torch.manual_seed(1)
    return torch.randn(4, 2, 6).mul_(3)


def one_step():
    return sequence()[0]


class Step(Loop):
    """A time step a call: what several calls add to a weight's gradient has one order then."""

    def forward(self, x):
        return self.fc(self.lif(x))


def chain(kind="Leaky", depth=3, branch=Loop):
    blocks = [srp.RevSBlock(branch(kind), branch(kind), dim=-1) for _ in range(depth)]
    return srp.RevSSequence(blocks)


def steps(kind="Leaky"):
    return chain(kind, 2, Step)


def is_copied(model, x):
    model(x).sum().backward()
    detach(model)
    copied = copy.deepcopy(model)
    assert type(copied.blocks[0].f.lif._buffers) is dict
    return [*membranes(copied), copied(x), *membranes(copied)]


def is_copied_unread(model, x):
    """Stock can't be copied where states have a graph."""
    with torch.no_grad():
        model(x)
    copied = copy.deepcopy(model)
    return [*membranes(copied), copied(x), *membranes(model)]


OF_SEVERAL_CALLS = (carries_on, detaches_before_backward)
OF_ONE_CALL = [one for one in SCRIPTS if one not in (*OF_SEVERAL_CALLS, is_copied_and_pickled)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("script", [*OF_ONE_CALL, is_copied, is_copied_unread])
@pytest.mark.parametrize("kind", ["Leaky", "RSynaptic"])
def test_states_are_the_plain_runs(script, kind):
    same(script, lambda: chain(kind, depth=2), sequence)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("script", [reads_before_backward, carries_on])
@pytest.mark.parametrize("kind", SNNTORCH)
def test_states_of_every_kind_are_the_plain_runs(script, kind):
    same(script, lambda: steps(kind), one_step)


def test_states_that_are_detached_before_the_backward():
    same(detaches_before_backward, steps, one_step)


def resets_and_goes_on(model, x):
    found = []
    for how in (reset, reset_states, lambda _: snntorch.Leaky.reset_hidden()):
        loss = model(x).square().sum()
        loss.backward()
        found += [loss, *membranes(model)]
        how(model)
        found += membranes(model)
    return [*found, model(x)]


def starts_from_states_of_the_users(model, x):
    found = []
    for value in (0.7, -0.0):
        for module in neurons(model):
            module.mem = torch.full((2, 3), value)
        out = model(x)
        assert not promises(model) or not model.reversible
        found += [out, *membranes(model)]
        out.sum().backward()
    return found


def starts_from_a_learned_state(model, x):
    start = torch.zeros(2, 3, requires_grad=True)
    for module in neurons(model):
        module.mem = start * 1
    model(x).square().sum().backward()
    return [start.grad]


def ends_with_all_states_zero(model, x):
    out = model(x * 0) + model(x)
    out.square().sum().backward()
    return [out, *membranes(model)]


@pytest.mark.parametrize(
    "script",
    [
        resets_and_goes_on,
        starts_from_states_of_the_users,
        starts_from_a_learned_state,
        ends_with_all_states_zero,
    ],
)
def test_states_that_a_call_starts_from(script):
    same(script, steps, one_step)


@pytest.mark.parametrize("x", [one_step, lambda: torch.zeros(2, 6)])
def test_a_neuron_of_two_blocks(x):
    """What it is left in by the first one has a gradient, be it zero or not."""

    def make():
        shared = Step()
        blocks = [srp.RevSBlock(shared, Step(), dim=-1), srp.RevSBlock(Step(), shared, dim=-1)]
        return srp.RevSSequence(blocks, check=True)

    same(reads_before_backward, make, x)


def test_inside_a_converted_network():
    def make():
        return srp.convert_to_reversible(nn.Sequential(nn.Linear(6, 6), steps()))

    for script in (reads_before_backward, carries_on):
        same(script, make, one_step)


class ResetsToOne(snntorch.Leaky):
    def reset_mem(self):
        self.mem = torch.ones_like(self.mem)
        return self.mem


class ReadsItsReset(snntorch.Leaky):
    def mem_reset(self, mem):
        return super().mem_reset(mem) + 0.5 * getattr(self, "reset", 1)


@pytest.mark.parametrize("kind", [ResetsToOne, ReadsItsReset])
def test_neurons_with_methods_of_the_users(kind, monkeypatch):
    monkeypatch.setitem(SNNTORCH, "own", lambda: kind(0.8, init_hidden=True))
    monkeypatch.setattr(starts, "may_look", lambda _device: False)
    same(resets_and_goes_on, lambda: steps("own"), one_step)


def held_by(depth, before, kind="Leaky"):
    torch.manual_seed(0)
    model, x = chain(kind, depth), torch.randn(4, 64, 6) * 3
    before(model, x)
    return count_step(lambda: model(x).sum())[0]


def resets_after_a_step(model, x):
    model(x).sum().backward()
    reset(model)


def resets_all_after_a_step(model, x):
    model(x).sum().backward()
    snntorch.Leaky.reset_hidden()


def freshens_after_a_step(model, x):
    model(x).sum().backward()
    reset_states(model)


def loses_sight(model, x):
    """As on a device."""
    resets_after_a_step(model, x)
    assert all(module._buffers.is_zero("mem", module.mem) for module in neurons(model))


@pytest.mark.parametrize(
    ("before", "kind"),
    [
        (lambda *_: None, "RSynaptic"),
        (resets_after_a_step, "Leaky"),
        (freshens_after_a_step, "Alpha"),
        (resets_all_after_a_step, "Leaky"),
        (loses_sight, "Leaky"),
    ],
)
@pytest.mark.one_in(5)
def test_held_memory_is_flat_in_depth(before, kind, monkeypatch):
    if before is loses_sight:
        monkeypatch.setattr(starts, "may_look", lambda _device: False)
    few, many = held_by(8, before, kind), held_by(24, before, kind)
    assert many <= 1.02 * few
    assert few <= 4 * 64 * 6 * 4 + 64


def test_a_reset_reads_nothing_and_lets_go():
    model, runs = chain(), []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: runs.append(1))
    for how in (reset, reset_states):
        before = len(_promises())
        out = model(sequence())
        assert len(promises(model)) == len(_promises()) - before == 6
        how(model)
        assert not promises(model) and len(_promises()) == before
        assert len(runs) == 3
        assert not any(module.mem.any() for module in neurons(model))
        assert not any("reset_mem" in vars(module) for module in neurons(model)) or how is reset_states
        out.sum().backward()
        assert len(runs) == 6
        assert not any(module.mem.any() for module in neurons(model))
        runs.clear()


def test_zeros_that_somebody_wrote_to_are_none(monkeypatch):
    monkeypatch.setattr(starts, "may_look", lambda _device: False)
    model = chain()
    model(sequence())
    reset(model)
    neuron = neurons(model)[0]
    assert neuron._buffers.is_zero("mem", neuron.mem)
    neuron.mem.add_(1)
    assert not neuron._buffers.is_zero("mem", neuron.mem)
    model(sequence())
    assert len(promises(model)) == 5


def test_a_forward_that_breaks_off_leaves_the_states_from_before():
    model = chain()
    model(sequence()).sum().backward()
    reset(model)

    def fail(*_):
        raise ArithmeticError

    hook = model.blocks[2].g.fc.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        model(sequence())
    hook.remove()
    assert not promises(model)
    assert all(module.mem.shape == (2, 3) and not module.mem.any() for module in neurons(model)[:5])


def test_a_compiled_network_after_an_eager_step():
    model = chain(depth=1)
    x = sequence()
    plain = copy.deepcopy(model)
    plain.reversible = False
    for one in (plain, model):
        one(x).sum().backward()
        reset(one)
    compiled = torch.compile(model, backend="eager")
    assert_same([plain(x), *membranes(plain)], [compiled(x), *membranes(model)])


def _worker(rank):
    found = []
    for reversible, broadcast in itertools.product((True, False), (True, False)):
        torch.manual_seed(0)
        model = steps()
        model.reversible = reversible
        if reversible:
            srp.convert_to_reversible(model, arithmetic="stock")
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for read in (False, True, False):
            torch.manual_seed(rank)
            out = parallel(torch.randn(2, 6) * 3)
            assert len(promises(model)) == (4 if reversible else 0)
            loss = out.square().sum()
            if read:
                loss = loss + sum(v.mean() for v in membranes(model))
            loss.backward()
            found += [v.detach().clone() for v in membranes(model)]
            optimizer.step()
            reset(model)
        found += [p.detach() for p in model.parameters()]
    return found


def test_two_processes(tmp_path):
    for found in together(tmp_path, _worker):
        half = len(found) // 2
        assert_same(found[:half], found[half:])
