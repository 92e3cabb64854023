"""N-MNIST from a folder: a SpikingJelly network trained on an event camera's recordings.

    python examples/nmnist.py --folder ../shared/data/nmnist --epochs 5

The folder is in the layout of the download, ``Train/<digit>/<id>.bin`` and ``Test/...``, all of it
or a part.
"""

from itertools import pairwise
from pathlib import Path

import torch
import typer
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import NMNISTFolder, event_frames


def vgg(channels: int) -> nn.Sequential:
    """Five convolutional layers for event frames ``[T, N, 2, 34, 34]``: scores ``[T, N, 10]``."""
    layers: list[nn.Module] = []
    sizes = [2, channels, channels, 2 * channels, 2 * channels, 2 * channels]
    for i, (before, after) in enumerate(pairwise(sizes)):
        layers += [
            layer.Conv2d(before, after, 3, padding=1, bias=False),
            layer.BatchNorm2d(after),
            neuron.LIFNode(detach_reset=True, surrogate_function=surrogate.ATan()),
        ]
        if i in (1, 3):
            layers.append(layer.AvgPool2d(2))
    layers += [layer.AdaptiveAvgPool2d(4), layer.Flatten(), layer.Linear(32 * channels, 10)]
    model = nn.Sequential(*layers)
    functional.set_step_mode(model, "m")
    return model


def main(
    folder: Path = Path("../shared/data/nmnist"),
    epochs: int = 5,
    steps: int = 10,
    batch: int = 16,
    channels: int = 16,
    lr: float = 5e-3,
    limit: int | None = None,
    cache: Path | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> list[float]:
    """Train on the recordings in a folder; with --cache, keep their frames in another."""
    torch.manual_seed(seed)
    training = event_frames(
        NMNISTFolder(folder, limit=limit),
        steps=steps,
        batch_size=batch,
        shuffle=True,
        cache=cache,
        seed=seed,
    )
    test = event_frames(
        NMNISTFolder(folder, train=False, limit=limit), steps=steps, batch_size=batch, cache=cache
    )

    model = vgg(channels).to(device)
    model = srp.convert_to_reversible(model)  # <- the one change
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(training))

    losses = []
    for epoch in range(epochs):
        model.train()
        bar = tqdm(training, desc=f"epoch {epoch + 1} of {epochs}")
        for x_seq, digit in bar:
            functional.reset_net(model)
            scores = model(x_seq.to(device)).mean(0)
            loss = nn.functional.cross_entropy(scores, digit.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")

        model.eval()
        right = 0
        with torch.no_grad():
            for x_seq, digit in test:
                functional.reset_net(model)
                scores = model(x_seq.to(device)).mean(0)
                right += (scores.argmax(1).cpu() == digit).sum().item()
        print(f"test accuracy {right / len(test.dataset):.1%}")
    return losses


if __name__ == "__main__":
    typer.run(main)
