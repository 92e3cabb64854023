"""Networks in a wrapper that spreads them, and optimizers that step in the backward: served or refused."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel

import snn_reversible_plugin as srp
from two_processes import together


def trained(in_backward):
    torch.manual_seed(0)
    net = DataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    stepping = srp.step_in_backward(optimizer, net) if in_backward else None
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.rand(6, 4)).square().sum().backward()
        freed = all(type(one.grad).__name__ == "SteppedGradient" for one in net.parameters())
        assert freed == in_backward
        optimizer.step()
    if stepping is not None:
        stepping.remove()
    return net.state_dict()


def test_data_parallel_trains_as_with_an_ordinary_step():
    ours, theirs = trained(True), trained(False)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def sharded(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for by_name in (True, False):
        net = FullyShardedDataParallel(
            nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=by_name
        )
        try:
            srp.step_in_backward(torch.optim.SGD(net.parameters(), lr=0.1), net)
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_fsdp_of_version_1_is_refused(tmp_path):
    for said in together(tmp_path, sharded):
        assert len(said) == 2
        assert all("FullyShardedDataParallel averages gradients after they were" in text for text in said)
