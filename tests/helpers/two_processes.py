"""Two processes that train together, or one by itself, and what they find.

A group that something still holds when its process ends may abort that process; so the work's own objects
go first, and neither process leaves before the other is done.

They are forked from a server that has imported the frameworks once and never computed anything: several
seconds less for each of them than in interpreters of their own.
"""

import faulthandler
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

# What most of them use, though it is imported late: wrappers need dynamo, and the grid numba.
IMPORTED_ONCE = [
    "pytest",
    "scipy.linalg",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torchvision",
    "snntorch",
    "spikingjelly.activation_based.model",
    "snn_reversible_plugin.grid.step.on_numba",
    "snn_reversible_plugin.neurons.integrate_fire.on_numba",
    "snn_reversible_plugin.snntorch",
    "snn_reversible_plugin.spikingjelly",
]


MOST_SECONDS = 300  # gloo itself waits half an hour for a process that doesn't come


def together(folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returns in each of two processes of a gloo group.

    Raises:
        ProcessExitedException: a process took longer than MOST_SECONDS; its note says where its threads
            stood.
    """
    mp.set_forkserver_preload(IMPORTED_ONCE)
    try:
        mp.start_processes(_in_group, args=(folder, work, args), nprocs=2, start_method="forkserver")
    except mp.ProcessExitedException as error:
        for stacks in sorted(folder.glob("stacks-*")):
            error.add_note(f"{stacks.name}:\n{stacks.read_text()}")
        raise
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def alone(folder: Path, work: Callable[[], Any]) -> Any:
    """What ``work()`` returns in a process that has computed nothing before."""
    mp.set_forkserver_preload(IMPORTED_ONCE)
    mp.start_processes(_by_itself, args=(folder, work), nprocs=1, start_method="forkserver")
    return torch.load(folder / "found.pt")


def _by_itself(_rank: int, folder: Path, work: Callable[[], Any]) -> None:
    torch.save(work(), folder / "found.pt")


def _in_group(rank: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    stacks = (folder / f"stacks-{rank}").open("w")
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True, file=stacks)
    if sys.platform == "linux":
        # By its own choice gloo takes the interface of the host's name, which may not lead anywhere.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    stacks.close()
