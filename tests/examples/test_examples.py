"""Each example is run as it stands, and with the line taken out that it says is the one change."""

import math
import os
import re
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import snn_reversible_plugin as srp
from snn_reversible_plugin.data import DigitSaccades

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "spikingjelly_training": "--epochs 2 --steps 5 --batch 8 --channels 4 --limit 16",
    "snntorch_training": "--epochs 2 --steps 5 --batch 8 --limit 16",
}


def train(name, arguments, without=""):
    """The losses of an example, run through its own command line, and its output.

    Lines that hold ``without`` are left out of the script.
    """
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    kept = [line for line in lines if not (without and without in line)]
    module = types.ModuleType(name)
    exec(compile("\n".join(kept), name, "exec"), module.__dict__)
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [*arguments.split(), "--device", "cpu"], standalone_mode=False)
    assert result.exception is None, result.output
    return result.return_value, result.output, len(lines) - len(kept)


@pytest.fixture(scope="module")
def nmnist_folder(tmp_path_factory):
    """Simulated recordings in N-MNIST's files, so that its example runs where the data are not."""
    folder = tmp_path_factory.mktemp("nmnist")
    for part in ("Train", "Test"):
        data = DigitSaccades(train=part == "Train", limit=20)
        for i in range(len(data)):
            events, digit = data[i]
            t = events["t"].astype("u4")
            high = (events["p"].astype("u4") << 7) | (t >> 16)
            rows = [events["x"], events["y"], high, (t >> 8) & 255, t & 255]
            path = folder / part / str(digit) / f"{i:05}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                b"".join(bytes(row) for row in zip(*(row.tolist() for row in rows), strict=True))
            )
    return folder


@pytest.mark.parametrize(
    ("name", "nmnist"),
    [("spikingjelly_training", False), ("spikingjelly_training", True), ("snntorch_training", False)],
)
def test_an_example_trains_as_it_would_without_its_one_change(
    name, nmnist, nmnist_folder, tmp_path, monkeypatch
):
    arguments = SMALL[name] + (f" --folder {nmnist_folder} --cache {tmp_path}" if nmnist else "")
    converted = []
    convert = srp.convert_to_reversible

    def watched(model, **settings):
        before = [type(module) for module in model.modules()]
        model = convert(model, **settings)
        converted.append([type(m) for m in model.modules()] != before)
        return model

    monkeypatch.setattr(srp, "convert_to_reversible", watched)
    losses, output, _ = train(name, arguments)
    assert converted == [True]
    assert len(losses) == 4
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert output.count("test accuracy") == 2

    stock, stock_output, removed = train(name, arguments, without="# <- the one change")
    assert removed == 1
    assert len(converted) == 1, "the script converts somewhere else too"
    if name == "snntorch_training":  # a loop: near to stock on the grid, equal off it
        assert losses[0] == pytest.approx(stock[0], rel=1e-3) and losses[0] != stock[0]
        monkeypatch.setattr(srp, "convert_to_reversible", partial(watched, arithmetic="stock"))
        losses, output, _ = train(name, arguments)
    assert stock == losses
    told = partial(re.findall, r"test accuracy [\d.]+%")
    assert told(stock_output) == told(output) != []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize(("method", "trains"), [("stock", False), ("reversible", True), ("sltt", True)])
def test_long_sequences_train_where_stock_runs_out_of_memory(method, trains):
    script = [sys.executable, EXAMPLES / "long_sequences.py", "--method", method, "--limit-mb", "66"]
    size = ["--steps", "512", "--epochs", "1", "--batch", "32", "--limit", "32"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = "1"
    run = subprocess.run([*script, *size], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode == 0) == trains, run.stderr
    assert ("test accuracy" if trains else "can't allocate memory") in run.stdout + run.stderr


@pytest.mark.one_in(9)
@pytest.mark.parametrize("task", ["pixels", "saccades", "nmnist"])
def test_long_sequences_of_every_kind(task, nmnist_folder):
    arguments = f"--task {task} --steps 64 --epochs 1 --batch 8 --limit 16 --hidden 8"
    for method in ("stock", "reversible", "sltt", "sltt --k 3"):
        found, output, _ = train(
            "long_sequences", f"{arguments} --method {method} --folder {nmnist_folder}"
        )
        assert len(found["losses"]) == 2 and all(
            math.isfinite(loss) and loss > 0 for loss in found["losses"]
        )
        assert "test accuracy" in output


def test_every_example_is_tested():
    elsewhere = {"long_sequences", "reversible_networks"}  # the latter in test_resuming
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SMALL) | elsewhere
