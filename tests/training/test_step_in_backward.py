"""Optimizers that step in the backward train as they do after it, hold one gradient, and refuse whom
they can't serve."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

import snn_reversible_plugin as srp
from snn_reversible_plugin.reports.measure import AllocationCounter
from two_processes import together

OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, amsgrad=True),
    "AdamW, one by one": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=False),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, centered=True),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=1e-2),
}


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(6, 16),
        neuron.ParametricLIFNode(),
        layer.Linear(16, 16),
        neuron.LIFNode(),
        layer.Linear(16, 3),
    )
    functional.set_step_mode(net, "m")
    return net


def groups_of(net):
    return [
        {"params": list(net[0].parameters()), "lr": 0.05},
        {"params": [p for part in net[1:] for p in part.parameters()]},
    ]


def train(net, make, in_backward, steps=4):
    optimizer = make(groups_of(net))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    if in_backward:
        srp.step_in_backward(optimizer, net)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x_seq = torch.rand(5, 4, 6, generator=generator) * 3
        optimizer.zero_grad()
        net(x_seq).square().mean().backward()
        optimizer.step()
        schedule.step()
        functional.reset_net(net)
    return list(net.state_dict().values()), optimizer.state_dict()


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("converted", [False, True])
def test_parameters_and_state_are_those_of_an_ordinary_step(name, converted):
    ours, theirs = network(), network()
    if converted:
        srp.convert_to_reversible(ours)
    assert_same(train(ours, OPTIMIZERS[name], True), train(theirs, OPTIMIZERS[name], False))


def test_tied_weights_are_stepped_once():
    def tied():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    after = []
    for in_backward in (True, False):
        net = tied()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
        if in_backward:
            srp.step_in_backward(optimizer, net)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        after.append(net.state_dict())
    assert_same(*after)


def test_only_one_gradient_lives_at_a_time():
    peaks = {}
    for in_backward in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(8)])
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        if in_backward:
            srp.step_in_backward(optimizer, net)
        for _ in range(2):
            optimizer.zero_grad()
            with AllocationCounter() as counter:
                net(torch.ones(1, 256)).sum().backward()
            peaks[in_backward] = counter.peak
            optimizer.step()
    size = 256 * 256 * 4
    assert peaks[False] >= 8 * size
    assert peaks[True] < 2 * size


@pytest.mark.parametrize("to_none", [True, False])
def test_zeroing_throws_away_what_was_used(to_none):
    """Stock would train on without that gradient: the next backward is refused before it moves anything."""
    net = nn.Linear(2, 2)
    optimizer, _ = stepping(net)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad(set_to_none=to_none)
    once = copy.deepcopy(net.state_dict())
    for again in (lambda: net(torch.ones(1, 2)).sum().backward(), optimizer.step):
        with pytest.raises(RuntimeError, match=r"the gradient of (weight|bias) was zeroed without"):
            again()
    assert_same(net.state_dict(), once)


def test_a_backward_that_was_given_up_is_ended_by_a_step():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer, _ = stepping(net)

    def fail(_):
        raise MemoryError

    handle = net[0].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        net(torch.ones(1, 2)).sum().backward()
    handle.remove()
    optimizer.step()
    optimizer.zero_grad()
    before = net[0].bias.detach().clone()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].bias, before)


def adversaries(frozen):
    """A generator whose loss goes through a discriminator, stock and stepping in the backward."""
    found = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        makes, judges = nn.Linear(4, 4), nn.Linear(4, 1)
        of_makes, of_judges = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (makes, judges))
        if in_backward:
            srp.step_in_backward(of_makes)
            srp.step_in_backward(of_judges)
        for _ in range(3):
            noise = torch.ones(2, 4)
            of_judges.zero_grad()
            (judges(makes(noise).detach()).mean() - judges(noise).mean()).backward()
            of_judges.step()
            judges.requires_grad_(not frozen)
            of_makes.zero_grad()
            (-judges(makes(noise)).mean()).backward()
            of_makes.step()
            judges.requires_grad_(True)
        found.append((makes.state_dict(), judges.state_dict()))
    return found


def test_a_loss_through_another_model_is_refused_unless_that_is_frozen():
    assert_same(*adversaries(frozen=True))
    with pytest.raises(RuntimeError, match="take its parameters' requires_grad off meanwhile"):
        adversaries(frozen=False)


@pytest.mark.parametrize("resumed", ["optimizer", "group"])
def test_groups_of_a_state_that_was_loaded_are_used(resumed):
    after = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        optimizer = torch.optim.SGD([{"params": [net.weight]}, {"params": [net.bias], "lr": 0.3}], lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        if in_backward:
            srp.step_in_backward(optimizer, net)
        for _ in range(3):
            if resumed == "optimizer":
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            else:
                optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.7}
            optimizer.zero_grad()
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            schedule.step()
        after.append(net.state_dict())
    assert_same(*after)


def test_a_parameter_that_was_taken_out_waits_as_in_stock():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in net], lr=0.1)
    srp.step_in_backward(optimizer, net)
    del optimizer.param_groups[1]
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert torch.equal(net[1].bias.grad, torch.full((2,), 2.0))
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in ("1.weight", "1.bias"))
    assert not torch.equal(net[0].bias, before["0.bias"])


@pytest.mark.parametrize("named", [True, False])
def test_a_closure_runs_its_backward_there(named):
    after = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if in_backward:
            srp.step_in_backward(optimizer, net)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure=closure) if named else optimizer.step(closure) for _ in range(3)]
        after.append((net.state_dict(), torch.stack(losses).detach()))
    assert_same(*after)


def test_reports_move_nothing_and_are_of_freed_gradients():
    net = network()
    srp.convert_to_reversible(net)
    functional.reset_net(net)
    x_seq = torch.rand(5, 4, 6) * 3
    waiting = srp.memory_report(net, x_seq)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    srp.step_in_backward(optimizer, net)
    before = copy.deepcopy(net.state_dict())
    assert srp.verify(net, x_seq).gradients_equal
    freed = srp.memory_report(net, x_seq)
    assert freed.converted.peak < waiting.converted.peak
    srp.largest_batch(net, lambda size: torch.rand(5, size, 6), "1MiB")
    assert_same(net.state_dict(), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    net(x_seq).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_twice_is_refused():
    net = nn.Linear(2, 2)
    _, arrangement = stepping(net)
    with pytest.raises(RuntimeError, match="weight is stepped in the backward already"):
        stepping(net)
    arrangement.remove()
    stepping(net)


def stepping(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return optimizer, srp.step_in_backward(optimizer, net)


def test_accumulation_is_refused_before_it_adds():
    net = nn.Linear(2, 2)
    optimizer, arrangement = stepping(net)
    net(torch.ones(1, 2)).sum().backward()
    once = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"second backward reached (weight|bias)"):
        net(torch.ones(1, 2)).sum().backward()
    assert_same(net.state_dict(), once)
    arrangement.remove()
    for _ in range(2):
        net(torch.ones(1, 2)).sum().backward()
    assert torch.equal(net.bias.grad, torch.full((2,), 2.0))
    optimizer.step()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "read",
    [
        lambda net: nn.utils.clip_grad_norm_(net.parameters(), 1.0),
        lambda net: nn.utils.clip_grad_value_(net.parameters(), 1.0),
        lambda net: net.weight.grad.norm(),
        lambda net: net.weight.grad + 1,
        lambda net: torch.stack([net.weight.grad, net.weight]),
        nn.Module.share_memory,
    ],
)
def test_who_reads_the_gradient_is_told(read):
    net = nn.Linear(2, 2)
    stepping(net)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="used and freed in the backward"):
        read(net)


def test_a_scaler_is_refused_before_a_parameter_moves():
    net = nn.Linear(2, 2)
    stepping(net)
    before = copy.deepcopy(net.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="GradScaler is in use"):
        scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    assert_same(net.state_dict(), before)


class Counts(torch.optim.SGD):
    """An optimizer of the user's own."""


