"""Training with SLTT in a loop of one's own: memory that does not grow with the number of time steps.

    python examples/sltt_training.py --epochs 3 --steps 60
    python examples/sltt_training.py --epochs 3 --steps 60 --k 10     # SLTT-K

``sltt_backward`` is the forward and the backward of a batch; the rest is an ordinary script. The gradient
is an approximation, without the paths through time (Meng et al., ICCV 2023).
"""

import torch
import typer
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, event_frames
from snn_reversible_plugin.training import sltt_backward


def network(channels: int) -> nn.Sequential:
    """A convolutional network for one event frame ``[N, 2, 24, 24]``: scores ``[N, 10]``."""
    return nn.Sequential(
        layer.Conv2d(2, channels, 3, padding=1, bias=False),
        layer.BatchNorm2d(channels),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2),  # 12
        layer.Conv2d(channels, channels, 3, padding=1, bias=False),
        layer.BatchNorm2d(channels),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2),  # 6
        layer.Flatten(),
        layer.Linear(channels * 6 * 6, 10),
    )


def main(
    epochs: int = 3,
    steps: int = 60,
    k: int | None = None,
    loss_on: str = "mean",
    batch: int = 32,
    channels: int = 16,
    lr: float = 5e-3,
    limit: int | None = None,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    seed: int = 0,
) -> list[float]:
    """Train on simulated event recordings of handwritten digits, at all time steps or at K of them."""
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
            label = digit.to(device)
            functional.reset_net(model)
            optimizer.zero_grad()
            loss, _scores = sltt_backward(
                model,
                x_seq.to(device),
                lambda scores, label=label: nn.functional.cross_entropy(scores, label),
                k,
                loss_on=loss_on,
            )
            optimizer.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")

        model.eval()
        right = 0
        with torch.no_grad():
            for x_seq, digit in test:
                functional.reset_net(model)
                scores = torch.stack([model(x) for x in x_seq.to(device)]).mean(0)
                right += (scores.argmax(1).cpu() == digit).sum().item()
        print(f"test accuracy {right / len(test.dataset):.1%}")
    return losses


if __name__ == "__main__":
    typer.run(main)
