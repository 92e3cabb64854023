"""Lightning: convert in the module's constructor, reset the neurons where you did before."""

import lightning
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import snn_reversible_plugin as srp


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            layer.Conv2d(2, 8, 3, padding=1), neuron.LIFNode(), layer.Flatten(), layer.Linear(8 * 64, 10)
        )
        functional.set_step_mode(self.net, "m")
        srp.convert_to_reversible(self.net)  # was: nothing
        self.losses: list[float] = []

    def training_step(self, batch, _index):
        x, label = batch
        functional.reset_net(self.net)
        loss = F.cross_entropy(self.net(x.transpose(0, 1)).mean(0), label)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def train() -> list[float]:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(32, 4, 2, 8, 8), torch.randint(10, (32,)))
    model = Classifier()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="auto", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=8))
    return model.losses


if __name__ == "__main__":
    print(train())