def test_what_cannot_be_stepped_alone_is_refused():
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="LBFGS"):
        srp.step_in_backward(torch.optim.LBFGS(net.parameters()))
    with pytest.raises(TypeError, match=r"Counts .*each_by_itself=True"):
        srp.step_in_backward(Counts(net.parameters(), lr=0.1))
    srp.step_in_backward(Counts(net.parameters(), lr=0.1), each_by_itself=True).remove()
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="weight has a gradient already"):
        stepping(net)


def over_processes(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    said = []
    for order in ("before", "after"):
        net = nn.Linear(2, 2)
        if order == "before":
            averaged = DistributedDataParallel(net)
            try:
                stepping(net)
            except RuntimeError as error:
                said.append(str(error))
        else:
            stepping(net)
            averaged = DistributedDataParallel(net)
            before = copy.deepcopy(net.state_dict())
            try:
                averaged(torch.ones(1, 2)).sum().backward()
            except RuntimeError as error:
                said.append(str(error))
            assert_same(net.state_dict(), before)
        del averaged
    after = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fully_shard(net[0])
        fully_shard(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if in_backward:
            srp.step_in_backward(optimizer, net)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.full((2, 4), rank + 1.0)).square().sum().backward()
            optimizer.step()
        after.append([parameter.full_tensor() for parameter in net.parameters()])
    return said, after


def test_over_processes_it_is_right_or_refused(tmp_path):
    for said, after in together(tmp_path, over_processes):
        assert len(said) == 2
        assert all("DistributedDataParallel averages" in text for text in said)
        assert_same(*after)
