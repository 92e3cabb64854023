"""The largest batch within a budget, and its command."""

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from typer.testing import CliRunner

import snn_reversible_plugin as srp
from snn_reversible_plugin.__main__ import app
from snn_reversible_plugin.modules.checks import bytes_of
from snn_reversible_plugin.reports.fit import fit
from snn_reversible_plugin.reports.measure import count_step
from snn_reversible_plugin.tape.settings import MODES


def build():
    layers = []
    for inputs, outputs in ((2, 8), (8, 8), (8, 8)):
        layers += [
            layer.Conv2d(inputs, outputs, 3, padding=1),
            layer.BatchNorm2d(outputs),
            neuron.LIFNode(),
        ]
    model = nn.Sequential(*layers, layer.AvgPool2d(2), layer.Flatten(), layer.Linear(8 * 36, 10))
    functional.set_step_mode(model, "m")
    return model


def batch_of(size):
    return torch.rand(4, size, 2, 12, 12)


def total(model, batch):
    """The peak of a step as a user would count it."""
    x = batch_of(batch)

    def loss():
        functional.reset_net(model)
        return model(x).square().mean()

    loss().backward()
    model.zero_grad()
    return (
        count_step(loss)[1] + x.nbytes + sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    )


@pytest.mark.parametrize("mode", ["stock", "memory", "auto"])
@pytest.mark.one_in(3)
def test_it_fits_and_hardly_more_would(mode):
    model = build() if mode == "stock" else srp.convert_to_reversible(build(), mode=mode)
    budget = 4 << 20
    found = fit(model, batch_of, "4MiB")
    assert found.batch > 6
    assert abs(found.predicted - found.peak) <= 0.05 * found.peak
    assert found.peak <= budget == found.budget
    assert total(model, found.batch) <= budget
    assert total(model, found.batch + 2) > budget


@pytest.mark.slow
def test_layers_that_are_sliced_only_in_large_batches():
    """Two small batches say that half as much fits."""
    model = nn.Sequential(
        layer.Conv2d(3, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Conv2d(16, 16, 3, padding=1), neuron.LIFNode(), layer.AvgPool2d(4),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    srp.convert_to_reversible(model, mode="minimal")
    found = fit(model, lambda batch: torch.rand(4, batch, 3, 8, 8), "16MiB")
    assert 0.85 * found.budget < found.peak <= found.budget < 0.85 * found.predicted


def test_the_model_is_left_as_it_was():
    model = srp.convert_to_reversible(build())
    x = batch_of(2)
    model(x).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    membrane = model[2].v.clone()
    assert srp.largest_batch(model, batch_of, 1 << 20) > 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(model[2].v, membrane)


def test_a_budget_that_nothing_fits_in_is_refused_with_what_there_must_be():
    with pytest.raises(
        ValueError, match=r"a batch of 2 takes [\d,]+ bytes, and the budget is 20,000"
    ) as refusal:
        srp.largest_batch(build(), batch_of, 20_000)
    assert 'mode="memory"' in str(refusal.value)


@pytest.mark.parametrize("budget", ["", "ten", "10 apples", "GiB", 0, -1, True, "1.2.3GB", None])
def test_what_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match="no number of bytes"):
        bytes_of(budget)


@pytest.mark.slow
def test_several_inputs_and_a_loss():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(32, 64), neuron.LIFNode(step_mode="m")

        def forward(self, a, b):
            return self.lif(self.fc(a) + self.fc(b))

    def inputs(size):
        return torch.rand(4, size, 32), torch.rand(4, size, 32)

    found = srp.largest_batch(Two(), inputs, "1MiB", loss=lambda out: out.sum())
    assert found > srp.largest_batch(Two(), inputs, "500KiB", loss=lambda out: out.sum()) > 1


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "net_to_fit.py").write_text(
        "from torch import nn\n"
        "from spikingjelly.activation_based import layer, neuron\n"
        "def build():\n"
        "    return nn.Sequential(layer.Linear(16, 64), neuron.LIFNode(step_mode='m'))\n"
    )
    arguments = ["fit", "net_to_fit:build", "--budget", "600KiB", "--steps", "4"]
    result = CliRunner().invoke(app, [*arguments, "--shape", "T,N,16"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in result.output.splitlines()
        if "│" in line
    ]
    batches = {(mode, steps): int(batch) for mode, steps, batch, *_ in rows}
    assert batches.keys() == {(mode, "4") for mode in ("stock", *MODES)}
    assert batches["stock", "4"] < batches["memory", "4"]
    refused = CliRunner().invoke(app, [*arguments, "--shape", "4,8,16"], env={"COLUMNS": "200"})
    assert refused.exit_code != 0
    assert "N where the batch goes" in refused.output
