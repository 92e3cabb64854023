"""Moving an snnTorch training loop over: the loop over time stays the user's own.

    python examples/snntorch_training.py --epochs 3

The network is that of snnTorch's tutorial 6, sized for a sensor of 24 x 24 pixels; it steps its neurons
itself and carries their membranes by hand.
"""

import snntorch as snn
import torch
import torch.nn.functional as F
import typer
from snntorch import surrogate
from torch import nn
from tqdm import tqdm

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades, event_frames


class Net(nn.Module):
    """A convolutional network for event frames ``[T, N, 2, 24, 24]``: membranes ``[T, N, 10]``."""

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid(slope=25)
        self.conv1 = nn.Conv2d(2, 12, 5)  # 24 to 20, pooled to 10
        self.lif1 = snn.Leaky(beta=beta, spike_grad=grad)
        self.conv2 = nn.Conv2d(12, 64, 5)  # 10 to 6, pooled to 3
        self.lif2 = snn.Leaky(beta=beta, spike_grad=grad)
        self.fc1 = nn.Linear(64 * 3 * 3, 10)
        self.lif3 = snn.Leaky(beta=beta, spike_grad=grad)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        membranes = []
        for x in x_seq:
            spk1, mem1 = self.lif1(F.max_pool2d(self.conv1(x), 2), mem1)
            spk2, mem2 = self.lif2(F.max_pool2d(self.conv2(spk1), 2), mem2)
            _, mem3 = self.lif3(self.fc1(spk2.flatten(1)), mem3)
            membranes.append(mem3)
        return torch.stack(membranes)


def main(
    epochs: int = 3,
    steps: int = 25,
    batch: int = 32,
    lr: float = 2e-3,
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

    net = Net().to(device)
    net = srp.convert_to_reversible(net)  # <- the one change
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)

    losses = []
    for epoch in range(epochs):
        net.train()
        for x_seq, digit in tqdm(training, desc=f"epoch {epoch + 1} of {epochs}"):
            loss = F.cross_entropy(net(x_seq.to(device)).mean(0), digit.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        net.eval()
        right = 0
        with torch.no_grad():
            for x_seq, digit in test:
                right += (net(x_seq.to(device)).mean(0).argmax(1).cpu() == digit).sum().item()
        print(f"loss {losses[-1]:.4f}, test accuracy {right / len(test.dataset):.1%}")
    return losses


if __name__ == "__main__":
    typer.run(main)
