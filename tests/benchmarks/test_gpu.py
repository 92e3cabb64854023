"""The script for a GPU: rows that fail, rows that take too long, and kernels of this device."""

import json
import zipfile

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_graphs


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
    assert run.rows[-1]["why_not"] == "NoTimeLeft: no time left"


def holds():
    return True


def differs():
    return False


def raises():
    return bool(torch.ones(2))


def compares(note):
    return lambda run: run.row("net", "memory", 10, lambda: gpu_graphs.compared(note, "stock's"))


@pytest.mark.parametrize(
    ("checks", "trains", "status"),
    [
        ([holds, holds], compares(True), 0),
        ([differs, holds], compares(True), 1),
        ([holds, differs], compares(True), 1),
        ([holds, raises], compares(True), 1),
        ([holds], compares(False), 1),
    ],
    ids=["equal", "the first differs", "a later one differs", "one raises", "gradients differ"],
)
def test_the_exit_status(checks, trains, status, tmp_path, monkeypatch, capsys):
    family = [gpu_checks.Case("kernels", f"case {number}", one) for number, one in enumerate(checks)]
    monkeypatch.setattr(gpu_checks, "cases", lambda *_: {"kernels": family})
    monkeypatch.setattr(gpu, "train", trains)
    assert gpu.main(["--small", "--minutes", "1", "--out", str(tmp_path / "gpu.json")]) == status
    told = capsys.readouterr()
    assert ("Not equal" in told.err) == bool(status)
    found = {holds: "equal", differs: "DIFFERENT", raises: "RuntimeError"}
    assert all(f"kernels: case {n}: {found[one]}" in told.out for n, one in enumerate(checks))


def spins():
    while True:
        pass


def test_what_takes_too_long_fails_and_what_the_end_cuts_short_is_not_checked(run, monkeypatch):
    run.checks = {name: {"cases": 2, "checked": 0, "wrong": {}} for name in ("right", "slow", "late")}
    monkeypatch.setattr(gpu, "LONGEST", 1.05)
    run.check(gpu_checks.Case("right", "one", holds))
    run.check(gpu_checks.Case("slow", "one", spins))
    run.end = run.clock() + run.reserved + 1.02
    run.check(gpu_checks.Case("late", "one", spins))
    run.check(gpu_checks.Case("late", "two", holds))
    assert run.checks["slow"]["wrong"]["one"].startswith("OutOfTime")
    assert run.checks["late"] == {"cases": 2, "checked": 0, "wrong": {}}
    assert run.failures() == ["slow", "late"]
    assert "| right | 1 | 1 | equal |" in run.tables() and "| late | 0 | 2 | not checked |" in run.tables()


def test_a_case_a_family_comes_first_and_then_all_in_turns():
    families = {name: [gpu_checks.Case(name, str(n), holds) for n in range(3)] for name in "ab"}
    order = [*gpu.first_of_each(families), *gpu.others(families)]
    assert [case.family + case.name for case in order] == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_kernels_of_this_device(run):
    families = gpu_checks.cases(run.device, small=True)
    assert len(families) == 1 + 1 + 4 + 1 + 3 + 6
    families = {name: of for name, of in families.items() if not name.startswith(("loops", "sequences"))}
    run.checks = {name: {"cases": len(of), "checked": 0, "wrong": {}} for name, of in families.items()}
    for case in gpu.first_of_each(families):
        run.check(case)
    assert not run.failures() and all(of["checked"] == 1 < of["cases"] for of in run.checks.values())


@pytest.mark.slow
def test_all_of_it_at_small_shapes(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--small", "--minutes", "7.5", "--out", str(out)]) == 0
    told, stored = capsys.readouterr().out, json.loads(out.read_text())
    assert all(of["checked"] and not of["wrong"] for of in stored["checks"].values())
    rows = {(row["work"], row["method"]): row for row in stored["rows"]}
    for work in ("SEW-ResNet18 bf16", "snnTorch loop", "SpikingJelly loop", "VGG fp32", "Spikformer fp32"):
        for method in gpu.FIRST:
            assert rows[work, method]["ms"] > 0 and rows[work, method]["held_mib"] > 0, (work, method)
    assert "ms" in rows["SpikingJelly loop", "compiled"], rows["SpikingJelly loop", "compiled"]
    table = told[told.index("| held to its reference |") :]
    assert all(f"| {work} | {method} |" in table for work, method in rows)
    assert all(f"| {family} | {of['checked']} |" in table for family, of in stored["checks"].items())


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
