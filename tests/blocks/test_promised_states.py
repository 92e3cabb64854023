"""The membranes that a chain leaves in its neurons: the plain run's, whenever and however they are read."""

import copy
import pickle

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from reading_states import SCRIPTS as READING
from reading_states import (
    detach,
    learns_from_membranes,
    membranes,
    neurons,
    reads_after_backward,
    reads_before_backward,
    reset,
    table,
)
from snn_reversible_plugin.modules.states import reset_states
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.final_membrane import FinalMembrane, _promises
from tests.blocks.test_chain import NEURONS, assert_same, chain
from two_processes import together


def promises(model):
    values = (dict.values(table(module)) for module in neurons(model))
    return [value for of_neuron in values for value in of_neuron if isinstance(value, FinalMembrane)]


def batch(seed=1):
    torch.manual_seed(seed)
    return torch.randn(3, 2, 4, 5, 4).mul_(2)


def outcome(script, make, reversible, x):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, srp.RevSSequence):
            module.reversible = reversible
    x = x().requires_grad_()
    found = script(model, x)
    return [*found, x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def same(script, make, x=batch):
    plain, ours = (outcome(script, make, reversible, x) for reversible in (False, True))
    assert len(plain) == len(ours) > 8
    for a, b in zip(plain, ours, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
            assert a.requires_grad == b.requires_grad


def evaluates_after_training(model, x):
    model(x).sum().backward()
    model.eval()
    with torch.no_grad():
        return [model(x), *membranes(model)]


def is_copied_and_pickled(model, x):
    out = model(x)
    copied = copy.deepcopy(model) if not out.requires_grad else model
    out.sum().backward()
    detach(model)
    found = membranes(pickle.loads(pickle.dumps(model))) + membranes(copied)
    reset(copied)
    return [*found, copied(x)]


SCRIPTS = [*READING, evaluates_after_training, is_copied_and_pickled]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("node", ["if", "plif"])
def test_membranes_are_the_plain_runs(script, node):
    same(script, lambda: chain(depth=2, node=node))


@pytest.mark.parametrize("script", [reads_before_backward, reads_after_backward, learns_from_membranes])
def test_with_dropout_other_neurons_and_a_shared_block(script):
    def make():
        block = srp.RevSBlock(
            nn.Sequential(neuron.QIFNode(step_mode="m"), layer.Dropout(0.3, step_mode="m")),
            nn.Sequential(NEURONS["lif"](), nn.Linear(4, 4), neuron.EIFNode(step_mode="m")),
        )
        return nn.Sequential(srp.RevSSequence([block, chain(depth=1, p=0.2).blocks[0], block], check=True))

    same(script, make)


@pytest.mark.parametrize("script", [reads_before_backward, reads_after_backward, learns_from_membranes])
def test_inside_a_converted_network(script):
    def make():
        conv = layer.Conv2d(4, 4, 3, padding=1, step_mode="m")
        net = nn.Sequential(conv, chain(depth=2), neuron.LIFNode(step_mode="m"))
        return srp.convert_to_reversible(net)

    same(script, make)


def test_a_pair_of_streams_and_membranes():
    def both(model, x):
        y1, y2 = model(x.chunk(2, 2))
        found = membranes(model)
        (y1.sum() + 2 * y2.sum() + found[1].sum()).backward()
        return [y1, y2, *found]

    same(both, lambda: chain(depth=2))


@pytest.mark.slow
def test_held_memory_is_flat_in_depth():
    held = {}
    for depth in (8, 100):
        model, x = chain(depth), torch.randn(2, 1, 4, 8, 8)
        held[depth] = count_step(lambda model=model, x=x: model(x).sum())[0]
    assert held[100] <= 1.02 * held[8]
    assert held[8] < 2 * 2 * 4 * 8 * 8 * 4


def test_a_reset_reads_nothing_and_lets_go():
    model, runs = chain(), []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: runs.append(1))
    for refresh in (functional.reset_net, reset_states):
        before = len(_promises())
        out = model(batch())
        assert len(promises(model)) == len(_promises()) - before == 12
        assert len(runs) == 3
        assert "reset" in vars(neurons(model)[0])
        refresh(model)
        assert not promises(model) and len(_promises()) == before
        assert len(runs) == 3
        assert all(module.v == 0.0 and "reset" not in vars(module) for module in neurons(model))
        out.sum().backward()
        assert len(runs) == 6
        assert all(module.v == 0.0 for module in neurons(model))
        runs.clear()


def test_reading_one_walks_once_for_all():
    model, runs = chain(), []
    for block in model.blocks:
        block.f.register_forward_hook(lambda *_: runs.append(1))
    out = model(batch())
    membranes(model)
    assert len(runs) == 6
    out.sum().backward()
    assert len(runs) == 9


def test_a_second_call_from_where_the_first_one_ended_promises_nothing():
    model = chain()
    model(batch())
    model(batch())
    assert not promises(model)
    functional.reset_net(model)
    with torch.no_grad():
        model(batch())
    assert not promises(model)


def test_a_forward_that_breaks_off_leaves_no_promise():
    model = chain()

    def fail(*_):
        raise ArithmeticError

    hook = model.blocks[2].g[1].register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        model(batch())
    hook.remove()
    assert not promises(model)
    assert all(module.v == 0.0 for module in neurons(model)[:10])


def test_what_a_membrane_was_computed_from_must_be_unchanged():
    def change_weight(model, _out):
        with torch.no_grad():
            model.blocks[0].f[1].weight.mul_(2)

    def replace_weight(model, _out):
        model.blocks[0].f[1].weight = nn.Parameter(torch.zeros(2, 2, 3, 3))

    def change_output(_model, out):
        with torch.no_grad():
            out.mul_(2)

    for change, said in (
        (change_weight, r"blocks\.0\.f\.1\.weight was modified"),
        (replace_weight, "its parameters are not those"),
        (change_output, "its output, or a state .* was modified"),
    ):
        model = chain()
        out = model(batch())
        change(model, out)
        # An optimizer of others' parameters looks for what is promised, and steps all the same.
        other = nn.Parameter(torch.zeros(1))
        other.grad = torch.ones(1)
        torch.optim.SGD([other], lr=1.0).step()
        assert other.item() == -1.0
        with pytest.raises(RuntimeError, match=said):
            neurons(model)[0].v  # noqa: B018
        functional.reset_net(model)


def _worker(rank):
    both = []
    for reversible in (True, False):
        torch.manual_seed(0)
        model = chain()
        model.reversible = reversible
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        found = []
        for read in (False, True):
            torch.manual_seed(rank)
            out = parallel(torch.randn(2, 2, 4, 3, 3) * 2)
            assert len(promises(model)) == (12 if reversible else 0)
            loss = out.square().sum()
            if read:
                loss = loss + sum(v.mean() for v in membranes(model))
            loss.backward()
            found += [v.detach() for v in membranes(model)]
            optimizer.step()
            functional.reset_net(model)
        both.append(found + [p.detach() for p in model.parameters()])
    return both


def test_two_processes(tmp_path):
    for ours, plain in together(tmp_path, _worker):
        assert_same(ours, plain)
