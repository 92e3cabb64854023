"""Fixtures of every test: a fixed seed, and one thread for each worker that runs beside others."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers beside each other that each take all cores are slower than workers with one thread. Set before
    # torch is loaded, it holds in threads that tests start, too, where sums otherwise depend on it.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# What every supported version has to pass: the mechanisms, and each framework's neurons, in two minutes.
CORE = (
    "grid/test_grid.py", "ops/test_bits.py", "tape/test_tape.py", "test_convert.py", "test_import.py",
    "neurons/integrate_fire/test_gradients.py", "neurons/on_grid/test_reversal.py",
    "spikingjelly/test_neurons.py", "spikingjelly/test_old_releases.py", "snntorch/test_neurons.py",
    "snntorch/test_convert.py",
)  # fmt: skip

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    """The versions that a run is about."""
    found = {"Python": platform.python_version()}
    for name, package in (
        ("torch", "torch"), ("SpikingJelly", "spikingjelly"), ("snnTorch", "snntorch"), ("numba", "numba"),
    ):  # fmt: skip
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "versions: " + ", ".join(f"{name} {version}" for name, version in found.items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is core."""
    here = Path(__file__).parent
    core = {here / name for name in CORE}
    for item in items:
        if item.path in core:
            item.add_marker(pytest.mark.core)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Ignoring what a form's missing library keeps from being imported is not for test files."""
    if report.skipped and report.nodeid.startswith("tests/") and "unable to import" in str(report.longrepr):
        raise pytest.UsageError(f"{report.nodeid} can't be imported: {report.longrepr}")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds torch before each test, so that no test depends on those before it."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def no_neurons_left() -> Iterator[None]:
    """snnTorch's resets know every neuron that was ever made, those of other tests too."""
    yield
    if "snntorch" in sys.modules:
        sys.modules["snntorch"].SpikingNeuron.instances.clear()
