"""The example that trains reversible networks: interrupted and gone on with equals never interrupted."""

import os

import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.examples.test_examples import EXAMPLES, nmnist_folder  # noqa: F401

SMALL = "--epochs 2 --steps 2 --batch 8 --limit 24 --save-every 2 --device cpu"


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    module = {"__name__": "reversible_networks"}
    exec(compile((EXAMPLES / "reversible_networks.py").read_text(), "reversible_networks", "exec"), module)
    return module


def run(example, folder, name, arguments, stops=False):
    app = typer.Typer()
    app.command()(example["main"])
    places = f"--checkpoint {folder / name}.pt --curve {folder / name}.png"
    result = CliRunner().invoke(app, f"{SMALL} {places} {arguments}".split(), standalone_mode=False)
    assert stops or result.exception is None, result.output
    return result.return_value, result.output


def assert_equal(ours, theirs):
    """Everything in two checkpoints, bit for bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_equal(*pair)
    else:
        assert ours == theirs


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    ("arguments", "stop"),
    [
        ("--network resnet24-leaky", 4),  # in the second epoch, at a checkpoint
        ("--network former", 3),  # at the end of the first epoch, before its checkpoint
        ("--network resnet24 --folder NMNIST", 5),  # a step after a checkpoint
        ("--network coupled", 4),
    ],
)
def test_going_on_equals_never_having_stopped(example, tmp_path, nmnist_folder, arguments, stop):  # noqa: F811
    arguments = arguments.replace("NMNIST", str(nmnist_folder))
    whole, output = run(example, tmp_path, "whole", arguments)
    assert len(whole.losses) == 6 and len(whole.accuracies) == 2
    assert output.count("test accuracy") == 2

    nothing, _ = run(example, tmp_path, "parts", f"{arguments} --stop-after {stop}", stops=True)
    assert not isinstance(nothing, example["Training"])
    saved = torch.load(tmp_path / "parts.pt")["training"]["progress"]
    assert len(saved[2]) == stop // 2 * 2
    torch.manual_seed(99)  # another process
    parts, output = run(example, tmp_path, "parts", arguments)
    assert "going on" in output

    assert parts.losses == whole.losses and parts.accuracies == whole.accuracies
    assert_equal(torch.load(tmp_path / "parts.pt"), torch.load(tmp_path / "whole.pt"))
    assert len(set(whole.losses)) == 6, "nothing was learnt"
    assert os.path.getsize(tmp_path / "parts.png") > 1000


def test_a_checkpoint_of_other_settings_is_refused(example, tmp_path):
    run(example, tmp_path, "first", "--network former --epochs 1")
    app = typer.Typer()
    app.command()(example["main"])
    assert CliRunner().invoke(app, ["--network", "none"]).exit_code == 2
    arguments = f"{SMALL} --network former --lr 0.1 --checkpoint {tmp_path / 'first.pt'}"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code and "other settings" in result.output
