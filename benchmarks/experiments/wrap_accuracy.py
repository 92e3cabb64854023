"""What a trained stock network is still good for, once its residual blocks are reversible ones.

Each is trained, and then trained on as it is, with two streams, and with leapfrog, at one small rate: how
much of the accuracy is there at once, with the batch norms' statistics taken anew, and after some epochs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model.ms_resnet import MSResNet
from spikingjelly.activation_based.model.sew_resnet import BasicBlock
from torch import nn
from torch.utils.data import DataLoader

import snn_reversible_plugin as srp
from snn_reversible_plugin.blocks.wrapped import run_plainly

from ..experiment import Entries, Options, Tick, Work
from ..networks import multi_step
from ..recordings import DATA
from ..training import accuracy, through_time, train
from .block_accuracy import BATCH, RATE, STEPS, Shrunk, batches, learn, scores_of

WIDTHS, BLOCKS, RECORDINGS, UPDATES = (8, 16), (2, 4), 400, 300
AFTER, TUNING_RATE = (1, 3, 10), 1e-3  # epochs
IF = partial(neuron.IFNode, detach_reset=True, surrogate_function=surrogate.ATan())


def ms_resnet() -> nn.Module:
    """A block of each stage changes the shape or has a shortcut of its own; the others are wrapped."""
    return MSResNet(
        T=STEPS, in_channels=2, num_classes=10, layers=(*(count + 1 for count in BLOCKS), 1),
        stage_channels=(*WIDTHS, WIDTHS[-1]), stem_kernel_size=3, stem_stride=1,
        spiking_neuron=neuron.IFNode, detach_reset=True, surrogate_function=surrogate.ATan(),
    )  # fmt: skip


def sew_resnet() -> nn.Module:
    """As many blocks, of SEW-ResNet's kind; SpikingJelly's own models of it are 64 channels wide."""

    def between(inputs: int, outputs: int) -> nn.Module:
        conv = layer.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(conv, layer.BatchNorm2d(outputs), IF())

    def blocks(width: int, count: int) -> list[nn.Module]:
        block = partial(BasicBlock, cnf="ADD", spiking_neuron=neuron.IFNode)
        kwargs = {"detach_reset": True, "surrogate_function": surrogate.ATan()}
        return [block(width, width, **kwargs) for _ in range(count)]

    first, second = WIDTHS
    stem = [layer.Conv2d(2, first, 3, padding=1, bias=False), layer.BatchNorm2d(first), IF()]
    head = [layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(second, 10)]
    body = [*blocks(first, BLOCKS[0]), between(first, second), *blocks(second, BLOCKS[1])]
    return multi_step(nn.Sequential(*stem, *body, *head, _Mean()))


class _Mean(nn.Module):
    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return x_seq.mean(0)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"MS-ResNet": ms_resnet, "SEW-ResNet": sew_resnet}
# The coupling of the blocks that a network's own become.
ARMS = {"stock": None, "two streams": "additive", "leapfrog": "leapfrog"}


def works(options: Options) -> Iterator[Work]:
    for seed in range(1 if options.quick else options.seeds):
        for data in DATA:
            if data == "events" or options.folder.is_dir():
                for network in NETWORKS:
                    settings = {"data": data, "network": network, "seed": seed}
                    yield Work(f"{data}, {network}, seed {seed}", tuple(ARMS), settings)


def together(
    arms: Sequence[str], options: Options, tick: Tick, data: str, network: str, seed: int
) -> Entries:
    """Train a network once, and train it on in every way, from the same batches."""
    torch.manual_seed(seed)
    stock = Shrunk(NETWORKS[network](), by=3).to(options.device)
    loader, test = batches(data, options.folder, 16 if options.quick else RECORDINGS)
    epochs = 1 if options.quick else round(UPDATES / len(loader))
    loader.generator.manual_seed(seed)
    learn(stock, loader, epochs, lambda more: tick(f"{data}, {network}, seed {seed}: {more}"))
    functional.reset_net(stock)
    found = {}
    for arm in arms:
        model, start = copy.deepcopy(stock), time.perf_counter()
        if ARMS[arm] is not None:
            srp.wrap_residual_blocks(model, coupling=ARMS[arm])
        loader.generator.manual_seed(seed)
        at_once = accuracy(model, test, scores_of)
        anew = _with_new_statistics(model, loader, test)
        with run_plainly(model):  # the same bits, and a run in half the time
            losses, after = _tuned(
                model, loader, test, lambda more, arm=arm: tick(f"{network}, {arm}: {more}")
            )
        found[arm] = {
            "arm": arm, "trained": accuracy(stock, test, scores_of), "at_once": at_once, "anew": anew,
            "after": after, "losses": losses, "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": time.perf_counter() - start,
            "setup": {
                "epochs": epochs, "steps": STEPS, "batch": BATCH, "lr": RATE, "tuning_lr": TUNING_RATE,
                "train": len(loader.dataset), "test": len(test.dataset),
            },
        }  # fmt: skip
    return found


def _with_new_statistics(model: nn.Module, loader: DataLoader, test: DataLoader) -> float:
    """The accuracy after a pass over what there is to train on, of which the weights learn nothing."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    with torch.no_grad():
        for x_seq, _ in loader:
            scores_of(model, x_seq.to(next(model.parameters()).device))
    found = accuracy(model, test, scores_of)
    model.load_state_dict(before)
    return found


def _tuned(
    model: nn.Module, loader: DataLoader, test: DataLoader, tick: Tick
) -> tuple[list[float], dict[str, float]]:
    """The losses, and the accuracy after some numbers of epochs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=TUNING_RATE)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses: list[float] = []
    after = {}
    for epoch in range(1, max(AFTER) + 1):
        losses += train(model, [loader], through_time(scores_of), optimizer, schedule, tick)
        if epoch in AFTER:
            after[str(epoch)] = accuracy(model, test, scores_of)
    return losses, after
