"""Fixtures of every test: a fixed seed, and one thread for each worker that runs beside others."""

import gc
import os
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import metadata

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers beside each other that each take all cores are slower than workers with one thread. Set before
    # torch is loaded, it holds in threads that tests start, too, where sums otherwise depend on it.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # Seeding a kind of device that is not there keeps a formatted stack: milliseconds, thousands of times.
    torch.manual_seed = torch.default_generator.manual_seed


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


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave cases of large products to `make full`; skip what a release of snnTorch gets wrong itself."""
    products: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("one_in") is not None and item.get_closest_marker("slow") is None:
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        left_out = set(cases) - set(_spread(cases, cases[0].get_closest_marker("one_in").args[0]))
        for item in left_out:
            item.add_marker(pytest.mark.slow)
    for item in items:
        if "snntorch" in sys.modules and _FAULTY.search(item.name) and _swaps_states():
            item.add_marker(pytest.mark.skip(reason="a fault of this release of snnTorch's own"))


def _spread(cases: list[pytest.Item], n: int) -> list[pytest.Item]:
    """One in ``n``: the first one, and then what has most values that weren't taken yet, or few times.

    Every n-th one would leave out values for good where n and the number of a parameter's share a factor.
    """
    in_turn = [case for first in range(n) for case in cases[first::n]]
    taken: Counter[tuple[str, int]] = Counter()
    found = []
    for _ in range(0, len(cases), n):
        # Of those that are equal in this the first one: of one parameter alone they are every n-th.
        case = min(in_turn, key=lambda case: _known([taken[value] for value in _values(case)]))
        in_turn.remove(case)
        taken.update(_values(case))
        found.append(case)
    return found


def _known(times: list[int]) -> tuple[int, int]:
    return len(times) - times.count(0), sum(times)


def _values(case: pytest.Item) -> list[tuple[str, int]]:
    """Its parameters' values, which are the same objects in all cases of a test."""
    callspec = getattr(case, "callspec", None)
    return [] if callspec is None else [(name, id(value)) for name, value in callspec.params.items()]


# Of snnTorch 0.9.1: Synaptic mistakes its membrane for its current, and heaviside can't be called.
_FAULTY = re.compile(r"(?<!R)Synaptic|\[heaviside")


def _swaps_states() -> bool:
    from snn_reversible_plugin.snntorch import _swaps_states

    return _swaps_states()


def pytest_collection_finish() -> None:
    """Reports collect garbage, which takes a second where all that tests import is looked through."""
    gc.collect()
    gc.freeze()


class _ToldAtOnce:
    """Failures by name as they happen: a run that is ended from outside never comes to its summary."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"failed in {report.when}: {report.nodeid}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_ToldAtOnce(terminal))


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
