"""DistributedDataParallel and FSDP2: convert first, then wrap or shard.

torchrun --nproc-per-node 2 examples/moving/with_ddp.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import snn_reversible_plugin as srp


def make() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(), layer.Flatten(), layer.Linear(8 * 64, 10)
    )
    functional.set_step_mode(net, "m")
    return net


def ddp() -> nn.Module:
    net = make()
    net = srp.convert_to_reversible(net)  # was: nothing
    return DistributedDataParallel(net)


def fsdp2() -> nn.Module:
    net = make()
    net = srp.convert_to_reversible(net)  # was: nothing
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for part in net:
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
    return fully_shard(net, mesh=mesh)


def train() -> list[float]:
    losses = []
    for wrap in (ddp, fsdp2):
        net = wrap()
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        torch.manual_seed(dist.get_rank())
        for _ in range(3):
            x_seq, label = torch.rand(4, 8, 2, 8, 8), torch.randint(10, (8,))
            functional.reset_net(net)
            loss = F.cross_entropy(net(x_seq).mean(0), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    os.environ.update({name: os.environ.get(name, value) for name, value in alone.items()})
    dist.init_process_group("gloo")
    print(train())
    dist.destroy_process_group()
