"""The largest batch within a budget, and its command."""

import re
from itertools import pairwise

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
    """Small ones say that half as much fits."""
    model = nn.Sequential(
        layer.Conv2d(3, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Conv2d(16, 16, 3, padding=1), neuron.LIFNode(), layer.AvgPool2d(4),
    )  # fmt: skip
    functional.set_step_mode(model, "m")
    srp.convert_to_reversible(model, mode="minimal")
    found = fit(model, lambda batch: torch.rand(4, batch, 3, 8, 8), "16MiB")
    assert 0.9 * found.budget < found.peak <= found.budget
    assert_few_trials_within_budget(found)


def assert_few_trials_within_budget(found):
    assert len(found.trials) <= 6
    assert max(peak for _, peak in found.trials) <= 1.1 * found.budget
    for (before, _), (batch, _) in pairwise(found.trials[1:]):
        assert batch <= 8 * before


class Tokens(nn.Module):
    """Its peak is the gradient of the embedding until the batch is large."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20_000, 32)
        parts = ((nn.Linear(32, 32), neuron.LIFNode(step_mode="m")) for _ in range(4))
        self.body = nn.Sequential(*(part for two in parts for part in two))

    def forward(self, tokens):
        return self.body(self.embedding(tokens))


@pytest.mark.parametrize("mode", ["stock", "memory"])
@pytest.mark.one_in(2)
def test_gradients_that_hide_what_grows_let_no_trial_overrun_the_budget(mode):
    model = Tokens() if mode == "stock" else srp.convert_to_reversible(Tokens(), mode=mode)
    found = fit(model, lambda size: torch.randint(20_000, (8, size)), "8MiB")
    assert found.batch > 100
    assert 0.9 * found.budget < found.peak <= found.budget
    assert_few_trials_within_budget(found)


def fit_of(model, width, budget):
    return fit(model, lambda size: torch.rand(4, size, width), budget)


def test_one_sample_is_an_answer():
    def take(batch):
        x = torch.rand(4, batch, 4096)
        net = nn.Sequential(nn.Linear(4096, 4), neuron.LIFNode(step_mode="m"))
        return x.nbytes + 2 * net[0].weight.nbytes

    model = nn.Sequential(nn.Linear(4096, 4), neuron.LIFNode(step_mode="m"))
    found = fit_of(model, 4096, take(1) + (32 << 10))
    assert found.batch == 1
    assert found.peak <= found.budget < take(2)
    assert dict(found.trials).keys() == {1, 2}
    assert fit_of(model, 4096, take(0)).batch == 0


def test_a_second_batch_that_might_not_fit_is_not_measured():
    model = nn.Sequential(nn.Linear(4096, 4), neuron.LIFNode(step_mode="m"))
    found = fit_of(model, 4096, 450 << 10)  # 128 of it parameters and gradients, 64 a sample
    assert max(peak for _, peak in found.trials) <= found.budget
    assert found.batch == 5


def test_without_a_budget_a_tenth_of_what_is_free_stays_free(monkeypatch):
    monkeypatch.setattr("snn_reversible_plugin.reports.fit.free_memory", lambda _: 1_000_000)
    found = fit_of(nn.Sequential(nn.Linear(64, 64), neuron.LIFNode(step_mode="m")), 64, None)
    assert found.budget == 900_000
    assert found.peak <= 900_000


class OutOfMemory(nn.Module):
    """A device of its own, on which only so many samples have room."""

    def __init__(self, most):
        super().__init__()
        self.fc, self.most = nn.Linear(8, 8), most

    def forward(self, x):
        if x.shape[1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.fc(x)


def test_a_device_that_runs_out_of_memory_in_a_trial():
    found = fit_of(OutOfMemory(40), 8, "1GiB")
    assert 36 <= found.batch <= 40
    assert (48, None) in found.trials
    with pytest.raises(torch.OutOfMemoryError):
        fit_of(OutOfMemory(0), 8, "1GiB")


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


MODES_THAT_HELP = {
    None: ("memory", "minimal"),
    "speed": ("memory", "minimal"),
    "memory": ("minimal",),
    "auto": ("minimal",),
    "minimal": (),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("mode", MODES_THAT_HELP)
def test_a_budget_that_nothing_fits_in_is_refused_with_what_is_not_in_use_yet(mode):
    model = build() if mode is None else srp.convert_to_reversible(build(), mode=mode)
    with pytest.raises(
        ValueError, match=r"a batch of 1 takes [\d,]+ bytes, and the budget is 20,000"
    ) as said:
        srp.largest_batch(model, batch_of, 20_000)
    assert re.findall(r'mode="(\w+)"', str(said.value)) == [*MODES_THAT_HELP[mode]]
    assert "step_in_backward(optimizer)" in str(said.value)


def test_stepping_in_the_backward_is_not_proposed_to_who_does_it():
    model = build()
    stepping = srp.step_in_backward(torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(ValueError, match="smaller inputs") as said:
        srp.largest_batch(model, batch_of, 20_000)
    assert "step_in_backward" not in str(said.value)
    stepping.remove()


@pytest.mark.parametrize("budget", ["", "ten", "10 apples", "GiB", 0, -1, True, "1.2.3GB", None])
def test_what_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(ValueError, match="no number of bytes"):
        bytes_of(budget)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(32, 64), neuron.LIFNode(step_mode="m")

    def forward(self, a, b):
        return self.lif(self.fc(a) + self.fc(b))


def two(size):
    return torch.rand(4, size, 32), torch.rand(4, size, 32)


@pytest.mark.slow
def test_several_inputs_and_a_loss():
    found = srp.largest_batch(Two(), two, "1MiB", loss=lambda out: out.sum())
    assert found > srp.largest_batch(Two(), two, "500KiB", loss=lambda out: out.sum()) > 1


def test_inputs_are_positional_or_by_name():
    batches = {
        srp.largest_batch(Two(), lambda size, give=give: give(*two(size)), "200KiB")
        for give in (lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"b": b, "a": a})
    }
    assert len(batches) == 1


@pytest.mark.parametrize("inputs", [3, "text", {1: torch.rand(2)}, None])
def test_other_inputs_are_refused_by_their_type(inputs):
    with pytest.raises(TypeError, match=f"gave an object of type {type(inputs).__name__}: "):
        srp.largest_batch(Two(), lambda size: inputs, "1MiB")


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
