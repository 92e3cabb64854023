"""An snnTorch loop that calls the layers one by one, moved over: convert, and the tape around the loop."""

import snntorch as snn
import torch
import torch.nn.functional as F
from torch import nn

import snn_reversible_plugin as srp


class Net(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(20, hidden), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(hidden, 10), snn.Leaky(beta=0.9)


def train() -> list[float]:
    torch.manual_seed(0)
    net = Net()
    net = srp.convert_to_reversible(net)  # was: nothing
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        x_seq, label = 3 * torch.rand(25, 8, 20), torch.randint(10, (8,))
        mem1, mem2 = net.lif1.init_leaky(), net.lif2.init_leaky()
        total = torch.zeros(8, 10)
        with srp.reversible(net):  # was: nothing
            for x in x_seq:
                spk1, mem1 = net.lif1(net.fc1(x), mem1)
                _, mem2 = net.lif2(net.fc2(spk1), mem2)
                total = total + mem2
        loss = F.cross_entropy(total / len(x_seq), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(train())
