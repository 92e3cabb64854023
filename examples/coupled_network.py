"""A network of reversible nodes (Lei et al., 2023) on simulated event recordings of handwritten digits.

    python examples/coupled_network.py --epochs 3

`CoupledLIF` stands where a LIFNode would. Its states are rebuilt in the backward, bit for bit; what it says
to the next layer is not binary, so nothing that needs spikes of 0 and 1 should follow it.
"""

import torch
import typer
from spikingjelly.activation_based import functional, layer
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, event_frames
from snn_reversible_plugin.spikingjelly import CoupledLIF


def network(channels: int) -> nn.Sequential:
    """For event frames ``[T, N, 2, 24, 24]``: scores ``[T, N, 10]``."""
    model = nn.Sequential(
        layer.Conv2d(2, channels, 3, padding=1, bias=False),
        layer.BatchNorm2d(channels),
        CoupledLIF(),
        layer.AvgPool2d(2),  # 12
        layer.Conv2d(channels, channels, 3, padding=1, bias=False),
        layer.BatchNorm2d(channels),
        CoupledLIF(),
        layer.AvgPool2d(2),  # 6
        layer.Flatten(),
        layer.Linear(channels * 6 * 6, 64, bias=False),
        CoupledLIF(learn_tau=True),
        layer.Linear(64, 10),
    )
    functional.set_step_mode(model, "m")
    return model


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

    model = network(channels).to(device)
    model = srp.convert_to_reversible(model)  # <- the one change
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    losses = []
    for epoch in range(epochs):
        model.train()
        bar = tqdm(training, desc=f"epoch {epoch + 1} of {epochs}")
        for x_seq, digit in bar:
            functional.reset_net(model)
            loss = nn.functional.cross_entropy(model(x_seq.to(device)).mean(0), digit.to(device))
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
                right += (model(x_seq.to(device)).mean(0).argmax(1).cpu() == digit).sum().item()
        print(f"test accuracy {right / len(test.dataset):.1%}")
    return losses


if __name__ == "__main__":
    typer.run(main)
