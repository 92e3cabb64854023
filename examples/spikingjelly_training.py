"""Moving a SpikingJelly training script over: an ordinary script, and one line more.

    python examples/spikingjelly_training.py --epochs 3
    python examples/spikingjelly_training.py --folder ../shared/data/nmnist     # the files of N-MNIST

The network, the loop and the optimizer are as SpikingJelly's tutorials have them. N-MNIST's folder is in
the layout of the download, ``Train/<digit>/<id>.bin`` and ``Test/...``, all of it or a part.
"""

from pathlib import Path
from typing import Any

import torch
import typer
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, NMNISTFolder, event_frames


class CSNN(nn.Module):
    """A convolutional network for event frames ``[T, N, 2, 34, 34]``: scores ``[N, 10]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layer.Conv2d(2, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2),  # 17
            layer.Conv2d(channels, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2),  # 8
        )
        self.classifier = nn.Sequential(
            layer.Flatten(),
            layer.Linear(channels * 8 * 8, 64, bias=False),
            neuron.ParametricLIFNode(surrogate_function=surrogate.ATan()),
            layer.Linear(64, 10),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x_seq)).mean(0)


def main(
    folder: Path | None = None,
    epochs: int = 3,
    steps: int = 10,
    batch: int = 32,
    channels: int = 32,
    lr: float = 5e-3,
    limit: int | None = None,
    cache: Path | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> list[float]:
    """Train on simulated event recordings of digits, or on those in FOLDER; --cache keeps their frames."""
    torch.manual_seed(seed)

    def recordings(train: bool) -> Any:
        if folder is None:
            return DigitSaccades(train=train, limit=limit)
        return NMNISTFolder(folder, train=train, limit=limit)

    loader = {"steps": steps, "batch_size": batch, "cache": cache}
    training = event_frames(recordings(train=True), shuffle=True, seed=seed, **loader)
    test = event_frames(recordings(train=False), **loader)

    model = CSNN(channels).to(device)
    model = srp.convert_to_reversible(model)  # <- the one change
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    losses = []
    for epoch in range(epochs):
        model.train()
        for x_seq, digit in tqdm(training, desc=f"epoch {epoch + 1} of {epochs}"):
            functional.reset_net(model)
            loss = nn.functional.cross_entropy(model(x_seq.to(device)), digit.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        model.eval()
        right = 0
        with torch.no_grad():
            for x_seq, digit in test:
                functional.reset_net(model)
                right += (model(x_seq.to(device)).argmax(1).cpu() == digit).sum().item()
        print(f"loss {losses[-1]:.4f}, test accuracy {right / len(test.dataset):.1%}")
    return losses


if __name__ == "__main__":
    typer.run(main)
