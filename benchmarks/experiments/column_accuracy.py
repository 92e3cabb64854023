"""What reversing over time does to accuracy: temporal columns, undone and run plainly, seed by seed.

Small sub-networks with batch norm, since T-RevSNN's own learn next to nothing within minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

import snn_reversible_plugin as srp

from ..experiment import Entry, Options, Tick, Work
from ..recordings import DATA
from ..training import accuracy
from .block_accuracy import BATCH, RATE, STEPS, batches, learn, scores_of

WIDTHS, PIXELS, RECORDINGS, UPDATES = (8, 16, 24), 32, 560, 300
# Binary digits behind the point, and whether the sub-networks are undone or kept.
ARMS: dict[str, tuple[int | None, bool]] = {
    "columns, undone": (16, True),
    "columns, run plainly": (16, False),
    "columns, plainly in floats": (None, False),
}
EQUALS = {"columns, undone": "columns, run plainly"}
LESS = {"columns, run plainly": "columns, plainly in floats"}


def spikes_to(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A neuron, a convolution, a batch norm."""
    fire = neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [fire, conv, nn.BatchNorm2d(outputs)]


class Level(nn.Module):
    """Of the states below and above, halved and doubled in size: a sum, and a residual block."""

    def __init__(self, k: int, is_first: bool) -> None:
        super().__init__()
        width, below = WIDTHS[k], 2 if k == 0 else WIDTHS[k - 1]
        down = spikes_to(below, width, 3, stride=2)
        self.down = nn.Sequential(*(down if k else down[1:]))  # events are counted, and do not fire
        self.block = nn.Sequential(*spikes_to(width, width, 3))
        self.up = None
        if not is_first and k + 1 < len(WIDTHS):
            self.up = nn.Sequential(*spikes_to(WIDTHS[k + 1], width, 1), nn.Upsample(scale_factor=2))

    def forward(self, below: Tensor, above: Tensor | None = None) -> Tensor:
        x = self.down(below)
        if above is not None:
            assert self.up is not None
            x = x + self.up(above)
        return x + self.block(x)  # type: ignore[no-any-return]


class Network(nn.Module):
    """The middle of a recording, columns, and scores from the means of the top level's state."""

    def __init__(self, bits: int | None, reversible: bool) -> None:
        super().__init__()
        subnets = [[Level(k, step == 0) for k in range(len(WIDTHS))] for step in range(STEPS)]
        alphas = [[nn.Parameter(torch.full((width, 1, 1), 0.5)) for width in WIDTHS] for _ in range(STEPS)]
        self.columns = srp.RevSColumns(subnets, alphas, bits=bits)
        self.columns.reversible = reversible
        self.head = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x_seq: Tensor) -> Tensor:
        edge = (x_seq.shape[-1] - PIXELS) // 2
        middle = x_seq[..., edge : edge + PIXELS, edge : edge + PIXELS]
        top = self.columns(list(middle)).states[-1]
        return self.head(top.mean((-1, -2)))  # type: ignore[no-any-return]


def works(options: Options) -> Iterator[Work]:
    for seed in range(1 if options.quick else options.seeds):
        for data in DATA:
            if data == "events" or options.folder.is_dir():
                yield Work(f"{data}, seed {seed}", tuple(ARMS), {"data": data, "seed": seed})


def measure(arm: str, options: Options, tick: Tick, data: str, seed: int) -> Entry:
    """Train one network."""
    torch.manual_seed(seed)
    model = Network(*ARMS[arm]).to(options.device)
    loader, test = batches(data, options.folder, 16 if options.quick else RECORDINGS)
    epochs = 1 if options.quick else round(UPDATES / len(loader))
    loader.generator.manual_seed(seed)
    start = time.perf_counter()
    losses = learn(model, loader, epochs, tick)
    alphas = torch.cat([alpha.detach().flatten() for alpha in model.columns.alphas.parameters()])
    return {
        "accuracy": accuracy(model, test, scores_of),
        "losses": losses,
        "alphas": [round(float(alphas.min()), 4), round(float(alphas.max()), 4)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "settings": {
            "epochs": epochs, "steps": STEPS, "batch": BATCH, "lr": RATE,
            "train": len(loader.dataset), "test": len(test.dataset),  # type: ignore[arg-type]
        },
    }  # fmt: skip
