"""The Triton forms without a GPU: interpreted, and compiled for three architectures.

Whether Triton interprets is decided when kernels are imported, so each group runs in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def run(group: str, interpreted: bool, chosen: str) -> None:
    """The tests of a group that are chosen by marks: they must pass, and not be skipped one and all."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    file = Path(__file__).with_name(f"{group}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    found = result.stdout + result.stderr
    if re.search(r"\d+ skipped", found) and not re.search(r"\d+ passed", found):
        pytest.skip(found.strip())
    assert result.returncode == 0 and re.search(r"\d+ passed", found), found


def _chosen(config: pytest.Config) -> str:
    """What `make test` leaves out is left out of a group, too."""
    return "not slow" if "not slow" in config.getoption("markexpr") else ""


GROUPS = [
    "interpreted_steps", "interpreted_bits", "interpreted_training", "interpreted_sequences",
    "interpreted_old_releases",
]  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("group", GROUPS)
def test_interpreted_kernels_give_the_bits_of_their_references(group, pytestconfig):
    run(group, interpreted=True, chosen=_chosen(pytestconfig))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS[::3])
def test_what_the_groups_of_make_test_leave_out(group):
    run(group, interpreted=True, chosen="slow")


def test_kernels_compile_for_gpus_to_the_arithmetic_that_is_meant(pytestconfig):
    run("ahead_of_time", interpreted=False, chosen=_chosen(pytestconfig))
