"""The accuracy benchmark, on a handful of recordings: it trains, stores, goes on, and tabulates."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import block_accuracy
from benchmarks.block_accuracy import ARMS, main
from tests.examples.test_examples import nmnist_folder  # noqa: F401


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.setattr(block_accuracy, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(block_accuracy, "PICTURE", tmp_path / "picture.png")
    import typer

    app = typer.Typer()
    app.command()(main)

    def call(*arguments):
        result = CliRunner().invoke(app, [*arguments, "--limit", "16", "--epochs", "1"])
        assert result.exception is None, result.output
        return result.stdout, json.loads((tmp_path / "results.json").read_text())

    return call


def test_the_reversible_network_learns_what_its_plain_run_does(invoke, tmp_path, nmnist_folder):  # noqa: F811
    both = ["--only", "RevSResNet24", "--only", "RevSResNet24, run plainly"]
    output, stored = invoke("--seeds", "1", "--folder", str(nmnist_folder), *both)
    assert "equal to those of RevSResNet24, run plainly, bit for bit, in 2 of 2 runs" in output
    for data in ("events", "nmnist"):
        ours, plain = (stored[f"{data} | {arm} | 0"] for arm in list(ARMS)[:2])
        assert ours["losses"] == plain["losses"] != []
        assert ours["parameters"] == 260_362 and 0 <= ours["accuracy"] <= 1
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("picture.png", "block-losses.png"))

    again, unchanged = invoke("--seeds", "1", "--folder", str(nmnist_folder), *both)
    assert again == output and unchanged == stored  # the stored seconds say that nothing ran


def test_fine_tuning_runs_longer_than_training_alone(invoke):
    arms = ["MS-ResNet20", "MS-ResNet20, trained on"]
    _, stored = invoke("--seeds", "1", "--data", "events", "--only", arms[0], "--only", arms[1])
    short, long = (stored[f"events | {arm} | 0"]["losses"] for arm in arms)
    assert len(long) == 2 * len(short) and long[: len(short)] == short
