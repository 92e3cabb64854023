"""Moving a SpikingJelly training script over: an ordinary script, and one line more.

    python examples/spikingjelly_training.py --epochs 3

The network, the loop and the optimizer are as SpikingJelly's tutorials have them.
"""

import torch
import typer
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, event_frames


class CSNN(nn.Module):
    """A convolutional network for event frames ``[T, N, 2, 24, 24]``: scores ``[N, 10]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            layer.Conv2d(2, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.IFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2),  # 12
            layer.Conv2d(channels, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            layer.MaxPool2d(2),  # 6
        )
        self.classifier = nn.Sequential(
            layer.Flatten(),
            layer.Linear(channels * 6 * 6, 64, bias=False),
            neuron.ParametricLIFNode(surrogate_function=surrogate.ATan()),
            layer.Linear(64, 10),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x_seq)).mean(0)


def main(
    epochs: int = 3,
    steps: int = 10,
    batch: int = 32,
    channels: int = 32,
    lr: float = 5e-3,
    limit: int | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> list[float]:
    """Train on simulated event recordings of handwritten digits."""
    torch.manual_seed(seed)
    training = event_frames(
        DigitSaccades(size=24, limit=limit), steps=steps, batch_size=batch, shuffle=True, seed=seed
    )
    test = event_frames(DigitSaccades(train=False, size=24, limit=limit), steps=steps, batch_size=batch)

    model = CSNN(channels).to(device)
    model = srp.convert_to_reversible(model)  # <- the one change
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    losses = []
    for epoch in range(epochs):
        model.train()
        bar = tqdm(training, desc=f"epoch {epoch + 1} of {epochs}")
        for x_seq, digit in bar:
            functional.reset_net(model)
            loss = nn.functional.cross_entropy(model(x_seq.to(device)), digit.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")

        model.eval()
        right = 0
        with torch.no_grad():
            for x_seq, digit in test:
                functional.reset_net(model)
                right += (model(x_seq.to(device)).argmax(1).cpu() == digit).sum().item()
        print(f"test accuracy {right / len(test.dataset):.1%}")
    return losses


if __name__ == "__main__":
    typer.run(main)
