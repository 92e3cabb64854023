"""The script for a GPU: rows that fail, rows that take too long, and kernels of this device."""

import json
import zipfile

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def run(tmp_path):
    return gpu.Run(tmp_path / "out" / "gpu.json", 1, small=True)


def test_each_row_is_stored_when_it_is_done(run):
    def fails():
        raise ValueError("no such thing\nand more")

    def spins():
        while True:
            pass

    run.row("net", "stock", 10, lambda: {"ms": 2.0, "to_stock": 1.0})
    run.row("net", "broken", 10, fails)
    run.row("net", "slow", 1.05, spins)
    stored = json.loads(run.out.read_text())["rows"]
    assert [row["method"] for row in stored] == ["stock", "broken", "slow"]
    assert stored[1]["why_not"] == "ValueError: no such thing"
    assert stored[2]["why_not"].startswith("OutOfTime") and stored[2]["took"] < 20
    assert "| net | stock |  |  | 2.0 | 1.0 |  |" in run.tables()
    run.end = run.clock()
    run.row("net", "late", 10, fails)
    assert run.rows[-1]["why_not"] == "OutOfTime: no time left"


def test_a_difference_is_said(run):
    run.check("right", lambda: True)
    run.check("wrong", lambda: False)
    run.check("raises", lambda: bool(torch.ones(2)))
    assert run.checks["right"] == "equal" and run.checks["wrong"] == "DIFFERENT"
    assert run.checks["raises"].startswith("RuntimeError")


def test_kernels_of_this_device(run):
    gpu.check_steps(run)
    gpu.check_gradients(run)
    assert len(run.checks) == 4 + 10 and set(run.checks.values()) == {"equal"}


def test_a_training_step_is_measured(run):
    from benchmarks.methods import prepare
    from benchmarks.workloads import WORKLOADS

    workload, x = WORKLOADS["leaky-loop"], torch.rand(10, 8, 512)
    found = gpu.measured(run, prepare("stock", workload, workload.make(), x), x)
    assert found["ms"] > 0 and found["held_mib"] > 0


def test_wheels_are_carried(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    for name, module in (("carried-1.whl", "carried_module"), ("torch-9.whl", "torch_of_wheels")):
        with zipfile.ZipFile(tmp_path / name, "w") as packed:
            packed.writestr(f"{module}.py", "x = 1")
    gpu.carry(tmp_path)
    import sys

    (place,) = sys.path
    assert [file.name for file in gpu.Path(place).iterdir()] == ["carried_module.py"]
